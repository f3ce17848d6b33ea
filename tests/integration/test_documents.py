"""What the documents say works: their commands are accepted, their files, keys and links exist, their programs and
examples run. test_readme.py runs the commands that need no data from elsewhere."""

import argparse
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from deepspeed.launcher.runner import parse_args as parse_deepspeed
from documents import MEASURING, PAGES, blocks, commands, flperf_commands, write_configurations
from runs import REGIMES, ROOT, TINY
from torch.distributed.run import get_args_parser as torchrun_parser

from flperf import cli
from flperf.config import Config, load_config
from flperf.data.demo import write_demo

DOCS = ROOT / "docs"
ALL_PAGES = [*PAGES, ROOT / "benchmarks/NOTES.md"]
SECTIONS = "backbone|dataset|latents|model|objective|trainer|engine|evaluation|checkpoint|tracking"
CONVERTED = "configs/mine.yaml"  # what the guide has import-config write


def by_name(page: Path) -> str:
    return page.name


# ----------------------------------------------------------------------------------------------------------------
# commands


class Parsed(Exception):
    """Carries what a command's own parser made of its words."""


def arguments_of(command: str) -> list[str]:
    """What `flperf` gets: (command, arguments…). Launchers' own parsers take their options away."""
    words = shlex.split(command)
    if words[0] == "sbatch":
        assert Path(words[1]).is_file()
        return ["train", *words[2:]]
    if words[0] in ("deepspeed", "torchrun"):
        if words[0] == "deepspeed":
            options = parse_deepspeed(words[1:])
            assert options.hostfile.startswith("/job/") or Path(options.hostfile).is_file()
            words = [options.user_script, *options.user_args]
        else:
            options = torchrun_parser().parse_args(words[1:])
            words = [options.training_script, *options.training_script_args]
        assert Path(words[0]).is_file()
        return ["train", *words[1:]] if words[0] == "flperf/train.py" else words[1:]
    assert words[0] == "flperf", f"unknown command: {command}"
    return words[1:]


def parsed(name: str, arguments: list[str], monkeypatch) -> argparse.Namespace:
    """The options of a command, refused as the command would refuse them; nothing is run."""

    def stop(method):
        def parse(parser, arguments=None, namespace=None):
            raise Parsed(method(parser, arguments, namespace))

        return parse

    for method in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, method, stop(getattr(argparse.ArgumentParser, method)))
    with pytest.raises(Parsed) as result:
        cli.load_command(name)(arguments)
    return result.value.args[0]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder with what the commands name, and the configurations that the documents write."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "flperf").symlink_to(ROOT / "flperf")
    shutil.copytree(ROOT / "configs", folder / "configs")
    for page in PAGES:
        write_configurations(page, folder)
    return folder


@pytest.mark.parametrize("command", dict.fromkeys(command for page in PAGES for command in flperf_commands(page)))
def test_commands_are_accepted(command, checkout, monkeypatch):
    """By the launcher's parser, by the command's own, and by the configuration."""
    monkeypatch.chdir(checkout)
    name, *arguments = arguments_of(command)
    options = parsed(name, arguments, monkeypatch)
    config = getattr(options, "config", None) or "configs/demo.yaml"
    load_config("configs/demo.yaml" if config == CONVERTED else config, getattr(options, "overrides", []))


@pytest.mark.parametrize("page", ALL_PAGES, ids=by_name)
def test_commands_in_the_text_exist(page):
    """`flperf COMMAND` and `python -m MODULE`, in code or in a sentence."""
    text = page.read_text()
    assert set(re.findall(r"`(?:deepspeed )?flperf(?:/cli\.py)? ([a-z][a-z-]*)", text)) <= set(cli.COMMANDS)
    for module in re.findall(r"python -m (benchmarks[\w.]*)", text):
        assert importlib.util.find_spec(module), f"{page.name} names {module}"


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_measuring_commands_name_files(page):
    for command in commands(page):
        if command.startswith(MEASURING):
            paths = re.findall(r"(?:benchmarks|docs|tests)/\S+", command)
            assert all((ROOT / path).exists() for path in paths), command


# ----------------------------------------------------------------------------------------------------------------
# names and links


@pytest.mark.parametrize("page", ALL_PAGES, ids=by_name)
def test_keys_exist(page):
    for section, keys in re.findall(rf"`({SECTIONS})\.([a-z][\w.]*)", page.read_text()):
        value = getattr(Config(), section)
        for key in keys.rstrip(".").split("."):
            if isinstance(value, dict):  # of the backbone's own configuration
                break
            assert hasattr(value, key), f"{page.name} names {section}.{keys}"
            value = getattr(value, key)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ALL_PAGES, ids=by_name)
def test_links_resolve(page):
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.S | re.M)  # without code
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if ":" in path:
            continue
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"
    for path in re.findall(r"`((?:configs|flperf|kernels|benchmarks|tests|docs|notebooks)/[\w/.]*\w/?)`", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_the_code_map_names_what_is_there():
    (code_map,) = (block for block in blocks(ROOT / "README.md", "text") if "flperf/cli.py" in block)
    paths = [line.split()[0] for line in code_map.splitlines()]
    assert all((ROOT / path).exists() for path in paths), paths


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])


# ----------------------------------------------------------------------------------------------------------------
# programs and pictures


def module_of(file: str):
    """A program of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(file.removesuffix(".py"), DOCS / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("regime", ["predictor", "flow_matching"])
def test_the_plain_loop_learns(tiny, regime):
    losses = module_of("plain_loop.py").train(
        load_config(tiny, [*REGIMES[regime], "trainer.max_steps=40"]), torch.device("cpu")
    )
    first, last = (sum(part) / len(part) for part in (losses[:8], losses[-8:]))
    assert last < 0.9 * first


def test_the_plain_loop_prints_its_usage(monkeypatch):
    monkeypatch.setattr("sys.argv", ["docs/plain_loop.py"])
    with pytest.raises(SystemExit, match=r"usage: python \S*plain_loop.py CONFIG"):
        runpy.run_path(str(DOCS / "plain_loop.py"), run_name="__main__")


def test_the_picture_of_the_data_flow_can_be_drawn(tmp_path):
    module_of("data_flow.py").main(str(tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_python_interface_is_a_page():
    page = module_of("api.py").page()
    assert {"load_forecaster", "load_config", "LatentGeometry", "flow_matching_loss"} <= set(re.findall(r"\w+", page))


def test_frames_are_read_as_the_page_on_data_shows(tmp_path, monkeypatch):
    write_demo(tmp_path / "data/demo", {"train": 2, "validation": 1})
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec("\n".join(blocks(DOCS / "data.md", "python")), namespace)
    assert namespace["frames"].shape[::3] == (4, 3) and namespace["frames"].dtype == torch.uint8


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
    """The examples of docs/extending.md, unchanged, in a program of the user's own that calls the entry point."""
    program = (
        "\n".join(blocks(DOCS / "extending.md", "python"))
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
    (block,) = blocks(DOCS / "extending.md", "python kernel")
    (tmp_path / "kernel.py").write_text(block)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "kernel.py"]
    finished = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]


def test_single_frames_of_shapes_are_a_configuration():
    """From which a locator can learn."""
    dataset = load_config(
        ROOT / "configs/datasets/synthetic_bouncing_shapes_images.yaml", ["trainer.max_steps=1"]
    ).dataset
    assert (dataset.kind, dataset.n_frames) == ("bouncing_shapes", 1)
