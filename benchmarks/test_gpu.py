"""`python -m benchmarks.gpu --quick` runs every section; a test, not a measurement.

python -m pytest benchmarks/test_gpu.py --quick
"""

import json

import pytest

from benchmarks import sizes
from benchmarks.gpu import __main__ as gpu

TABLES = {  # section → a part of the name of each table
    "nvdec": ("one lane", "lanes"),
    "cores": ("cores", "one thread", "workers"),
    "step": ("step, dit", "step, predictor"),
    "levers": ("attention", "levers, dit", "levers, predictor"),
    "tests": ("tests",),
}


@pytest.mark.skipif(not sizes.QUICK, reason="is measured by python -m benchmarks.gpu")
def test_every_section_runs(tmp_path, capfd):
    out = tmp_path / "results.json"
    status = gpu.main(["--quick", "--out", str(out)])
    printed, sections = capfd.readouterr().out, json.loads(out.read_text())["sections"]
    assert status == 0, printed[-4000:]
    assert list(sections) == list(gpu.LIMITS) == list(TABLES)
    for name, section in sections.items():
        found = {row["table"] for row in section["rows"]}
        assert all(any(part in table for table in found) for part in TABLES[name]), (name, found)
    assert str(out) in printed
