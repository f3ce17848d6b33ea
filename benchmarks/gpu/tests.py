"""The tests that need a GPU, as a subprocess; its last lines are kept."""

import subprocess
import sys
from pathlib import Path

from benchmarks import sizes
from benchmarks.gpu.section import Section

ROOT = Path(__file__).parents[2]
LINES = 80


def measure(section: Section) -> None:
    chosen = ["tests/gpu/test_attention.py"] if sizes.QUICK else ["tests"]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider", *chosen]
    log = section.folder / "tests.txt"
    with open(log, "w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            status: int | None = process.wait(max(1.0, section.left - 5))
        except subprocess.TimeoutExpired:
            process.kill()
            status = None
    lines = log.read_text(errors="replace").splitlines()
    outcomes = {word: sum(f" {word}" in line for line in lines if "::" in line) for word in ("PASSED", "FAILED")}
    section.results.add(section.name, tail=lines[-LINES:])
    section.row(
        "tests marked gpu", "pytest -m gpu",
        passed=outcomes["PASSED"], failed=outcomes["FAILED"], status="out of time" if status is None else status,
        last=lines[-1] if lines else "",
    )  # fmt: skip
    print("\n".join(lines[-LINES:]))
