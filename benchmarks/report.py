"""Compares saved benchmark results over time: a table and a plot for each device, and a list of regressions.

    python -m pytest benchmarks
    python -m benchmarks.report

Runs are grouped by device (the cohort), since results of different devices are not comparable. A regression is slower
than the median of the last five earlier runs of its cohort by more than a percentage and by more than a time. The
percentage alone would flag noise of microseconds, the time alone would hide regressions of short benchmarks.
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parent / "history.png"
HISTORY = 5
OTHERS = {"gpu", "parity"}  # folders of the results of `benchmarks.gpu` and `benchmarks.parity`


@dataclass(frozen=True)
class Saved:
    """A saved run: the median time of each benchmark in seconds."""

    cohort: str
    time: str
    commit: str
    medians: dict[str, float]


@dataclass(frozen=True)
class Regression:
    benchmark: str
    before: float  # s, the median of the earlier runs
    now: float

    def __str__(self) -> str:
        return (
            f"{self.benchmark}: {self.before * 1e3:.2f} ms -> {self.now * 1e3:.2f} ms "
            f"({self.now / self.before - 1:+.0%})"
        )


def read_results(folder: Path) -> dict[str, list[Saved]]:
    """The results in all JSON files of pytest-benchmark below a folder, by cohort, oldest first. Raises `ValueError`
    for any other JSON file, except in the folders of other measurements."""
    cohorts: dict[str, list[Saved]] = {}
    for path in folder.rglob("*.json"):
        if path.parent.name in OTHERS:
            continue
        try:
            content = json.loads(path.read_text())
            medians = {entry["fullname"]: entry["stats"]["median"] for entry in content["benchmarks"]}
            saved = Saved(
                content["machine_info"]["device"], content["datetime"], content["commit_info"]["id"][:9], medians
            )
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: is not a benchmark result ({type(error).__name__}: {error})") from None
        cohorts.setdefault(saved.cohort, []).append(saved)
    return {cohort: sorted(runs, key=lambda run: run.time) for cohort, runs in sorted(cohorts.items())}


def earlier_median(runs: list[Saved], benchmark: str) -> float | None:
    """The median of a benchmark over the last runs before the newest; None if they don't have it."""
    medians = [run.medians[benchmark] for run in runs[:-1] if benchmark in run.medians][-HISTORY:]
    return statistics.median(medians) if medians else None


def regressions(runs: list[Saved], percent: float, floor: float) -> list[Regression]:
    """The benchmarks that are slower in the newest run of a cohort than in the earlier ones, by more than `percent` and
    by more than `floor` seconds."""
    found = []
    for benchmark, now in runs[-1].medians.items():
        before = earlier_median(runs, benchmark)
        if before is not None and now > before * (1 + percent / 100) and now > before + floor:
            found.append(Regression(benchmark, before, now))
    return found


def table(runs: list[Saved]) -> str:
    """The newest run and the medians of the earlier ones, as text."""
    width = max(map(len, runs[-1].medians))
    lines = [f"{'':{width}}  {'earlier':>12}  {'now':>12}"]
    for benchmark, now in sorted(runs[-1].medians.items()):
        before = earlier_median(runs, benchmark)
        shown = f"{before * 1e3:9.2f} ms" if before is not None else "-"
        change = f"{now / before - 1:+7.0%}" if before is not None else ""
        lines.append(f"{benchmark:{width}}  {shown:>12}  {now * 1e3:9.2f} ms {change}")
    return "\n".join(lines)


def draw(cohorts: dict[str, list[Saved]], path: Path) -> None:
    """Plot each benchmark's time relative to its first run, by cohort. The eight that changed most are labelled."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(cohorts), 1, figsize=(10, 4 * len(cohorts)), squeeze=False, constrained_layout=True)
    for axis, (cohort, runs) in zip(axes[:, 0], cohorts.items(), strict=True):
        names = sorted({name for run in runs for name in run.medians})
        curves = {name: [(i, run.medians[name]) for i, run in enumerate(runs) if name in run.medians] for name in names}
        furthest = sorted(curves, key=lambda name: -abs(curves[name][-1][1] / curves[name][0][1] - 1))[:8]
        for name, points in curves.items():
            label = name.removeprefix("benchmarks/") if name in furthest else None
            style = {"label": label, "linewidth": 1.8} if label else {"color": "lightgrey", "linewidth": 1}
            axis.plot(
                [i for i, _ in points], [seconds / points[0][1] for _, seconds in points], "o-", markersize=3, **style
            )
        axis.set(title=cohort, ylabel="time / first time", xticks=range(len(runs)))
        axis.set_xticklabels([run.commit for run in runs], rotation=45, fontsize=7)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=90)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument(
        "--picture", type=Path, default=PICTURE, metavar="FILE", help="a PNG of the history (default: %(default)s)"
    )
    parser.add_argument(
        "--percent", type=float, default=10.0, help="a regression is slower by more than this (default: 10)"
    )
    parser.add_argument(
        "--floor-ms", type=float, default=1.0, help="and by more than so many milliseconds (default: 1)"
    )
    options = parser.parse_args(arguments)
    cohorts = read_results(options.results)
    if not cohorts:
        print(f"{options.results} has no results; run: python -m pytest benchmarks")
        return 2
    slower = []
    for cohort, runs in cohorts.items():
        print(f"{cohort}: {len(runs)} runs, the newest is {runs[-1].commit} of {runs[-1].time}\n{table(runs)}\n")
        slower += regressions(runs, options.percent, options.floor_ms / 1e3)
    draw(cohorts, options.picture)
    print(f"plotted to {options.picture}")
    print("\n".join(["regressions:", *map(str, slower)]) if slower else "no regression")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
