"""`flperf encode --config FILE --out DIR`: write the latents of both splits, to train without running the encoder.

It runs on any number of processes (`deepspeed flperf/cli.py encode --config … --out …`). Process r of n writes every
n-th shard from shard r on, and skips those that exist, so that the same command resumes after a kill.
"""

import argparse
from pathlib import Path

from flperf.commands.common import add_overrides, command_parser
from flperf.config import load_config
from flperf.engine.compile_cache import use_compile_cache


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = command_parser(
        "encode",
        "Write the latents of a dataset's videos, to train without running the encoder. Under the deepspeed launcher "
        "(deepspeed flperf/cli.py encode …) all devices are used. The same command resumes after a kill.",
        "flperf encode --config configs/demo.yaml --out data/demo_latents",
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="the configuration of a dataset of videos and a backbone"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for train/ and validation/")
    parser.add_argument(
        "--files", action="store_true", help="write FutureLatents' format instead: one saved tensor `d t h w` per clip"
    )
    add_overrides(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(arguments)


def encode(arguments: list[str]) -> None:
    options = parse_arguments(arguments)
    config = load_config(options.config, options.overrides)
    use_compile_cache(config.experiment)

    # Imported late, so that mistakes in the configuration are reported before torch is loaded.
    from flperf.commands.latent_writer import encode_dataset
    from flperf.engine.process import start_process

    encode_dataset(config, start_process(), Path(options.out), as_files=options.files)
