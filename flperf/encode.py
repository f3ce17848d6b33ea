"""Encode a dataset once: `flperf encode --config FILE --out DIR` writes the latents of both splits, for training without an encoder.

Runs under the deepspeed launcher on any number of processes (`deepspeed flperf/encode.py --config … --out …`); each takes every n-th shard
that is not there yet, so the same command goes on after a kill.
"""

import argparse
from pathlib import Path

from flperf.command import run_command
from flperf.config import load_config


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="flperf encode", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="the configuration of a dataset of videos and a backbone")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for train/ and validation/")
    parser.add_argument("--files", action="store_true", help="write FutureLatents' format instead: one saved tensor `d t h w` a clip")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a key of the file")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(arguments)


def encode(arguments: list[str]) -> None:
    options = parse_arguments(arguments)
    config = load_config(options.config, options.overrides)

    # Imported late, so that a mistake in the configuration shows at once.
    from flperf.encoding import encode_dataset
    from flperf.engine import start_process

    encode_dataset(config, start_process(), Path(options.out), as_files=options.files)


def main(arguments: list[str] | None = None) -> None:
    run_command(encode, arguments)


if __name__ == "__main__":
    main()
