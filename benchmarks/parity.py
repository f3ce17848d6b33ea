"""Trains the same small head in every way that flperf can execute it, and compares the curves of the loss and of the
gradient's norm with eager fp32 on one process.

    python -m benchmarks.parity                   # table, curves.json and curves.png in benchmarks/results/parity
    python -m benchmarks.parity --steps 100 --out FOLDER

All ways see the same clips, noise and tau, since these depend on the seed and the sample alone. The exit status is 1 if
a way differs by more than its tolerance. Two processes need two GPUs, or a CPU.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from flperf.files import atomic_file, write_atomically
from tests.runs import free_port

ROOT = Path(__file__).parents[1]
STEPS, QUICK_STEPS, TIMEOUT = 30, 6, 900
HEADS = ("predictor", "dit")
CURVES = ("loss", "grad_norm")
Curves = dict[str, list[float]]  # of one training: a value for each step
# Largest relative difference of the loss at any step.
# fp32: ways differ in the order of sums, by which a loss errs by some 2^-24 = 6e-8. Updates carry that on: AdamW
# divides a gradient by its own size, so a gradient near zero whose sign changes moves its weight by the full rate. 30
# steps leave 1e-7 on a CPU; the tolerance allows eighty times as much for other kernels and more steps.
# bf16: every value that is stored errs by up to 2^-9 of its size, so latents, output and loss err by some 2^-8 = 4e-3
# before any update. The tolerance is 2.5 times that.
TOLERANCES = {"fp32": 1e-5, "bf16": 1e-2}


@dataclass(frozen=True)
class Way:
    """One way to execute the same training."""

    compile: bool = False
    precision: str = "fp32"
    zero_stage: int = 0
    processes: int = 1

    @property
    def name(self) -> str:
        mode, count = "compiled" if self.compile else "eager", self.processes
        return f"{mode} {self.precision}, ZeRO {self.zero_stage}, {count} process{'es' if count > 1 else ''}"

    @property
    def keys(self) -> list[str]:
        return [
            f"engine.compile={str(self.compile).lower()}",
            f"engine.precision={self.precision}",
            f"engine.zero_stage={self.zero_stage}",
        ]


REFERENCE = Way()
WAYS = (
    REFERENCE,
    Way(compile=True),
    *(Way(zero_stage=stage) for stage in (1, 2, 3)),
    Way(precision="bf16", zero_stage=1),
    *(Way(compile=True, precision="bf16", zero_stage=stage) for stage in (0, 1, 2, 3)),
    *(Way(zero_stage=stage, processes=2) for stage in (0, 1, 2, 3)),
    Way(compile=True, zero_stage=3, processes=2),
    *(Way(compile=True, precision="bf16", zero_stage=stage, processes=2) for stage in (1, 3)),
)
QUICK_WAYS = (REFERENCE, Way(compile=True, zero_stage=1), Way(precision="bf16", zero_stage=1, processes=2))


@dataclass(frozen=True)
class Parity:
    """How far a way is from the reference, relative to it."""

    head: str
    way: str
    loss: float  # largest difference
    at_step: int  # where it is
    final: float  # difference of the last loss
    grad_norm: float  # largest difference
    tolerance: float  # of the loss; ten times that for the norm of the gradient

    @property
    def holds(self) -> bool:
        return self.loss <= self.tolerance and self.grad_norm <= 10 * self.tolerance  # false for NaN


def differences(values: list[float], reference: list[float]) -> list[float]:
    """|value - reference| / reference, of each step; infinite for NaN."""
    found = (abs(a - b) / b for a, b in zip(values, reference, strict=True))
    return [math.inf if math.isnan(difference) else difference for difference in found]


def compare(head: str, way: Way, curves: Curves, reference: Curves) -> Parity:
    loss, norm = (differences(curves[name], reference[name]) for name in CURVES)
    largest = max(loss)
    return Parity(
        head, way.name, largest, loss.index(largest), loss[-1], grad_norm=max(norm), tolerance=TOLERANCES[way.precision]
    )


def train(ways: list[Way], heads: tuple[str, ...], steps: int, folder: Path) -> dict[str, dict[str, Curves]]:
    """By head and way; each number of processes is one group, which trains all its ways."""
    curves: dict[str, dict[str, Curves]] = {head: {} for head in heads}
    for processes in sorted({way.processes for way in ways}):
        requests = [
            {"head": head, "way": way.name, "keys": way.keys}
            for head in heads
            for way in ways
            if way.processes == processes
        ]
        for request, found in zip(requests, run_group(processes, requests, steps, folder), strict=True):
            curves[request["head"]][request["way"]] = found
    return curves


def run_group(processes: int, requests: list[dict], steps: int, folder: Path) -> list[Curves]:
    """The curves of each request, from `parity_worker` on a group of processes."""
    job, log = folder / f"job_{processes}.json", folder / f"log_{processes}.txt"
    answer = folder / f"answer_{processes}.json"
    job.write_text(json.dumps({"requests": requests, "steps": steps, "answer": str(answer), "folder": str(folder)}))
    group = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": os.cpu_count(), "MASTER_PORT": free_port()}
    command = [sys.executable, "-m", "benchmarks.parity_worker", str(job)]
    with open(log, "w") as output:
        members = [
            subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                env=os.environ | {k: str(v) for k, v in (group | {"RANK": rank, "LOCAL_RANK": rank}).items()},
            )
            for rank in range(processes)
        ]  # fmt: skip
        try:
            statuses = [member.wait(TIMEOUT) for member in members]
        finally:
            for member in members:
                member.kill()
    if any(statuses):
        raise RuntimeError(f"the group of {processes} ended with {statuses}:\n{log.read_text()[-3000:]}")
    return json.loads(answer.read_text())


def table(results: list[Parity]) -> str:
    columns = ("head, way", "loss: largest difference", "at step", "at the end", "gradient's norm", "tolerance")
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for found in results:
        mark = "" if found.holds else " **exceeded**"
        lines.append(
            f"| {found.head}, {found.way} | {found.loss:.1e}{mark} | {found.at_step} | {found.final:.1e} | "
            f"{found.grad_norm:.1e} | {found.tolerance:.0e} |"
        )
    return "\n".join(lines)


def draw(curves: dict[str, dict[str, Curves]], path: Path) -> None:
    """Curves of the loss above, and their relative differences from the reference below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(curves), figsize=(6 * len(curves), 7), squeeze=False, sharex=True)
    for column, (head, ways) in enumerate(curves.items()):
        reference = ways[REFERENCE.name]["loss"]
        for name, found in ways.items():
            losses = found["loss"]
            axes[0][column].plot(losses, label=name, linewidth=1)
            if name != REFERENCE.name:
                axes[1][column].semilogy([max(x, 1e-9) for x in differences(losses, reference)], linewidth=1)
        axes[0][column].set_title(head)
        axes[1][column].set_xlabel("step")
    axes[0][0].set_ylabel("loss")
    axes[1][0].set_ylabel("relative difference")
    axes[0][-1].legend(fontsize=5)
    figure.tight_layout()
    with atomic_file(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=110)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, help=f"default: {STEPS}")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/parity", metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="one head, three ways, a few steps")
    options = parser.parse_args(arguments)
    steps = options.steps or (QUICK_STEPS if options.quick else STEPS)
    if steps < 1:
        parser.error("--steps: at least 1")
    limit = torch.cuda.device_count() if torch.cuda.is_available() else 2
    wanted = QUICK_WAYS if options.quick else WAYS
    ways = [way for way in wanted if way.processes <= limit]
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        curves = train(ways, HEADS[:1] if options.quick else HEADS, steps, Path(folder))
    results = [
        compare(head, way, curves[head][way.name], curves[head][REFERENCE.name])
        for head in curves
        for way in ways
        if way != REFERENCE
    ]
    content = {"steps": steps, "curves": curves, "differences": [asdict(found) for found in results]}
    write_atomically(options.out / "curves.json", json.dumps(content, indent=1) + "\n")
    draw(curves, options.out / "curves.png")
    print(f"{steps} steps, against {REFERENCE.name}:\n\n{table(results)}\n")
    if len(ways) < len(wanted):
        print(f"Left out, for want of a second GPU: {len(wanted) - len(ways)} ways on two processes.")
    print(f"Curves: {options.out}/curves.json, curves.png")
    return int(not all(found.holds for found in results))


if __name__ == "__main__":
    sys.exit(main())
