"""W&B and TensorBoard behind one interface: numbers, tables and pictures of a step.

Both write into the run's folder, so that a resumed run continues its curves. Only the main process opens them.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol, cast

import yaml

from flperf.config import Config, Tracking, dump_config
from flperf.errors import UserError

Rows = Sequence[Sequence[str | float]]


class Dashboard(Protocol):
    """`step` is the number of updates that the values belong to."""

    def numbers(self, values: dict[str, float], step: int) -> None:
        """Log values by name, such as `train/loss`."""

    def table(self, name: str, columns: Sequence[str], rows: Rows, step: int) -> None: ...

    def picture(self, name: str, path: Path, step: int) -> None:
        """Log a PNG file."""

    def close(self) -> str | None:
        """Write what is pending. Returns the command to view or upload the data, if one is needed."""


def check_dashboards(config: Config) -> None:
    """Raise `UserError` if a configured dashboard is not installed."""
    if config.tracking.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("tracking.tensorboard: the package is not installed: pip install tensorboard")


def open_dashboards(config: Config, folder: Path, run_id: str, first_step: int) -> list[Dashboard]:
    """The configured dashboards. A run with the same `run_id` continues after `first_step` updates."""
    dashboards: list[Dashboard] = []
    if config.tracking.wandb != "none":
        dashboards.append(WandB(config, folder, run_id))
    if config.tracking.tensorboard:
        dashboards.append(TensorBoard(config, folder / "tensorboard", first_step))
    return dashboards


class WandB:
    """All starts of a run add to one W&B run with the id `run_id`. If the server is unreachable, this start is logged
    offline in `folder/wandb`."""

    def __init__(self, config: Config, folder: Path, run_id: str):
        import wandb

        self.folder, self.mode, project = folder, *wandb_mode_and_project(config.tracking)

        def start():
            return wandb.init(
                project=project,
                name=config.name,
                id=run_id,
                resume="allow",
                dir=folder,
                config=yaml.safe_load(dump_config(config)),
                mode=self.mode,
                settings=wandb.Settings(silent=True),
            )

        try:
            self.run = start()
        except wandb.errors.CommError as error:
            print(f"W&B can't be reached, so this start is logged offline: {' '.join(str(error).split())}", flush=True)
            wandb.teardown()  # otherwise the id counts as in use
            self.mode = "offline"
            self.run = start()

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
        # With --id all starts of an interrupted run are uploaded into one, in their order.
        return f"wandb sync --id {self.run.id} {self.folder}/wandb/offline-run-*" if self.mode == "offline" else None


class TensorBoard:
    """Event files in a folder. Values that an earlier start logged after `first_step` are hidden, because this start
    logs those steps again."""

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


Mode = Literal["online", "offline", "disabled", "shared"]


def wandb_mode_and_project(tracking: Tracking) -> tuple[Mode, str]:
    """The settings of wandb itself (WANDB_MODE, WANDB_PROJECT, its settings files) replace `auto` and the default
    project. `auto` is offline if there is no key for the server in use."""
    import wandb

    settings = wandb.setup(wandb.Settings(silent=True)).settings
    project = settings.project if settings.project and tracking.project == Tracking.project else tracking.project
    if tracking.wandb != "auto":
        return "offline", project
    logged_in = settings.mode != "online" or wandb.login(prompt=False, verify=False)
    return cast(Mode, settings.mode if logged_in else "offline"), project
