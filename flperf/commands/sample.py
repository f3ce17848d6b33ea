"""`flperf sample`: write forecasts of validation clips."""

import math
from pathlib import Path

from flperf.commands.trained import add_configuration, trained_parser, trained_run
from flperf.errors import UserError


def sample(arguments: list[str]) -> None:
    parser = trained_parser(
        "sample",
        "Write forecasts of validation clips: OUT/forecasts.safetensors, and per clip a folder with pictures.",
        "flperf sample --checkpoint experiment/demo --out experiment/demo/forecasts --clips 4 --seconds 2",
    )
    add_configuration(parser)
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--clips", type=int, default=4, help="forecast the first N validation clips (default: 4)")
    horizon = parser.add_mutually_exclusive_group()
    horizon.add_argument(
        "--frames", type=int, help="latent frames ahead (default: as in training; more are rolled out)"
    )
    horizon.add_argument("--seconds", type=float, help="the horizon as a time, by the clips' frame rate")
    options = parser.parse_intermixed_args(arguments)
    for name in ("clips", "frames", "seconds"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name}: must be above 0{' and finite' if value > 0 else ''}, is {value}")
    _, run = trained_run(options)
    from flperf.evaluation.forecasts import write_forecasts

    print(write_forecasts(run, Path(options.out), options.clips, options.frames, options.seconds))
