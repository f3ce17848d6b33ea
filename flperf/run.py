"""Builds the parts of a run from its configuration, in the order in which data flows.

Components    data, encoder, objective, head: built from the configuration alone
Run           the components and the statistics of their latents: ready to forecast
TrainingRun   a run and the engine that trains its head
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from flperf.config import Config
from flperf.data import WITHOUT_VIDEO, Dataset, open_dataset, prepare_dataset
from flperf.data.preprocessing import Preprocessing
from flperf.data.samplers import BatchShare, ClipBatch
from flperf.engine.engine import build_engine
from flperf.engine.process import Process, compute_dtype
from flperf.models.baselines import Baselines
from flperf.models.encoder import Encoder, build_encoder, encode_clip
from flperf.models.flops import encoder_flops, head_flops
from flperf.models.heads import build_head, use_initial_weights
from flperf.models.latents import LatentGeometry, Normaliser, Statistics, latent_geometry
from flperf.objectives.build import build_objective
from flperf.objectives.flow_matching import FlowMatching
from flperf.objectives.regression import Regression


@dataclass
class Components:
    """Everything that is built from the configuration alone."""

    config: Config
    process: Process
    share: BatchShare
    dtype: torch.dtype  # compute dtype of encoder and head
    dataset: Dataset
    encoder: Encoder | None  # None if the dataset contains latents
    geometry: LatentGeometry
    objective: Regression | FlowMatching
    forecaster: nn.Module  # a head for evaluation, which trained weights are loaded into

    def raw_latents(self, batch: ClipBatch) -> tuple[Tensor, Tensor]:
        """Context and target latents of a batch, `b t h w d`, on the device and not normalised."""
        if self.encoder is None:
            latents = batch.latents.to(self.process.device)
            split = self.geometry.context_frames
            return latents[:, :split], latents[:, split : split + self.geometry.target_frames]
        video = batch.video.to(self.process.device)
        return encode_clip(self.encoder, video, self.geometry, self.config.backbone.encode)

    def with_statistics(self, statistics: Statistics, baselines: Baselines) -> "Run":
        """The run of these components; the statistics are on its device."""
        normaliser = Normaliser(self.config.latents.embedding_norm, self.dtype, statistics)
        return Run(**vars(self), normaliser=normaliser, baselines=baselines)


@dataclass
class Run(Components):
    """Everything that an evaluation needs."""

    normaliser: Normaliser
    baselines: Baselines

    @torch.no_grad()
    def latents(self, batch: ClipBatch) -> tuple[Tensor, Tensor]:
        """Normalised context and target latents of a batch, `b t h w d` in the compute dtype."""
        context, target = self.raw_latents(batch)
        return self.normaliser(context), self.normaliser(target)


@dataclass
class TrainingRun(Run):
    """Everything that training needs."""

    engine: DeepSpeedEngine

    @torch.no_grad()
    def training_latents(self, batch: ClipBatch) -> tuple[Tensor, Tensor]:
        """Normalised context latents and raw target latents, `b t h w d`. The objective normalises the target as it
        reads it."""
        context, target = self.raw_latents(batch)
        return self.normaliser(context), target


def build_components(config: Config, process: Process, share: BatchShare) -> Components:
    """Read the annotations and build encoder, objective and head. Writes no files except the demo's clips, if they do
    not exist. A collective."""
    dtype = compute_dtype(config.engine.precision, process.device)
    if process.local_rank == 0:
        prepare_dataset(config)
    dist.barrier()
    preprocessing = None if config.dataset.kind in WITHOUT_VIDEO else Preprocessing.of(config.backbone)
    dataset = open_dataset(config, preprocessing, config.seed)
    encoder, shape = None, dataset.latent_shape
    if shape is None:
        assert preprocessing is not None  # a dataset without latents contains video
        encoder = build_encoder(
            config.backbone, preprocessing, dtype=dtype, device=process.device, compile=config.engine.compile
        )
        shape = encoder.latent_shape(config.dataset.n_frames)
    geometry = latent_geometry(config, *shape)
    objective = build_objective(config, geometry)
    forecaster = _new_head(config, geometry).to(process.device).requires_grad_(False).eval()
    return Components(config, process, share, dtype, dataset, encoder, geometry, objective, forecaster)


def build_training_engine(components: Components) -> DeepSpeedEngine:
    """The engine of the head that is trained, with the configured initial weights."""
    config = components.config
    head = _new_head(config, components.geometry)
    if config.model.initial_weights:
        use_initial_weights(head, config.model.initial_weights)
    return build_engine(head, config, components.share, components.dtype, components.process.device)


def _new_head(config: Config, geometry: LatentGeometry) -> nn.Module:
    return build_head(config.model, geometry, seed=config.seed, compile=config.engine.compile)


def evaluation_share(config: Config, process: Process) -> BatchShare:
    """The share of a process where no update is taken: any number of processes is possible."""
    batch_size = config.evaluation.batch_size or config.trainer.micro_batch_size or config.trainer.batch_size
    return BatchShare(process.rank, process.world_size, batch_size, batch_size * process.world_size)


def flops_per_clip(components: Components) -> dict[str, int]:
    """FLOPs for one clip in training: the encoder's forward pass, and three forward passes of the head (forward and
    backward)."""
    encoder, geometry = components.encoder, components.geometry
    flow_matching = isinstance(components.objective, FlowMatching)
    return {
        "encoder": encoder_flops(encoder, geometry, components.config.backbone.encode) if encoder else 0,
        "head": 3 * head_flops(components.forecaster, geometry, flow_matching),
    }
