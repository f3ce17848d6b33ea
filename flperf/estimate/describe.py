"""The sizes of a run as text: clips, latents, parameters, FLOPs and memory. A run prints them when it starts."""

from collections.abc import Iterator

from flperf.data import Dataset
from flperf.data.cores import reading_cores
from flperf.data.mixture import shares
from flperf.data.videos import describe_reading
from flperf.engine.devices import memory_gb
from flperf.estimate.zero import model_states
from flperf.models.attention import attention_operator
from flperf.models.flops import count_parameters
from flperf.run import Components, flops_per_clip

SPLITS = {"train": "training", "validation": "validation"}


def describe(components: Components) -> str:
    """Several lines, the memory last."""
    config, geometry, share = components.config, components.geometry, components.share
    device, dtype, flops = components.process.device, components.dtype, flops_per_clip(components)
    head_parameters = count_parameters(components.forecaster)
    states = model_states(
        head_parameters,
        config.engine.zero_stage,
        share.world_size,
        dtype.itemsize,
        average=config.trainer.ema_decay is not None,
        accumulates=share.accumulation_steps > 1,
        overlaps=device.type == "cuda",
    )
    lines = [
        f"data      {config.dataset.kind}: {components.dataset.train_size} training clips, "
        f"{components.dataset.validation_size} validation clips",
        *source_lines(components.dataset),
        *short_lines(components.dataset),
        *reading_lines(components),
        f"latents   {geometry.context_frames} context + {geometry.target_frames} target frames, "
        f"{geometry.height} x {geometry.width} x {geometry.dim} each",
    ]
    if components.encoder:
        encoder_parameters = count_parameters(components.encoder)
        lines.append(f"encoder   {config.backbone.kind}, {encoder_parameters / 1e6:.1f} M parameters, frozen, {dtype}")
    lines += [
        f"head      {config.model.head}, {head_parameters / 1e6:.1f} M parameters",
        f"attention {attention_operator(config.model.hidden_dim // config.model.num_heads, dtype, device)}",
        f"batch     {share.batch_size} = {share.micro_batch_size} x {share.accumulation_steps} accumulation x "
        f"{share.world_size} processes",
        f"FLOPs     {flops['encoder'] / 1e9:.2f} G encoder + {flops['head'] / 1e9:.2f} G head a clip in training",
        f"memory    {states.total / 1e9:.3f} GB of model states a process at ZeRO {config.engine.zero_stage}; "
        f"{memory_gb(device):.2f} GB held now by this process, before activations",
    ]
    return "\n".join(lines)


def short_lines(dataset: Dataset) -> Iterator[str]:
    """A line for each split, or for each of several sources: how many of its clips are shorter than the window."""
    for name, short in dataset.short.items():
        yield "clips     " + (
            short.describe(SPLITS[name]) if name in SPLITS else f"{name}: {short.describe('training')}"
        )


def reading_lines(components: Components) -> Iterator[str]:
    """A line for video files: what reads which of them in training."""
    dataset, device = components.config.dataset, components.process.device
    if components.dataset.frame_rate:
        threads = dataset.threads or reading_cores(device)[0]
        yield f"reading   {describe_reading(dataset.decoder, device, threads)}"


def source_lines(dataset: Dataset) -> Iterator[str]:
    """A line for each of several sources: its clips, its share of the samples, and how often an epoch reads it."""
    sources = dataset.splits["train"].sources
    of_samples = shares([source.weight for source in sources])
    for source, share in zip(sources, of_samples, strict=True):
        passes = float(share * dataset.train_size / source.size)
        yield (
            f"source    {source.file}: {source.size} clips, {float(share):.4g} of the samples; "
            f"an epoch reads each clip {passes:.3g} times"
        )
