"""Estimates the memory that a run needs on each device."""

from dataclasses import dataclass

from flperf.engine.devices import Device
from flperf.estimate.workload import Workload
from flperf.estimate.zero import MASTER, States


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes that one process holds at most."""

    states: States
    encoder: float
    copy: float  # of the head for evaluation, fp32 until the first evaluation
    clips: float  # loaded in advance
    activations: dict[str, float]  # by model.activation_checkpointing; those of the encoder if they are larger

    def total(self, mode: str) -> float:
        """Of all, with the activations of this model.activation_checkpointing."""
        return self.states.total + self.encoder + self.copy + self.clips + self.activations[mode]


def device_memory(workload: Workload, device: Device, stage: int, processes: int) -> DeviceMemory:
    """The memory of each of `processes` processes at a ZeRO stage."""
    return DeviceMemory(
        workload.states(stage, processes, device),
        encoder=workload.encoder_parameters * workload.dtype.itemsize,
        copy=workload.head_parameters * MASTER,
        clips=workload.config.dataset.prefetch * workload.share.micro_batch_size * workload.clip_bytes,
        activations={mode: max(workload.encoding.peak, cost.peak) for mode, cost in workload.training.items()},
    )
