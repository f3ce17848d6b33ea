"""Everything a run is made of, built from its configuration in the order in which data flows."""

from dataclasses import dataclass
from functools import partial

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from flperf.config import Config
from flperf.data import WITHOUT_VIDEO, Dataset, open_dataset, prepare_dataset
from flperf.data.preprocessing import Preprocessing
from flperf.data.samplers import BatchShare, ClipBatch
from flperf.engine.devices import memory_gb
from flperf.engine.engine import build_engine
from flperf.engine.process import Process, batch_share, compute_dtype
from flperf.models.attention import attention_operator
from flperf.models.baselines import Baselines
from flperf.models.encoder import Encoder, build_encoder, encode_clip
from flperf.models.flops import count_parameters, encoder_flops, head_flops
from flperf.models.heads import build_head, use_initial_weights
from flperf.models.latents import LatentGeometry, Normaliser, Statistics, latent_geometry
from flperf.objectives.build import build_objective
from flperf.objectives.flow_matching import FlowMatching
from flperf.objectives.regression import Regression


@dataclass
class Run:
    config: Config
    process: Process
    share: BatchShare
    dtype: torch.dtype
    dataset: Dataset
    encoder: Encoder | None  # None where the dataset holds latents
    geometry: LatentGeometry
    objective: Regression | FlowMatching
    engine: deepspeed.DeepSpeedEngine | None  # the head in training; None in evaluation
    forecaster: nn.Module  # the same head, filled with averaged weights for evaluation
    normaliser: Normaliser | None = None  # both once the statistics are known
    baselines: Baselines | None = None

    def raw_latents(self, batch: ClipBatch) -> tuple[Tensor, Tensor]:
        """Context and target latents of a batch as the encoder (or the cache) gives them, `b t h w d`, on the
        device."""
        if batch.latents is not None:
            latents = batch.latents.to(self.process.device, non_blocking=True)
            split = self.geometry.context_frames
            return latents[:, :split], latents[:, split : split + self.geometry.target_frames]
        video = batch.video.to(self.process.device, non_blocking=True)
        return encode_clip(self.encoder, video, self.geometry, self.config.backbone.encode)

    @torch.no_grad()
    def latents(self, batch: ClipBatch) -> tuple[Tensor, Tensor]:
        """Normalised context and target latents in the compute dtype."""
        context, target = self.raw_latents(batch)
        return self.normaliser(context), self.normaliser(target)

    @torch.no_grad()
    def training_latents(self, batch: ClipBatch) -> tuple[Tensor, Tensor]:
        """Normalised context and raw target latents: the objective normalises the target as it reads it."""
        context, target = self.raw_latents(batch)
        return self.normaliser(context), target

    def use_statistics(self, statistics: Statistics, baselines: Baselines) -> None:
        self.normaliser = Normaliser(self.config.latents.embedding_norm, self.dtype, statistics)
        self.baselines = baselines


def build_run(config: Config, process: Process, *, training: bool = True) -> Run:
    """Data, encoder, head and, for training, the engine. Takes no step and writes nothing (but the demo's clips, if
    they are not there yet)."""
    dtype = compute_dtype(config.engine.precision, process.device)
    share = batch_share(config.trainer, process) if training else evaluation_share(config, process)
    if process.local_rank == 0:
        prepare_dataset(config)
    dist.barrier()
    preprocessing = None if config.dataset.kind in WITHOUT_VIDEO else Preprocessing.of(config.backbone)
    dataset = open_dataset(config, preprocessing, config.seed)
    encoder, shape = None, dataset.latent_shape
    if shape is None:
        encoder = build_encoder(
            config.backbone, preprocessing, dtype=dtype, device=process.device, compile=config.engine.compile
        )
        shape = encoder.latent_shape(config.dataset.n_frames)
    geometry = latent_geometry(config, *shape)
    objective = build_objective(config, geometry)
    new_head = partial(build_head, config.model, geometry, seed=config.seed, compile=config.engine.compile)
    forecaster = new_head().to(process.device).requires_grad_(False).eval()
    engine = None
    if training:
        head = new_head()
        if config.model.initial_weights:
            use_initial_weights(head, config.model.initial_weights)
        engine = build_engine(head, config, share, dtype, process.device)
    return Run(config, process, share, dtype, dataset, encoder, geometry, objective, engine, forecaster)


def evaluation_share(config: Config, process: Process) -> BatchShare:
    """No update is taken, so any number of processes will do."""
    batch_size = config.evaluation.batch_size or config.trainer.micro_batch_size or config.trainer.batch_size
    return BatchShare(process.rank, process.world_size, batch_size, batch_size * process.world_size)


def flops_per_clip(run: Run) -> dict[str, int]:
    """Forward FLOPs of the encoder, training FLOPs (three forward passes) of the head, for one clip."""
    encode = encoder_flops(run.encoder, run.geometry, run.config.backbone.encode) if run.encoder else 0
    return {
        "encoder": encode,
        "head": 3 * head_flops(run.forecaster, run.geometry, isinstance(run.objective, FlowMatching)),
    }


def describe(run: Run) -> str:
    """Sizes of a built run as text: clips, latents, parameters, FLOPs, memory."""
    config, geometry, flops = run.config, run.geometry, flops_per_clip(run)
    head_parameters = count_parameters(run.forecaster)
    share = run.share
    shared = {0: 1, 1: share.world_size, 2: share.world_size, 3: share.world_size}[config.engine.zero_stage]
    # bf16: weights and gradients of 2 bytes, then fp32 master weights, two moments and the moving average.
    compute_bytes = torch.finfo(run.dtype).bits // 8
    state = (2 * compute_bytes + (12 + 4 * (config.trainer.ema_decay is not None)) / shared) * head_parameters
    lines = [
        f"data      {config.dataset.kind}: {run.dataset.train_size} training clips, "
        f"{run.dataset.validation_size} validation clips",
        f"latents   {geometry.context_frames} context + {geometry.target_frames} target frames, "
        f"{geometry.height} x {geometry.width} x {geometry.dim} each",
    ]
    if run.encoder:
        lines.append(
            f"encoder   {config.backbone.kind}, {count_parameters(run.encoder) / 1e6:.1f} M parameters, frozen, "
            f"{run.dtype}"
        )
    lines += [
        f"head      {config.model.head}, {head_parameters / 1e6:.1f} M parameters",
        "attention "
        f"{attention_operator(config.model.hidden_dim // config.model.num_heads, run.dtype, run.process.device)}",
        f"batch     {share.batch_size} = {share.micro_batch_size} x {share.accumulation_steps} accumulation x "
        f"{share.world_size} processes",
        f"FLOPs     {flops['encoder'] / 1e9:.2f} G encoder + {flops['head'] / 1e9:.2f} G head a clip in training",
        f"memory    {state / 1e9:.3f} GB of model states a process at ZeRO {config.engine.zero_stage}; "
        f"{memory_gb(run.process.device):.2f} GB held now by this process, before activations",
    ]
    return "\n".join(lines)
