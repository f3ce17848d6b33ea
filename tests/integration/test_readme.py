"""Every command of the README runs, in its order, as it stands there but smaller; what needs data that is not here is
loaded."""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, launch

from flperf.cli import load_command
from flperf.config import load_config

SMALL = [
    *("trainer.max_steps=2", "trainer.batch_size=4", "dataset.limit=12", "engine.compile=false"),
    *(
        "backbone.architecture.hidden_size=24",
        "backbone.architecture.num_hidden_layers=1",
        "model.hidden_dim=32",
        "model.depth=1",
    ),
    *("latents.statistics_clips=8", "evaluation.sampling.steps=2", "evaluation.probe_clips=12"),
]
# data or minutes that a test has not got
ELSEWHERE = ("/data/", "configs/references/", "configs/shapes/", "experiment/predictor")
SET_UP, MEASURED = "python3 -m venv", ("pytest", "benchmarks", "tensorboard")


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    return [
        line
        for block in blocks
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip() and not line.startswith("#")
    ]


def kind(command: str) -> str:
    if SET_UP in command:
        return "set-up"
    if any(word in command for word in MEASURED):
        return "measured"
    return "loaded" if any(word in command for word in ELSEWHERE) else "run"


def of_kind(wanted: str) -> list[str]:
    return [command for command in commands() if kind(command) == wanted]


def test_the_two_lines_that_set_up_come_first():
    demo, tests = commands()[:2]
    assert demo.endswith("deepspeed flperf/train.py --config configs/demo.yaml") and tests.endswith("pytest -q")
    assert "pytest" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("command", of_kind("loaded"))
def test_configurations_load(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = parsed(command, monkeypatch)
    if getattr(options, "config", None):
        load_config(options.config, getattr(options, "overrides", []))


class Parsed(Exception):
    """Carries what a command's own parser made of its words."""


def parsed(command: str, monkeypatch) -> argparse.Namespace:
    """The options of `flperf COMMAND …` or of a launched script, refused as the command would refuse them; nothing is
    run."""
    words = shlex.split(command)
    name, *arguments = words[next(i for i, word in enumerate(words) if "flperf" in word) :]
    if name in ("flperf", "flperf/cli.py"):
        name, *arguments = arguments

    def stop(method):
        def parse(parser, arguments=None, namespace=None):
            raise Parsed(method(parser, arguments, namespace))

        return parse

    for method in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, method, stop(getattr(argparse.ArgumentParser, method)))
    with pytest.raises(Parsed) as result:
        load_command(Path(name).stem)(arguments)
    return result.value.args[0]


@pytest.mark.parametrize("command", of_kind("measured"))
def test_measuring_commands_name_what_is_there(command):
    module = re.search(r"-m (benchmarks\S*)", command)
    assert module is None or (ROOT / f"{module[1].replace('.', '/')}.py").is_file()
    assert all((ROOT / path).exists() for path in re.findall(r"(?:benchmarks|tests)/\S+", command))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working directory in which the README's relative paths mean what they say."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("flperf", "configs", "kernels"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run_here(folder: Path, command: str) -> subprocess.CompletedProcess:
    words = shlex.split(command)
    trains = "flperf/train.py" in words or words[:2] in (["flperf", "train"], ["flperf", "encode"])
    small = SMALL if trains else []
    if words[0] == "deepspeed":
        processes = int(words[words.index("--num_accelerators") + 1]) if "--num_accelerators" in words else 1
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        return launch(processes, *words[script:], *small, cwd=folder)
    assert words[0] == "flperf"
    line = [sys.executable, "-m", "flperf.cli", *words[1:], *small]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def test_commands_run_in_their_order(folder):
    demo = commands()[0].split("&& ")[-1]
    for command in [demo, *of_kind("run")]:
        finished = run_here(folder, command)
        assert finished.returncode == 0, f"{command}\n{finished.stdout[-1500:]}\n{finished.stderr[-3000:]}"


def test_python_in_the_readme_runs(folder):
    """After the commands above have left a run and an export."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    prelude = "import torch\nvideo = torch.randint(0, 256, (40, 70, 80, 3), dtype=torch.uint8)\n"
    line = [sys.executable, "-c", prelude + block + "\nassert latents.ndim == 5"]
    finished = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
