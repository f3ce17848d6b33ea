"""What the documents say works: their programs run, their commands exist, their examples are compiled and run."""

import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from runs import REGIMES, ROOT, TINY

from flperf import cli
from flperf.config import load_config

DOCS = ROOT / "docs"
SHAPE = r"\[[a-z][^\]]*\]|… \w|\b[a-z]( [a-z0-9]\b)+|\bshapes?\b"  # [b, d], `… d`, b t h w d, or "of their shape"


def module_of(file: str):
    """A program of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(file.removesuffix(".py"), DOCS / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / document).read_text(), flags=re.S | re.M)


@pytest.mark.parametrize("regime", ["predictor", "flow_matching"])
def test_the_plain_loop_learns(tiny, regime):
    losses = module_of("plain_loop.py").train(
        load_config(tiny, [*REGIMES[regime], "trainer.max_steps=40"]), torch.device("cpu")
    )
    first, last = (sum(part) / len(part) for part in (losses[:8], losses[-8:]))
    assert last < 0.9 * first


def test_the_plain_loop_is_short():
    assert len((DOCS / "plain_loop.py").read_text().splitlines()) <= 60


def test_the_plain_loop_says_how_it_is_called():
    finished = subprocess.run(
        [sys.executable, str(DOCS / "plain_loop.py")], capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 1 and "usage: python" in finished.stderr and "Traceback" not in finished.stderr


def documented_commands() -> list[str]:
    lines = "\n".join(blocks("guide.md", "bash") + blocks("cluster.md", "bash")).splitlines()
    return [line for line in lines if line.startswith(("flperf ", "deepspeed ", "torchrun ", "sbatch "))]


@pytest.mark.parametrize("line", documented_commands())
def test_documented_commands_can_be_typed(line, capsys, monkeypatch):
    """What they name exists: command, options, configuration, keys. Their data does not, so they are not run here."""
    monkeypatch.chdir(ROOT)
    line = line.replace("sbatch configs/cluster/train.sbatch", "flperf train")
    words = shlex.split(line.partition("flperf")[2].replace("/train.py", "train").replace("/cli.py ", ""))
    monkeypatch.setattr("sys.argv", ["flperf", words[0], "--help"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert {word for word in words if word.startswith("--")} <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    overrides = [word for word in words if re.match(r"[a-z_.]+=", word)]
    config = words[words.index("--config") + 1] if "--config" in words else "configs/demo.yaml"
    load_config("configs/references/vjepa2_kinetics_400.yaml" if config == "configs/mine.yaml" else config, overrides)


@pytest.mark.parametrize(
    "document", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda document: document.name
)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#:]+\.\w+)\)", document.read_text()):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"
    for path in re.findall(
        r"`((?:configs|flperf|kernels|benchmarks|tests|docs|notebooks)/[\w/.]*\w/?)`", document.read_text()
    ):
        assert (ROOT / path).exists(), f"{document.name} names {path}"


def test_the_picture_of_the_data_flow_can_be_drawn(tmp_path):
    module_of("data_flow.py").main(str(tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_guide_expects_what_the_command_estimates(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    rows = re.findall(
        r"^\| [a-zA-Z ]+ \| `(--[^`]+)` \| ([\d.]+) \| ([\d.]+) \|$", (DOCS / "guide.md").read_text(), flags=re.M
    )
    assert len(rows) == 3
    for options, gigabytes, rate in rows:
        cli.load_command("estimate")(
            ["--config", "configs/references/vjepa2_kinetics_400.yaml", "--device", "h100", *options.split()]
        )
        memory, time = (line.split() for line in capsys.readouterr().out.splitlines() if re.match(r" *\d+ +1\*", line))
        assert (memory[-2], memory[-1], time[-2]) == (gigabytes, "yes", rate)


EXTENDED = [
    *(
        "backbone.kind=patch_projection",
        "backbone.architecture={image_size: 32}",
        "dataset.kind=fading",
        "dataset.n_frames=8",
    ),
    *("model.head=time_mixer", "objective.kind=change"),
    *("trainer.learning_rate=0.03", "trainer.batch_size=8", "trainer.max_steps=100"),
]


def test_every_new_part_trains_and_is_evaluated(tmp_path):
    """The examples as they stand, in a program of one's own, through the real entry point."""
    program = (
        "\n".join(blocks("extending.md", "python"))
        + "\nimport sys\nfrom flperf.train import main\nmain(sys.argv[1:])\n"
    )
    (tmp_path / "own.py").write_text(program)
    lines = TINY.format(folder=tmp_path).splitlines()
    (tmp_path / "own.yaml").write_text("\n".join(line for line in lines if "architecture" not in line))
    command = [sys.executable, "own.py", "--config", "own.yaml", *EXTENDED]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    result = json.loads((tmp_path / "experiment/own/metrics.jsonl").read_text().splitlines()[-1])
    assert result["forecast_mse"] < 0.1 * result["copy_last_mse"]


def test_the_new_kernel_computes_its_formula(tmp_path):
    (block,) = blocks("extending.md", "python kernel")
    (tmp_path / "kernel.py").write_text(block)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "kernel.py"]
    finished = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]


def test_the_python_interface_is_documented():
    """A page can be built, and nothing on it is silent; a dataclass whose text is its own signature is."""
    api = module_of("api.py")
    assert "load_forecaster" in api.page()
    entries = [
        (f"{path}.{name}", item) for path in api.MODULES for name, item in api.entries(importlib.import_module(path))
    ]
    silent = [
        name
        for name, item in entries
        if not (item.__doc__ or "").strip() or item.__doc__.startswith(f"{name.split('.')[-1]}(")
    ]
    assert len(entries) > 100 and not silent, f"no docstring: {', '.join(silent)}"


def test_functions_of_tensors_say_their_shapes():
    api, silent = module_of("api.py"), []
    for path in api.MODULES:
        for name, item in api.entries(importlib.import_module(path)):
            function = getattr(item, "__func__", getattr(item, "fget", item))
            types = map(str, inspect.get_annotations(function).values()) if inspect.isfunction(function) else ()
            if any("Tensor" in one and "dict[str" not in one for one in types) and not re.search(
                SHAPE, inspect.getdoc(function) or ""
            ):
                silent.append(f"{path}.{name}")
    assert not silent, f"no shape: {', '.join(silent)}"


def test_single_frames_of_shapes_are_a_configuration():
    """What the locator may learn from."""
    dataset = load_config(
        ROOT / "configs/datasets/synthetic_bouncing_shapes_images.yaml", ["trainer.max_steps=1"]
    ).dataset
    assert (dataset.kind, dataset.n_frames) == ("bouncing_shapes", 1)
