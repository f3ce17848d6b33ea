"""The script for a GPU keeps what was measured, whatever happens to the rest. benchmarks/test_gpu.py runs it."""

import json
import time
from functools import partial

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.results import Results, tables
from benchmarks.gpu.section import OutOfTime, Section


@pytest.fixture
def results(tmp_path) -> Results:
    results = Results(tmp_path / "folder/results.json")
    results.start("a GPU", quick=False)
    return results


def failing(error: Exception):
    def fail() -> None:
        raise error

    return fail


def section_of(results: Results, name: str) -> dict:
    return json.loads(results.path.read_text())["sections"][name]


def test_rows_before_and_after_a_failure_are_kept(results, tmp_path, capsys):
    section = Section("step", results, time.monotonic() + 60, tmp_path)
    section.row("way", "first", ms=1.23456)
    section.attempt("second", failing(RuntimeError("CUDA error:\nof some kind")))
    section.row("way", "third", ms=3, clips_per_s=2.0)
    found = section_of(results, "step")
    assert found["rows"] == [
        {"table": "way", "row": "first", "ms": 1.235},
        {"table": "way", "row": "third", "ms": 3, "clips_per_s": 2.0},
    ]
    assert found["errors"] == ["second: RuntimeError: CUDA error: of some kind"]
    shown = tables(results.read())
    for line in ("| way | ms | clips_per_s |", "| first | 1.235 |  |", "| third | 3 | 2 |", "CUDA error: of some kind"):
        assert line in shown


def test_what_does_not_fit_into_the_time_is_left_out_and_named(results, tmp_path, capsys):
    section, ran = Section("step", results, time.monotonic() + 10, tmp_path), []
    for name, needs in (("short", 1), ("long", 60)):
        section.attempt(name, partial(ran.append, name), needs)
    section.attempt("stopped by the alarm", failing(OutOfTime("the section's time was used up")))
    found = section_of(results, "step")
    assert ran == ["short"] and "errors" not in found
    assert found["notes"][0].startswith("long: left out") and "used up" in found["notes"][1]


@pytest.mark.parametrize("program, reason", [("sleep 60", "killed after"), ("exit 7", "ended with status 7")])
def test_a_section_that_hangs_or_dies_is_named(results, tmp_path, monkeypatch, capsys, program, reason):
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!/bin/sh\n{program}\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(gpu.sys, "executable", str(interpreter))
    monkeypatch.setattr(gpu, "GRACE", 0)
    started = time.monotonic()
    gpu.run_section({"section": "step", "limit": 0.3, "quick": False}, results)
    assert time.monotonic() - started < 30
    assert section_of(results, "step")["errors"][0].startswith(reason)


def test_a_cpu_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "device_name", lambda: None)
    assert gpu.main([]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "--quick" in printed.err


def test_an_unknown_section_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["speed"])
    assert "unknown section speed; known: nvdec, cores" in capsys.readouterr().err
