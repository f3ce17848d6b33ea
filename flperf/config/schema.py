"""The one typed configuration tree: every key, its type, its default and its meaning."""

from dataclasses import dataclass, field
from typing import Any, Literal, Optional


@dataclass
class Backbone:
    """The frozen encoder. `weights` is a hub name, a folder or (4DS) an npz file; null draws seeded random ones for
    `architecture`."""

    kind: str = "vjepa2"  # a key of flperf.models.backbones.BACKBONES
    weights: Optional[str] = None
    # of the transformers configuration (null: its default), or of FourDS
    architecture: dict[str, Any] = field(default_factory=dict)
    # keys that replace those of the weights' preprocessor configuration
    processor: dict[str, Any] = field(default_factory=dict)
    frame_stride: int = 1  # DINOv3: every frame_stride-th frame is encoded
    # joint encodes the whole clip at once: V-JEPA 2 then leaks the future into the context
    encode: Literal["split", "joint"] = "split"


@dataclass
class Shapes:
    """Bouncing shapes: a square that bounces off the walls and a disk on a circle. Lengths in pixels, velocities in
    pixels a frame."""

    train_clips: int = 10_000
    validation_clips: int = 256
    visualisation_clips: int = 8  # a split of its own, of which dumps show the first
    # of the canvas that the lengths below refer to; clips are drawn at the resolution of the backbone
    image_size: int = 256
    square_size: int = 40
    square_init: Optional[list[float]] = None  # (x, y) of the centre; null: seeded random
    square_vel: Optional[list[float]] = None  # null: seeded random
    disk_radius: int = 20
    # from this frame on another clip goes on, so that nothing tells what follows; to show leaks
    splice_at: Optional[int] = None


@dataclass
class Dataset:
    """Where clips come from. CSV paths are relative to the working directory, the paths inside a CSV to the CSV."""

    kind: str = "kinetics_400"  # a key of flperf.data.DATASETS
    train: Optional[str] = None
    validation: Optional[str] = None
    labels: Optional[str] = None
    out_path_column: str = "out_path"  # cached latents: the manifest's path column
    n_frames: int = 64
    stride: int = 2
    start: Literal["first", "random", "center"] = "random"
    validation_start: Literal["first", "random", "center"] = "center"
    decoder: Literal["auto", "dali", "pyav"] = "auto"
    threads: Optional[int] = None  # decoding threads a process; null: its share of the cores
    prefetch: int = 2  # batches decoded ahead, and at least two clips for every thread
    limit: Optional[int] = None  # only the first clips of each split
    shapes: Shapes = field(default_factory=Shapes)


@dataclass
class Latents:
    """Normalisation of the latents before they reach a head."""

    embedding_norm: Literal["none", "l1", "l2", "layer", "standardize"] = "standardize"
    statistics_clips: int = 256  # training clips from which mean and standard deviation are measured, once a run


@dataclass
class Model:
    """The head. Sizes are those of the transformer; the latents' width comes from the backbone."""

    head: str = "predictor"  # a key of flperf.models.heads.HEADS
    num_context_latents: int = 16  # latent frames (V-JEPA 2: 2 video frames each)
    num_target_latents: Optional[int] = None  # null: all that follow the context
    hidden_dim: int = 1024
    depth: int = 12
    num_heads: int = 8
    mlp_ratio: float = 4.0
    # safetensors by parameter name (an export's, or import-weights'); what it lacks starts fresh
    initial_weights: Optional[str] = None
    positions: Literal["rope3d", "sincos", "none"] = "rope3d"
    # less memory; selective: no product is computed again
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    fused_adaln: bool = False  # DiT on CUDA: gated residual, norm and modulation as one Triton kernel each way


@dataclass
class Objective:
    """What a head is trained for. flow_matching predicts data - noise at x_tau = (1 - tau) noise + tau data."""

    kind: str = "regression"  # a key of flperf.objectives.build.OBJECTIVES
    loss: Literal["mse", "l1", "smooth_l1", "cosine"] = "mse"
    tau_distribution: Literal["uniform", "logit_normal"] = "uniform"
    tau_mean: float = 0.0  # of the logit, logit_normal only
    tau_std: float = 1.0
    tau_shift: Optional[float] = 1.0  # above 1: more noise; null: sqrt(n d / 4096), the dimension shift
    context_dropout: float = 0.0  # share of the clips trained without their context, for guidance


@dataclass
class Sampling:
    """How a flow-matching head forecasts during evaluation."""

    solver: Literal["euler", "midpoint", "heun", "dopri5"] = "euler"  # dopri5 chooses its own steps
    steps: int = 20
    shift: float = 1.0  # above 1: shorter steps near the noise
    tolerance: float = 1e-3  # relative and absolute, of dopri5
    samples: int = 4  # drawn for each clip; the forecast is their mean
    # above 1: further away from what is likely without the context; needs objective.context_dropout in training
    guidance: float = 1.0
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])  # of tau


@dataclass
class Trainer:
    """Optimisation. `batch_size` counts the clips of one update over all processes and accumulation steps."""

    batch_size: int = 32
    # at most so many clips in one forward pass on one process; null: batch_size / processes
    micro_batch_size: Optional[int] = None
    max_steps: Optional[int] = None
    max_epochs: Optional[float] = None
    # leave after this many steps of this launch, with a checkpoint; the schedule is unchanged
    stop_after: Optional[int] = None
    learning_rate: float = 3e-4
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    warmup_steps: int = 500
    schedule: Literal["cosine", "constant"] = "cosine"
    final_learning_rate: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: Optional[float] = 0.999
    max_skipped_updates: int = 20  # non-finite updates in a row that end the run


@dataclass
class Engine:
    """How the work is laid out over devices; none of it changes what is learnt."""

    zero_stage: int = 1
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the device multiplies it faster
    compile: bool = True
    # seconds a collective may take (cold compilation, first decode); a process silent for a tenth of it is lost
    timeout: float = 600


@dataclass
class Evaluation:
    """Cadences are steps (`500`) or epochs (`1 epoch`)."""

    eval_every: str = "1 epoch"
    eval_first: bool = False
    max_clips: Optional[int] = 512
    batch_size: Optional[int] = None  # clips a process; null: the training micro-batch
    sampling: Sampling = field(default_factory=Sampling)
    dump_examples: int = 2  # clips of which tensors, videos and a picture are written at every evaluation
    probe_clips: int = 2000  # training clips on which `flperf evaluate` trains its linear probe


@dataclass
class Checkpoint:
    """When checkpoints are written (steps or epochs), and how many are kept."""

    save_every: str = "1 epoch"
    keep: int = 2


@dataclass
class Tracking:
    """What is logged, how often (in steps), and where to."""

    log_every: int = 10
    wandb: Literal["auto", "offline", "none"] = "auto"  # auto: online where a key is set, else offline
    project: str = "flperf"  # of W&B
    tensorboard: bool = False  # event files in the run's folder; needs `pip install tensorboard`


@dataclass
class Config:
    """The whole tree; every section is a dataclass above."""

    name: str = "???"  # the run's folder under `experiment`; the configuration file's stem unless set
    experiment: str = "experiment"
    seed: int = 0
    backbone: Backbone = field(default_factory=Backbone)
    dataset: Dataset = field(default_factory=Dataset)
    latents: Latents = field(default_factory=Latents)
    model: Model = field(default_factory=Model)
    objective: Objective = field(default_factory=Objective)
    trainer: Trainer = field(default_factory=Trainer)
    engine: Engine = field(default_factory=Engine)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    tracking: Tracking = field(default_factory=Tracking)
