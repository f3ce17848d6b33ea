"""Estimates the time of one update from its bounds: arithmetic, memory traffic and collectives."""

from dataclasses import dataclass

from flperf.engine.devices import Device
from flperf.estimate.workload import Workload
from flperf.estimate.zero import collectives

# Assumed of every device: the fractions of its peak rates that a run reaches.
COMPUTE_EFFICIENCY, MEMORY_EFFICIENCY, NETWORK_EFFICIENCY = 0.5, 0.8, 0.8


@dataclass(frozen=True)
class StepTime:
    """Seconds of one update by bound."""

    arithmetic: float
    memory: float
    hidden: float  # collectives that overlap with computation
    exposed: float  # the other collectives
    clips: int  # of all processes

    @property
    def seconds(self) -> float:
        """The largest bound. Exposed collectives add to the bounds of computation."""
        return max(self.arithmetic, self.memory, self.hidden) + self.exposed

    @property
    def bound(self) -> str:
        """The name of the largest bound."""
        bounds = {
            "arithmetic": self.arithmetic,
            "memory": self.memory,
            "collectives": self.hidden + self.exposed,
        }
        return max(bounds, key=bounds.__getitem__)

    @property
    def efficiency(self) -> float:
        """The speed relative to the same number of processes without collectives."""
        return max(self.arithmetic, self.memory) / self.seconds


def computed_clips(workload: Workload, device: Device) -> float:
    """Clips a second that one device computes if reading them takes no time."""
    seconds = step_time(workload, device, workload.config.engine.zero_stage, nodes=1, per_node=1)
    return workload.clips / max(seconds.arithmetic, seconds.memory)


def step_time(workload: Workload, device: Device, stage: int, nodes: int, per_node: int) -> StepTime:
    """The time of an update at a ZeRO stage, with `per_node` processes on each node."""
    processes = nodes * per_node
    states = workload.states(stage, processes, device)
    updated = 2 * states.optimizer + states.gradients + states.weights  # optimizer states are read and written
    seconds = {hidden: 0.0 for hidden in (True, False)}
    if processes > 1:
        element_bytes, accumulation_steps = workload.dtype.itemsize, workload.share.accumulation_steps
        for collective in collectives(workload.head_parameters, stage, element_bytes, accumulation_steps):
            seconds[collective.hidden] += collective.sent(processes) / ring_rate(device, nodes, per_node)
    return StepTime(
        arithmetic=workload.clips * workload.flops / (COMPUTE_EFFICIENCY * device.peaks[workload.dtype]),
        memory=(workload.memory_traffic + updated) / (MEMORY_EFFICIENCY * device.bandwidth),
        hidden=seconds[True],
        exposed=seconds[False],
        clips=workload.clips * processes,
    )


def ring_rate(device: Device, nodes: int, per_node: int) -> float:
    """Bytes/s that each GPU sends in a ring through all. The slowest link bounds it; traffic between nodes uses all
    adapters of a node."""
    assert device.link is not None and device.network is not None  # only GPUs are estimated with several processes
    return NETWORK_EFFICIENCY * (device.link if nodes == 1 else min(device.link, per_node * device.network))
