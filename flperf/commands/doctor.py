"""`flperf doctor`: check that this machine has all that a run needs, and name a fix for what fails.

Each finding is one line. The exit status is 1 if a check fails, so that a job script can stop early. Each check imports
what it needs itself, so that a broken package fails one check only. --config adds the checks of
`flperf.commands.doctor_config`.
"""

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import requires

from flperf.commands.common import add_overrides, command_parser
from flperf.commands.doctor_machine import (
    Finding,
    attention,
    compiler,
    decoding,
    engine,
    gpu,
    gpu_decoding,
    hub,
    packages,
    space,
    tracking,
)
from flperf.errors import UserError

# Each check, and the package to reinstall if the check raises an exception.
Check = Callable[..., Iterator[Finding]]
CHECKS: dict[Check, str] = {
    packages: "packaging", gpu: "torch", decoding: "av", gpu_decoding: "nvidia-dali-cuda130",
    attention: "xformers", compiler: "triton",
    engine: "deepspeed", space: "", tracking: "wandb", hub: "huggingface_hub",
}  # fmt: skip


def findings(check: Check, *arguments, package: str = "", debug: bool = False) -> Iterator[Finding]:
    """The findings of a check; an exception becomes a failed finding, so that the other checks still run."""
    try:
        yield from check(*arguments)
    except Exception as error:
        if debug:
            traceback.print_exc()
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        yield Finding(check.__name__.replace("_", " "), text, fix_for_exception(check, package))


def fix_for_exception(check: Check, package: str) -> str:
    if check is engine and "DS_ACCELERATOR" in os.environ:
        return "unset DS_ACCELERATOR"
    if not package:
        return "run it again with --debug, and report the traceback"
    pinned = next((line for line in requires("flperf") or [] if re.match(rf"{package}\b", line)), package)
    return f"pip install --force-reinstall --no-deps '{pinned}'"


def doctor(arguments: list[str]) -> None:
    """Print all findings; exit with status 1 if a check fails."""
    parser = command_parser(
        "doctor",
        "Check that this machine has all that a run needs. The exit status is 1 if a check fails.",
        "flperf doctor --config configs/references/vjepa2_kinetics_400.yaml dataset.train=/data/k400/train.csv",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="also check a configuration: estimate its memory, open its data and backbone, decode ten clips "
        "of each split, and time the reading",
    )
    add_overrides(parser)
    options = parser.parse_intermixed_args(arguments)
    if options.overrides and not options.config:
        raise UserError(f"{options.overrides[0]}: replaces a key of a configuration; name one with --config FILE")
    failed = 0
    checks = [findings(check, package=package, debug=options.debug) for check, package in CHECKS.items()]
    if options.config:
        from flperf.commands.doctor_config import configured

        checks.append(findings(configured, options.config, options.overrides, debug=options.debug))
    for check in checks:
        for finding in check:
            print(finding, flush=True)
            failed += finding.failed
    print("all checks passed" if not failed else f"{failed} failed")
    sys.exit(1 if failed else 0)
