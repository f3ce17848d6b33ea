"""`flperf doctor` finds what is lost, and says how to mend it."""

import subprocess
import sys

from runs import ROOT

from flperf import doctor


def findings(check) -> str:
    return "\n".join(map(str, check()))


def test_a_wrong_version_and_a_missing_package_are_lost(monkeypatch):
    assert "LOST" not in findings(doctor.packages)
    monkeypatch.setattr(doctor, "requires", lambda name: ["einops>=99", "no-such-package>=1", "pytest>=99; extra == 'test'"])
    text = findings(doctor.packages)
    assert "LOST" in text and "einops>=99" in text and "no-such-package" in text and "pytest" not in text


def test_a_missing_compiler_is_lost(monkeypatch):
    assert "LOST" not in findings(doctor.compiler)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    assert "apt install g++" in findings(doctor.compiler)


def test_a_full_disk_is_lost(monkeypatch):
    monkeypatch.setattr(doctor, "NEEDED_DISK_GB", 1e9)
    assert "LOST" in findings(doctor.space)


def test_a_configuration_is_opened_as_a_run_would(tiny):
    def run(*overrides: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "flperf/cli.py"), "doctor", "--config", str(tiny), *overrides]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    healthy = run()
    assert healthy.returncode == 0, healthy.stdout + healthy.stderr[-2000:]
    assert "5 of 5 validation clips read" in healthy.stdout and "all is well" in healthy.stdout
    lost = run("dataset.kind=kinetics_400", "dataset.train=nowhere.csv")
    assert lost.returncode == 1 and "LOST  config" in lost.stdout and "nowhere.csv" in lost.stdout
