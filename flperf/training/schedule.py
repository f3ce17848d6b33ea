"""When a run ends, and after which steps a save or a validation is due."""

import math

from flperf.config import Trainer
from flperf.config.validate import parse_interval


class Schedule:
    """The steps of this start, of `total_steps` in the run. An epoch is `train_size` clips, which need not be a whole
    number of steps."""

    def __init__(self, trainer: Trainer, train_size: int, first_step: int):
        self.steps_per_epoch = train_size / trainer.batch_size
        self.total_steps = trainer.max_steps or math.ceil(trainer.max_epochs * self.steps_per_epoch)
        stop = first_step + trainer.stop_after if trainer.stop_after else self.total_steps
        self.steps = range(first_step, min(stop, self.total_steps))

    def epoch(self, step: int) -> int:
        """The number of whole epochs after `step` steps."""
        return math.floor(step / self.steps_per_epoch)

    def dump_name(self, done: int) -> str:
        """The folder of the forecasts after `done` steps: `epoch_EE` if an epoch ends with this step, otherwise with
        the step in its name, because an epoch may have several."""
        epoch = self.epoch(done)
        return f"epoch_{epoch:02d}" if self.epoch(done - 1) < epoch else f"epoch_{epoch:02d}_step_{done:06d}"

    def due(self, interval: str, done: int) -> bool:
        """Whether an interval ("500", "2 epochs") ends after `done` steps. True at the end of this start."""
        count, unit = parse_interval(interval, "interval")
        period = count if unit == "step" else count * self.steps_per_epoch
        return int(done / period) > int((done - 1) / period) or done == self.steps.stop
