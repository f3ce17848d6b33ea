"""Encode a dataset once: `flperf encode --config FILE --out DIR` writes the latents of both splits, for training without an encoder.

Runs under the deepspeed launcher on any number of processes (`deepspeed flperf/encode.py --config … --out …`); each takes every n-th shard
that is not there yet, so the same command goes on after a kill.
"""

import argparse
from pathlib import Path

from flperf.command import command_parser, run_command
from flperf.compile_cache import use_compile_cache
from flperf.config import load_config


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = command_parser(
        "encode",
        "Write the latents of a dataset's videos down once, to train from them without an encoder; under the deepspeed launcher "
        "(deepspeed flperf/encode.py …) on all devices. The same command goes on after a kill.",
        "flperf encode --config configs/demo.yaml --out data/demo_latents",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the configuration of a dataset of videos and a backbone")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for train/ and validation/")
    parser.add_argument("--files", action="store_true", help="write FutureLatents' format instead: one saved tensor `d t h w` a clip")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a key of the file")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(arguments)


def encode(arguments: list[str]) -> None:
    options = parse_arguments(arguments)
    config = load_config(options.config, options.overrides)
    use_compile_cache(config.experiment)

    # Imported late, so that a mistake in the configuration shows at once.
    from flperf.encoding import encode_dataset
    from flperf.engine import start_process

    encode_dataset(config, start_process(), Path(options.out), as_files=options.files)


def main(arguments: list[str] | None = None) -> None:
    run_command(encode, arguments)


if __name__ == "__main__":
    main()
