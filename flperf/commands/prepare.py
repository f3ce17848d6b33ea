"""`flperf prepare --config FILE --out DIR`: write a dataset's videos once, as files that decode fast.

It runs on any number of processes (`deepspeed flperf/cli.py prepare --config … --out …`). Process r of n writes every
n-th file from file r on, and skips those that are there, so that the same command resumes after a kill.
"""

import argparse
from pathlib import Path

from flperf.commands.common import add_overrides, command_parser
from flperf.config import load_config
from flperf.errors import UserError


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = command_parser(
        "prepare",
        "Write the videos of a dataset once as files that decode fast: all their frames, resized and cropped as the "
        "backbone's processor does, in H.264. Name DIR/train.csv and DIR/validation.csv in the configuration to train "
        "on them. Under the deepspeed launcher (deepspeed flperf/cli.py prepare …) all cores are used. The same "
        "command resumes after a kill.",
        "flperf prepare --config configs/demo.yaml --out data/demo_prepared",
        "flperf prepare --config configs/demo.yaml --out data/demo_292 --short-side 292",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the configuration of a dataset of videos")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the files and an index of each split")
    parser.add_argument(
        "--short-side",
        type=int,
        metavar="N",
        help="for several backbones: only shrink frames to N pixels on the shorter side, and crop nothing",
    )
    add_overrides(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(arguments)


def prepare(arguments: list[str]) -> None:
    options = parse_arguments(arguments)
    config = load_config(options.config, options.overrides)
    if options.short_side is not None and options.short_side < 16:
        raise UserError(f"--short-side: must be at least 16 pixels, is {options.short_side}")

    # Imported late, so that mistakes in the configuration are reported before torch is loaded.
    from flperf.commands.set_writer import TIMEOUT, prepare_set
    from flperf.engine.process import start_process

    prepare_set(config, start_process(TIMEOUT), Path(options.out), options.short_side)
