"""Where a run can be watched: W&B and TensorBoard, behind one small interface.

A dashboard takes numbers by name, tables and pictures of one step. Both keep to the run's folder, so that a resumed run goes on where it
stopped; only the main process ever opens one.
"""

import importlib.util
import netrc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import yaml

from flperf.config import Config, UserError, dump_config

Rows = Sequence[Sequence[str | float]]


class Dashboard(Protocol):
    def numbers(self, values: dict[str, float], step: int) -> None:
        """Values by name, such as `train/loss`, after `step` updates."""

    def table(self, name: str, columns: Sequence[str], rows: Rows, step: int) -> None: ...

    def picture(self, name: str, path: Path, step: int) -> None:
        """A PNG file."""

    def close(self) -> str | None:
        """Write what is pending; returns what the user may want to do next."""


def check_dashboards(config: Config) -> None:
    """Raise `UserError` if a dashboard that is asked for is not installed."""
    if config.tracking.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("tracking.tensorboard: the package is not installed: pip install tensorboard")


def open_dashboards(config: Config, folder: Path, run_id: str, first_step: int) -> list[Dashboard]:
    """Those that the configuration asks for. A run of the same `run_id` is continued after `first_step` updates."""
    dashboards: list[Dashboard] = []
    if config.tracking.wandb != "none":
        dashboards.append(WandB(config, folder, run_id))
    if config.tracking.tensorboard:
        dashboards.append(TensorBoard(config, folder / "tensorboard", first_step))
    return dashboards


class WandB:
    """Online where a key is set, else offline in `folder/wandb`. Each start of a run adds to one W&B run, whose id is `run_id`."""

    def __init__(self, config: Config, folder: Path, run_id: str):
        import wandb

        self.folder, self.online = folder, config.tracking.wandb == "auto" and has_wandb_key()
        self.run = wandb.init(
            project=config.tracking.project,
            name=config.name,
            id=run_id,
            resume="allow",
            dir=folder,
            config=yaml.safe_load(dump_config(config)),
            mode="online" if self.online else "offline",
            settings=wandb.Settings(silent=True),
        )

    def numbers(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def table(self, name: str, columns: Sequence[str], rows: Rows, step: int) -> None:
        import wandb

        self.run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])}, step=step)

    def picture(self, name: str, path: Path, step: int) -> None:
        import wandb

        self.run.log({name: wandb.Image(str(path))}, step=step)

    def close(self) -> str | None:
        self.run.finish()
        # With --id all starts of an interrupted run are uploaded, in their order, into one.
        return None if self.online else f"wandb sync --id {self.run.id} {self.folder}/wandb/offline-run-*"


class TensorBoard:
    """Event files in a folder. What an earlier start logged beyond `first_step`, where this one goes on, is hidden."""

    def __init__(self, config: Config, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self.writer = SummaryWriter(folder, purge_step=first_step + 1)
        self.writer.add_text("config", f"```yaml\n{dump_config(config)}```", first_step)

    def numbers(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def table(self, name: str, columns: Sequence[str], rows: Rows, step: int) -> None:
        lines = [columns, ["---"] * len(columns), *([_cell(value) for value in row] for row in rows)]
        self.writer.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in lines), step)

    def picture(self, name: str, path: Path, step: int) -> None:
        import numpy
        from PIL import Image

        self.writer.add_image(name, numpy.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def close(self) -> str | None:
        self.writer.close()
        return f"tensorboard --logdir {self.folder}"


def _cell(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.4f}"


def has_wandb_key() -> bool:
    """Whether `wandb login` or the environment has left a key for the W&B server in use."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc().authenticators(server or "") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False
