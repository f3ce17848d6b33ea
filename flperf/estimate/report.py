"""Formats an estimate as text: sizes, memory by ZeRO stage, time of an update by number of nodes, and assumptions."""

from collections.abc import Iterator

from flperf.engine.devices import Device
from flperf.estimate.memory import device_memory
from flperf.estimate.step_time import (
    COMPUTE_EFFICIENCY,
    MEMORY_EFFICIENCY,
    NETWORK_EFFICIENCY,
    StepTime,
    step_time,
)
from flperf.estimate.workload import FRAME_RATE, KEYFRAME_INTERVAL, Workload
from flperf.estimate.zero import collectives

STAGES = (0, 1, 2, 3)
SOURCE_SIZE = "340 x 256"  # assumed of all video files, the usual size of Kinetics-400
FRAME_SECONDS = 2.5e-4  # of a core for a decoded frame of that size; measured, see docs/benchmarks.md


def report(workload: Workload, device: Device, nodes: list[int], per_node: int) -> str:
    """All sections. `workload` is that of one process among the first number of `nodes`."""
    cases = [(count, stage) for count in nodes for stage in STAGES]
    first = step_time(workload, device, workload.config.engine.zero_stage, nodes[0], per_node)
    stars = (
        "* the configured stage; activations by checkpointing, in all: "
        f"{workload.config.model.activation_checkpointing}"
    )
    memories = [_case(workload, *case) | _memory_row(workload, device, *case, per_node) for case in cases]
    steps = [_case(workload, *case) | _step_row(workload, device, *case, per_node) for case in cases]
    sections = (
        [f"An ESTIMATE of {workload.config.name} on {device.name}: computed from the sizes below, no step was taken"],
        _sizes(workload, nodes[0] * per_node),
        [f"Estimated memory of one device, GB of its {device.memory / 1e9:.0f} ({stars})", *_table(memories)],
        ["Estimated time of one update", *_table(steps)],
        [_input(workload, first)],
        _assumptions(workload, device),
    )
    return "\n\n".join("\n".join(lines) for lines in sections)


def _sizes(workload: Workload, processes: int) -> Iterator[str]:
    config, geometry, share = workload.config, workload.geometry, workload.share
    encoder = (
        f"{workload.encoder_parameters / 1e6:.1f} M parameters, {config.backbone.kind}, encode: "
        f"{config.backbone.encode}"
    )
    trained = workload.flops - workload.encoder_flops
    yield f"encoder   {encoder if workload.encoder_parameters else 'none: latents are cached'}"
    yield f"head      {workload.head_parameters / 1e6:.1f} M parameters, {config.model.head}"
    yield (
        f"latents   {geometry.context_frames} + {geometry.target_frames} frames of {geometry.height} x "
        f"{geometry.width} x {geometry.dim}"
    )
    yield (
        f"FLOPs     a clip: {_flops(workload.encoder_flops)} encoder forward + {_flops(trained)} head forward "
        "and backward"
    )
    yield (
        f"bytes     a process and update: {workload.memory_traffic / 1e9:.2f} GB read and written in memory, without "
        "the optimizer"
    )
    shared = f"{share.micro_batch_size} x {share.accumulation_steps} accumulation x {processes} processes"
    dtype = str(workload.dtype).removeprefix("torch.")
    yield f"batch     {share.batch_size} = {shared}, {dtype}; it grows with the nodes"


def _flops(count: float) -> str:
    return f"{count / 1e12:.3g} T" if count >= 1e11 else f"{count / 1e9:.3g} G"


def _case(workload: Workload, nodes: int, stage: int) -> dict[str, str]:
    return {"nodes": str(nodes), "ZeRO": f"{stage}{'*' if stage == workload.config.engine.zero_stage else ' '}"}


def _memory_row(workload: Workload, device: Device, nodes: int, stage: int, per_node: int) -> dict[str, str]:
    held = device_memory(workload, device, stage, nodes * per_node)
    states, mode = held.states, workload.config.model.activation_checkpointing
    row = {
        "weights": states.weights + states.gathered,
        "gradients": states.gradients + states.buckets,
        "optimizer": states.master + states.moments,
        "EMA": states.average,
        "encoder": held.encoder,
        "eval copy": held.copy,
        "clips": held.clips,
        "activations": held.activations["none"],
        "selective": held.activations["selective"],
        "full": held.activations["full"],
        "in all": held.total(mode),
    }
    fits = held.total(mode) <= device.memory
    return {name: f"{value / 1e9:.2f}" for name, value in row.items()} | {"fits": "yes" if fits else "NO"}


def _step_row(workload: Workload, device: Device, nodes: int, stage: int, per_node: int) -> dict[str, str]:
    result = step_time(workload, device, stage, nodes, per_node)
    volumes = collectives(workload.head_parameters, stage, workload.dtype.itemsize, workload.share.accumulation_steps)
    row = {
        "sending ms": result.hidden + result.exposed,
        "(hidden)": result.hidden,
        "arithmetic ms": result.arithmetic,
        "memory ms": result.memory,
        "step ms": result.seconds,
    }
    return {
        "sent GB": f"{sum(collective.sent(nodes * per_node) for collective in volumes) / 1e9:.2f}",
        **{name: f"{seconds * 1e3:.1f}" for name, seconds in row.items()},
        "bound by": result.bound,
        "clips/s": f"{result.clips / result.seconds:.1f}",
        "efficiency": f"{result.efficiency:.1%}",
    }


def _table(rows: list[dict[str, str]]) -> Iterator[str]:
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    for row in ({name: name for name in rows[0]}, *rows):
        yield "  ".join(f"{value:>{widths[name]}}" for name, value in row.items())


def _input(workload: Workload, first: StepTime) -> str:
    """What keeps a device busy: the rate of reading, or the cores that decode."""
    computed = workload.clips / max(first.arithmetic, first.memory)
    needed = f"input     a device computes {computed:.1f} clips/s, which takes"
    if not workload.encoder_parameters:
        return f"{needed} {computed * workload.clip_bytes / 1e9:.2g} GB/s of cached latents"
    if not workload.frames:
        return f"{needed} as many drawn clips; drawing is not estimated"
    return f"{needed} {computed * workload.frames * FRAME_SECONDS:.1f} cores to decode them"


def _assumptions(workload: Workload, device: Device) -> Iterator[str]:
    peak = device.peaks[workload.dtype] / 1e12
    yield "Assumed"
    yield (
        f"- {COMPUTE_EFFICIENCY:.0%} of the peak of {peak:.4g} TFLOP/s, "
        f"{MEMORY_EFFICIENCY:.0%} of {device.bandwidth / 1e12:.3g} TB/s"
    )
    if workload.config.engine.compile:
        yield "- compiled: the operators between two products (matrix products, attention) are one kernel"
    else:
        yield "- eager: every operator reads and writes memory"
    yield (
        "- bounds overlap one another, except collectives that are not hidden; each process keeps its number of clips "
        "as nodes are added"
    )
    if device.is_gpu:
        links = f"{device.link / 1e9:.0f} GB/s in a node, {device.network / 1e9:.0f} GB/s a device between nodes"
        yield f"- {NETWORK_EFFICIENCY:.0%} of links of {links}; rings, without latency and stragglers"
    if workload.frames:
        rate = f", {FRAME_RATE} frames a second" if workload.config.dataset.fps else ""
        yield (
            f"- H.264 of {SOURCE_SIZE}{rate}, a keyframe every {KEYFRAME_INTERVAL} frames; a decoded frame takes a "
            f"core {1e3 * FRAME_SECONDS:.2f} ms (measured on an AMD EPYC); files of `flperf prepare` take less"
        )
    yield (
        "- activations of eager operators (compiled ones keep less); no CUDA context, NCCL buffers or memory "
        "fragmentation"
    )
    yield f"- data of the device: {device.source}"
