"""Counts the work of a run, one micro-batch of one process, without executing it.

Models are built on the meta device, so that no weights are read or downloaded. `step_time` and `memory` turn these
counts into estimates for a device.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args, get_type_hints

import torch

from flperf.config import Backbone, Config, Model
from flperf.data import WITHOUT_VIDEO
from flperf.data.preprocessing import Preprocessing
from flperf.data.samplers import BatchShare
from flperf.engine.devices import Device
from flperf.engine.process import Process, batch_share, compute_dtype
from flperf.errors import UserError
from flperf.estimate.pass_cost import PassCost, encoding_cost, training_cost
from flperf.estimate.zero import States, model_states
from flperf.models.encoder import Encoder
from flperf.models.flops import count_parameters, encoder_flops, head_flops
from flperf.models.heads import build_head
from flperf.models.latents import LatentGeometry, latent_geometry
from flperf.objectives.build import build_objective
from flperf.objectives.flow_matching import FlowMatching

KEYFRAME_INTERVAL = 250  # frames; assumed of all video files, x264's default
FRAME_RATE = 30  # frames a second; assumed of all video files where `dataset.fps` takes frames by time
CACHED_BYTES = 2  # of an element of cached latents, bf16
# Sizes of checkpoints on the hub, so that they need not be downloaded: keys of `backbone.architecture`.
CHECKPOINTS = {
    "facebook/vjepa2-vitl-fpc64-256": {
        "crop_size": 256,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "facebook/vjepa2-vith-fpc64-256": {
        "crop_size": 256,
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
    },
    "facebook/dinov3-vitl16-pretrain-lvd1689m": {
        **{"image_size": 224, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
        **{"intermediate_size": 4096, "num_register_tokens": 4},
    },
}


@dataclass(frozen=True)
class Workload:
    """The work of one process. FLOPs are for one clip, pass costs for one micro-batch."""

    config: Config
    share: BatchShare
    dtype: torch.dtype
    geometry: LatentGeometry
    encoder_parameters: int
    head_parameters: int
    encoder_flops: int  # 0 if latents are cached, like encoder_parameters and the cost of encoding
    head_flops: int  # of the forward pass
    clip_bytes: int  # of a loaded clip: 8-bit video, or cached latents
    encoding: PassCost
    training: dict[str, PassCost]  # by model.activation_checkpointing

    @property
    def flops(self) -> float:
        """FLOPs of one clip in training. The backward pass has twice those of the forward pass. Full activation
        checkpointing repeats the forward pass."""
        return self.encoder_flops + self.head_flops * (4 if self.config.model.activation_checkpointing == "full" else 3)

    @property
    def clips(self) -> int:
        """Clips of one process in one update."""
        return self.share.micro_batch_size * self.share.accumulation_steps

    @property
    def memory_traffic(self) -> float:
        """Bytes that one update reads and writes in memory, without the optimizer."""
        passes = self.encoding, self.training[self.config.model.activation_checkpointing]
        return self.share.accumulation_steps * sum(
            cost.fused if self.config.engine.compile else cost.eager for cost in passes
        )

    @property
    def frames(self) -> int:
        """Frames that are decoded for a clip: its span, and with a random start those since the last keyframe. 0 if
        there are no video files."""
        dataset = self.config.dataset
        if dataset.kind in WITHOUT_VIDEO or dataset.kind == "bouncing_shapes":
            return 0
        apart = FRAME_RATE / dataset.fps if dataset.fps else dataset.stride
        span = math.floor((dataset.n_frames - 1) * apart) + 1
        return span + (0 if dataset.start == "first" else KEYFRAME_INTERVAL // 2)

    def states(self, stage: int, processes: int, device: Device) -> States:
        """Bytes of model states on each process at a ZeRO stage."""
        return model_states(
            self.head_parameters,
            stage,
            processes,
            self.dtype.itemsize,
            average=self.config.trainer.ema_decay is not None,
            accumulates=self.share.accumulation_steps > 1,
            overlaps=device.is_gpu,
        )


def dtype_on(device: Device, config: Config) -> torch.dtype:
    """The compute dtype of a run on `device`. Raises `UserError` if the table of devices has no peak for it."""
    precision = config.engine.precision
    if device.is_gpu and precision == "auto":
        precision = "bf16"
    dtype = compute_dtype(precision, torch.device("cpu"))
    if dtype not in device.peaks:
        raise UserError("engine.precision: the table of devices holds bf16 peaks only; set it to bf16 or auto")
    return dtype


def build_workload(config: Config, dtype: torch.dtype, processes: int) -> Workload:
    """Build encoder and head on the meta device and count their work. Raises `UserError` if the encoder's sizes are
    unknown or the batch cannot be divided among the processes."""
    share = batch_share(config.trainer, Process(0, 0, processes, torch.device("cpu")))
    backbone = backbone_without_weights(config.backbone)
    preprocessing, encoded = Preprocessing.of(backbone), config.dataset.kind not in WITHOUT_VIDEO
    with torch.device("meta"):
        encoder = Encoder(backbone, preprocessing, dtype)
        geometry = latent_geometry(config, *encoder.latent_shape(config.dataset.n_frames))
        heads = {
            mode: build_head(
                replace(config.model, activation_checkpointing=mode), geometry, seed=config.seed, compile=False
            )
            for mode in get_args(get_type_hints(Model)["activation_checkpointing"])
        }
    flow_matching = isinstance(build_objective(config, geometry), FlowMatching)
    micro = share.micro_batch_size
    height, width = preprocessing.size
    latent_bytes = (geometry.context_tokens + geometry.target_tokens) * geometry.dim * CACHED_BYTES
    return Workload(
        config,
        share,
        dtype,
        geometry,
        encoder_parameters=count_parameters(encoder) if encoded else 0,
        head_parameters=count_parameters(heads["none"]),
        encoder_flops=encoder_flops(encoder, geometry, backbone.encode) if encoded else 0,
        head_flops=head_flops(heads["none"], geometry, flow_matching),
        clip_bytes=config.dataset.n_frames * height * width * 3 if encoded else latent_bytes,
        encoding=encoding_cost(encoder, geometry, backbone.encode, micro, dtype) if encoded else PassCost(0, 0, 0),
        training={mode: training_cost(head, geometry, micro, dtype, flow_matching) for mode, head in heads.items()},
    )


def backbone_without_weights(backbone: Backbone) -> Backbone:
    """The same sizes, without weights from the hub or from a file. A local folder is kept, because it has a
    configuration beside the weights."""
    if backbone.weights is None or Path(backbone.weights).is_dir():
        return backbone
    if backbone.kind == "4ds":
        return replace(backbone, weights=None)
    if backbone.weights not in CHECKPOINTS:
        raise UserError(
            f"backbone.weights: the sizes of {backbone.weights!r} are not known here "
            f"(known: {', '.join(CHECKPOINTS)}); set it to a folder with its config.json and preprocessor "
            "configuration, or to null with backbone.architecture"
        )
    return replace(backbone, weights=None, architecture=CHECKPOINTS[backbone.weights])
