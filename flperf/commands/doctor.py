"""`flperf doctor`: is everything here that a run needs, and if not, which command fixes it?

Each check returns one line; a failed one makes the exit status 1, so that a job script can stop before it waits in a
queue. What a check needs is imported in it: what is broken ends that check alone. With --config
`flperf.commands.doctor_config` goes on.
"""

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import requires

from flperf.commands.common import command_parser
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

# Each check with the package whose reinstallation mends it when it can't be made at all.
Check = Callable[..., Iterator[Finding]]
CHECKS: dict[Check, str] = {
    packages: "packaging", gpu: "torch", decoding: "av", gpu_decoding: "nvidia-dali-cuda130",
    attention: "xformers", compiler: "triton",
    engine: "deepspeed", space: "", tracking: "wandb", hub: "huggingface_hub",
}  # fmt: skip


def findings(check: Check, *arguments, package: str = "", debug: bool = False) -> Iterator[Finding]:
    """What a check yields; one that raises is itself a finding, so that the next ones are made."""
    try:
        yield from check(*arguments)
    except Exception as error:
        if debug:
            traceback.print_exc()
        text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        yield Finding(check.__name__.replace("_", " "), text, fix_of_broken(check, package))


def fix_of_broken(check: Check, package: str) -> str:
    if check is engine and "DS_ACCELERATOR" in os.environ:
        return "unset DS_ACCELERATOR"
    if not package:
        return "run it with --debug, and report what it says"
    pinned = next((line for line in requires("flperf") or [] if re.match(rf"{package}\b", line)), package)
    return f"pip install --force-reinstall --no-deps '{pinned}'"


def doctor(arguments: list[str]) -> None:
    """`flperf doctor`: print every finding; exit status 1 if a check fails."""
    parser = command_parser(
        "doctor",
        "Say what this machine has for a run, and what is missing; the exit status is 1 if a check fails.",
        "flperf doctor --config configs/references/vjepa2_kinetics_400.yaml dataset.train=/data/k400/train.csv",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="also estimate its memory, open its data and backbone, and decode ten clips"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a key of the file")
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
            failed += bool(finding.fix)
    print("all checks passed" if not failed else f"{failed} failed")
    sys.exit(1 if failed else 0)
