"""Measures on one GPU what a CPU can't tell, in some nine minutes with an empty compile cache.

    python -m benchmarks.gpu                          # all sections
    python -m benchmarks.gpu step levers --out FILE   # some of them
    python -m benchmarks.gpu --quick                  # at toy sizes, also on a CPU, to see that it works

It needs no files and no network. Each section is a process of its own with a time limit, so that none can stop the
others, and every ratio is taken in turns within one process. Results are written as soon as there are any.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from benchmarks.gpu.results import Results, tables

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/gpu"
LIMITS = {"nvdec": 75, "cores": 75, "step": 220, "levers": 280, "tests": 240}  # seconds, with an empty compile cache
TOTAL = 540  # seconds of all sections; the last ones get what is left
QUICK_LIMIT = 120
GRACE = 10  # seconds after its limit at which a section that does not end is killed
SHORTEST = 15  # seconds below which a section isn't started


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="section", help="of " + ", ".join(LIMITS) + "; default: all")
    parser.add_argument("--quick", action="store_true", help="toy sizes, on any device")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: a new file in benchmarks/results/gpu")
    parser.add_argument("--seconds", type=float, default=TOTAL, help=f"for all sections together (default: {TOTAL})")
    options = parser.parse_args(arguments)
    unknown = set(options.sections) - LIMITS.keys()
    if unknown:
        parser.error(f"unknown section {', '.join(sorted(unknown))}; known: {', '.join(LIMITS)}")
    device = device_name()
    if not options.quick and device is None:
        print("benchmarks.gpu needs a GPU; on a CPU --quick runs it at toy sizes", file=sys.stderr)
        return 1
    results = Results(options.out or RESULTS / time.strftime("%Y%m%d_%H%M%S.json"))
    results.start(device or "CPU", options.quick)
    end = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as folder:
        for section in options.sections or LIMITS:
            limit = min(QUICK_LIMIT if options.quick else LIMITS[section], end - time.monotonic())
            if limit < SHORTEST:
                results.note(section, f"not started: {max(0, limit):.0f} s were left")
                continue
            job = {"section": section, "results": str(results.path.absolute()), "folder": folder, "limit": limit}
            run_section(job | {"quick": options.quick}, results)
    print(f"\n{tables(results.read())}\n\n{results.path}")
    return int(any(section.get("errors") for section in results.read()["sections"].values()))


def device_name() -> str | None:
    """The GPU's name, asked in a process of its own, so that this one never holds the device."""
    program = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    return subprocess.check_output([sys.executable, "-c", program], text=True).strip() or None


def run_section(job: dict, results: Results) -> None:
    """Run a section in a process of its own, and end it and its children at its limit."""
    section, limit = job["section"], job["limit"]
    print(f"\n== {section}, at most {limit:.0f} s", flush=True)
    started = time.monotonic()
    one_thread = {"LOCAL_WORLD_SIZE": str(os.cpu_count())} if job["quick"] else {}  # toy sizes gain nothing by more
    job = job | {"end": started + limit}
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu.section", json.dumps(job)],
        cwd=ROOT, env=os.environ | one_thread, start_new_session=True,
    )  # fmt: skip
    try:
        status = process.wait(limit + GRACE)
        reason = f"ended with status {status}" if status else None
    except subprocess.TimeoutExpired:
        reason = f"killed after {limit + GRACE:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also what it left behind
        process.wait()
    if reason:
        results.fail(section, reason)
    seconds = time.monotonic() - started
    results.add(section, seconds=round(seconds, 1))
    print(f"== {section}: {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
