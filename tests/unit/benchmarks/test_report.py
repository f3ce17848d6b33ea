"""The benchmark report on invented histories with a known regression."""

import json

import pytest

from benchmarks import report


def save(folder, number: int, device: str = "a device", **milliseconds: float) -> None:
    content = {
        "machine_info": {"device": device},
        "datetime": f"2026-01-{number + 1:02}T00:00:00",
        "commit_info": {"id": f"{number:040x}"},
        "benchmarks": [{"fullname": name, "stats": {"median": value / 1e3}} for name, value in milliseconds.items()],
    }
    (folder / f"{number:04}_{device.replace(' ', '_')}.json").write_text(json.dumps(content))


def slower(folder, percent: float = 10.0, floor: float = 1e-3) -> list[str]:
    (runs,) = report.read_results(folder).values()
    return [regression.benchmark for regression in report.regressions(runs, percent, floor)]


def report_on(folder, *options: str) -> int:
    return report.main(["--results", str(folder), "--picture", str(folder / "history.png"), *options])


def test_a_regression_exceeds_both_the_percentage_and_the_floor(tmp_path):
    for number in range(6):
        save(tmp_path, number, step=100.0, tiny=0.01, large=10_000.0)
    save(tmp_path, 6, step=120.0, tiny=0.05, large=10_050.0)  # +20 %; five times, but by 0.04 ms; +50 ms, but by 0.5 %
    assert slower(tmp_path) == ["step"]


def test_one_outlier_among_the_last_five_does_not_change_the_result(tmp_path):
    for number, time in enumerate([100, 100, 400, 100, 100]):
        save(tmp_path, number, step=time)
    save(tmp_path, 5, step=130.0)
    assert slower(tmp_path) == ["step"]
    save(tmp_path, 6, step=101.0)
    assert slower(tmp_path) == []


def test_only_the_last_five_count(tmp_path):
    for number in range(5):
        save(tmp_path, number, step=50.0)
    for number in range(5, 10):
        save(tmp_path, number, step=100.0)
    save(tmp_path, 10, step=105.0)
    assert slower(tmp_path) == []


def test_devices_are_not_compared(tmp_path, capsys):
    save(tmp_path, 0, device="fast", step=1.0)
    save(tmp_path, 1, device="slow", step=100.0)
    assert len(report.read_results(tmp_path)) == 2
    assert report_on(tmp_path) == 0
    assert (tmp_path / "history.png").stat().st_size > 1000 and "no regression" in capsys.readouterr().out


def test_the_exit_status_and_the_text_report_regressions(tmp_path, capsys):
    save(tmp_path, 0, step=100.0)
    save(tmp_path, 1, step=150.0, new=3.0)
    assert report_on(tmp_path) == 1
    assert "step: 100.00 ms -> 150.00 ms (+50%)" in capsys.readouterr().out
    assert report_on(tmp_path, "--percent", "60") == 0


def test_missing_and_foreign_results_are_named(tmp_path, capsys):
    assert report_on(tmp_path) == 2
    assert "python -m pytest benchmarks\n" in capsys.readouterr().out
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu/results.json").write_text("{}")  # of another measurement
    assert report.read_results(tmp_path) == {}
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="x.json"):
        report.read_results(tmp_path)
