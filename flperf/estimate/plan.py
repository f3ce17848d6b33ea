"""What a run would need and how fast it might be on devices that are not here, as numbers; `flperf estimate` prints
them.

Models are built without weights, their FLOPs and bytes counted, and the table of devices and the constants below say
what time they take. Weights of no kind are read or fetched.
"""

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
from flperf.estimate.zero import MASTER, States, collectives, model_states
from flperf.models.encoder import Encoder
from flperf.models.flops import count_parameters, encoder_flops, head_flops
from flperf.models.heads import build_head
from flperf.models.latents import LatentGeometry, latent_geometry
from flperf.objectives.build import build_objective
from flperf.objectives.flow_matching import FlowMatching

# What is assumed of every device: shares of its peaks that a run reaches.
COMPUTE_EFFICIENCY, MEMORY_EFFICIENCY, NETWORK_EFFICIENCY = 0.5, 0.8, 0.8
# What is assumed of the videos, where they are files: Kinetics-400 as it is mostly passed on, with x264's default
# distance of keyframes.
SOURCE_SIZE, KEYFRAME_INTERVAL = (256, 340), 250
STATED_SIZE = (1080, 1920)  # for which decoders' rates are stated
SMALLEST_PICTURE = 0.25  # of the time of a stated picture, which even a small one takes
CACHED = 2  # bytes of a cached latent's element, bf16
# Sizes of hub checkpoints, so that none need be there: keys of `backbone.architecture`.
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
    """What one process has to do for one micro-batch. FLOPs are those of one clip."""

    config: Config
    share: BatchShare
    dtype: torch.dtype
    geometry: LatentGeometry
    encoder_parameters: int
    head_parameters: int
    encoder_flops: int  # 0, as its bytes, where latents are cached
    head_flops: int  # forward
    clip_bytes: int  # of a clip as it is loaded: 8-bit video, or cached latents
    encoding: PassCost
    training: dict[str, PassCost]  # by model.activation_checkpointing

    @property
    def flops(self) -> float:
        """A clip's, in training. The backward pass multiplies twice for each product, once more where whole blocks
        are computed again."""
        return self.encoder_flops + self.head_flops * (4 if self.config.model.activation_checkpointing == "full" else 3)

    @property
    def clips(self) -> int:
        """Of one process in one update."""
        return self.share.micro_batch_size * self.share.accumulation_steps

    @property
    def moved(self) -> float:
        """Bytes that one update reads and writes, the optimizer apart."""
        passes = self.encoding, self.training[self.config.model.activation_checkpointing]
        return self.share.accumulation_steps * sum(
            cost.fused if self.config.engine.compile else cost.eager for cost in passes
        )

    @property
    def frames(self) -> int:
        """Decoded for a clip: its own span, and from the keyframe before it where it starts anywhere. 0 where there
        are no files."""
        dataset = self.config.dataset
        if dataset.kind in WITHOUT_VIDEO or dataset.kind == "bouncing_shapes":
            return 0
        return (dataset.n_frames - 1) * dataset.stride + 1 + (0 if dataset.start == "first" else KEYFRAME_INTERVAL // 2)

    def states(self, stage: int, processes: int, device: Device) -> States:
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
    """In which a run would compute there."""
    precision = config.engine.precision
    if device.is_gpu and precision == "auto":
        precision = "bf16"
    dtype = compute_dtype(precision, torch.device("cpu"))
    if dtype not in device.peaks:
        raise UserError("engine.precision: the table of devices holds bf16 peaks only; set it to bf16 or auto")
    return dtype


def plan(config: Config, dtype: torch.dtype, processes: int) -> Workload:
    """Build everything on the meta device and count. Raises `UserError` where sizes can't be had or the batch can't
    be shared out."""
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
    latent_bytes = (geometry.context_tokens + geometry.target_tokens) * geometry.dim * CACHED
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
    """The same sizes, without a hub name or a file of weights; a local folder has a configuration beside them, so it
    stays."""
    if backbone.weights is None or Path(backbone.weights).is_dir():
        return backbone
    if backbone.kind == "4ds":
        return replace(backbone, weights=None)
    if backbone.weights not in CHECKPOINTS:
        raise UserError(
            f"backbone.weights: the sizes of {backbone.weights!r} are not known here (known: "
            f"{', '.join(CHECKPOINTS)}); "
            "set it to a folder with its config.json and preprocessor configuration, or to null with "
            "backbone.architecture"
        )
    return replace(backbone, weights=None, architecture=CHECKPOINTS[backbone.weights])


@dataclass(frozen=True)
class Memory:
    """Bytes that one process holds at most. The head's copy for evaluation is fp32 until the first one."""

    states: States
    encoder: float
    copy: float
    clips: float
    activations: dict[str, float]  # by model.activation_checkpointing; at least what encoding takes, which comes before

    def total(self, mode: str) -> float:
        return self.states.total + self.encoder + self.copy + self.clips + self.activations[mode]


def memory(workload: Workload, device: Device, stage: int, processes: int) -> Memory:
    loaded = workload.config.dataset.prefetch * workload.share.micro_batch_size * workload.clip_bytes
    return Memory(
        workload.states(stage, processes, device),
        encoder=workload.encoder_parameters * workload.dtype.itemsize,
        copy=workload.head_parameters * MASTER,
        clips=loaded,
        activations={mode: max(workload.encoding.peak, cost.peak) for mode, cost in workload.training.items()},
    )


@dataclass(frozen=True)
class Step:
    """Seconds of one update by what bounds it."""

    arithmetic: float
    memory: float
    hidden: float  # collectives sent while something is computed
    exposed: float  # the other ones
    decode: float
    clips: int  # of all processes

    @property
    def seconds(self) -> float:
        """The largest bound; collectives that nothing hides come on top of what they wait for."""
        return max(max(self.arithmetic, self.memory, self.hidden) + self.exposed, self.decode)

    @property
    def bound(self) -> str:
        collective = self.hidden + self.exposed
        bounds = {
            "arithmetic": self.arithmetic,
            "memory": self.memory,
            "collectives": collective,
            "decode": self.decode,
        }
        return max(bounds, key=bounds.get)

    @property
    def efficiency(self) -> float:
        """Of the speed that as many processes would have without collectives."""
        return max(self.arithmetic, self.memory, self.decode) / self.seconds


def step(workload: Workload, device: Device, stage: int, nodes: int, per_node: int) -> Step:
    processes = nodes * per_node
    states = workload.states(stage, processes, device)
    updated = 2 * states.optimizer + states.gradients + states.weights  # optimizer states are read and written
    seconds = {hidden: 0.0 for hidden in (True, False)}
    for collective in collectives(
        workload.head_parameters, stage, workload.dtype.itemsize, workload.share.accumulation_steps
    ):
        if processes > 1:
            seconds[collective.hidden] += collective.sent(processes) / ring_rate(device, nodes, per_node)
    return Step(
        arithmetic=workload.clips * workload.flops / (COMPUTE_EFFICIENCY * device.peaks[workload.dtype]),
        memory=(workload.moved + updated) / (MEMORY_EFFICIENCY * device.bandwidth),
        hidden=seconds[True],
        exposed=seconds[False],
        decode=workload.clips * workload.frames / decode_rate(device) if device.decode_rate else 0.0,
        clips=workload.clips * processes,
    )


def ring_rate(device: Device, nodes: int, per_node: int) -> float:
    """Bytes/s that a process sends in a ring through all: as fast as the slowest link, where a node leaves by all its
    adapters at once."""
    return NETWORK_EFFICIENCY * (device.link if nodes == 1 else min(device.link, per_node * device.network))


def decode_rate(device: Device) -> float:
    """Frames of `SOURCE_SIZE` a second."""
    share = SOURCE_SIZE[0] * SOURCE_SIZE[1] / (STATED_SIZE[0] * STATED_SIZE[1])
    return device.decode_rate / max(share, SMALLEST_PICTURE)
