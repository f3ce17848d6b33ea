"""What README.md and the pages in docs/ show: their code blocks, commands and links."""

import re
from pathlib import Path

from runs import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SET_UP = (
    "python3 -m venv",
    ". ",
    "pip ",
    "git ",
    "cd ",
    "pre-commit ",
    "hf ",
    "wandb ",
    "pytest ",
)  # not ours to check
MEASURING = ("python -m ",)


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a language, without their fences."""
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", page.read_text(), flags=re.S | re.M)


def commands(page: Path) -> list[str]:
    """The commands in bash blocks, in order; `a && b` is two."""
    lines = "\n".join(blocks(page, "bash")).splitlines()
    shown = (line.strip() for line in lines if line.strip() and not line.strip().startswith("#"))
    return [command for line in shown for command in line.split(" && ")]


def flperf_commands(page: Path) -> list[str]:
    """Those that start flperf: all but set-up and measurements."""
    return [command for command in commands(page) if not command.startswith(SET_UP + MEASURING)]


def write_configurations(page: Path, folder: Path) -> None:
    """Write the YAML blocks that begin with `# FILE.yaml` into `folder`."""
    for block in blocks(page, "yaml"):
        name = re.match(r"# (\S+\.yaml)\n", block)[1]
        (folder / name).write_text(block)
