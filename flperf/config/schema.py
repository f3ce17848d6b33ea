"""The typed configuration: every key with its type, default and meaning."""

from dataclasses import dataclass, field
from typing import Any, Literal, Optional


@dataclass
class Backbone:
    """The frozen encoder. `weights` is a hub name, a folder or (4DS) an npz file; null initialises `architecture` with
    seeded random weights."""

    kind: str = "vjepa2"  # a key of flperf.models.backbones.BACKBONES
    weights: Optional[str] = None
    # keys of the transformers configuration (null: its default), or of FourDS
    architecture: dict[str, Any] = field(default_factory=dict)
    # replaces keys of the weights' preprocessor configuration
    processor: dict[str, Any] = field(default_factory=dict)
    frame_stride: int = 1  # DINOv3: every frame_stride-th frame is encoded
    # joint encodes the whole clip at once: V-JEPA 2 then leaks the future into the context
    encode: Literal["split", "joint"] = "split"


@dataclass
class Shapes:
    """Bouncing shapes: a square that bounces off the walls and a disk that moves on a circle. Lengths are in pixels,
    velocities in pixels per frame."""

    train_clips: int = 10_000
    validation_clips: int = 256
    visualisation_clips: int = 8  # a separate split for the pictures of an evaluation
    # of the canvas that the lengths below refer to; clips are drawn at the backbone's resolution
    image_size: int = 256
    square_size: int = 40
    square_init: Optional[list[float]] = None  # (x, y) of the centre; null: seeded random
    square_vel: Optional[list[float]] = None  # null: seeded random
    disk_radius: int = 20
    # from this frame on the frames are those of another clip, so that the context can't predict them; to detect leaks
    splice_at: Optional[int] = None


@dataclass
class Source:
    """One of several sources of training clips."""

    train: str = "???"  # as dataset.train
    weight: float = 1.0  # its share of the samples is weight / the sum of all weights


@dataclass
class Dataset:
    """The clips. Paths of CSV files are relative to the working directory, paths in a CSV to the CSV."""

    kind: str = "kinetics_400"  # a key of flperf.data.DATASETS
    train: Optional[str] = None
    sources: Optional[list[Source]] = None  # several files instead of `train`, mixed by weight
    validation: Optional[str] = None
    labels: Optional[str] = None
    out_path_column: str = "out_path"  # cached latents: the manifest's path column
    n_frames: int = 64
    stride: int = 2  # frames of the file from one frame of a clip to the next; not used if fps is set
    # frames a second of a clip, taken by the time at which they are shown; null: by stride
    fps: Optional[float] = None
    # a file shorter than the clip repeats its last frame (pad) or is left out (skip)
    short_clips: Literal["pad", "skip"] = "pad"
    start: Literal["first", "random", "center"] = "random"
    validation_start: Literal["first", "random", "center"] = "center"
    decoder: Literal["auto", "dali", "pyav"] = "auto"
    threads: Optional[int] = None  # clips that each process reads at a time; null: its share of the cores
    prefetch: int = 2  # batches read ahead; at least 2 * threads clips
    limit: Optional[int] = None  # use only the first clips of each split, and of each source
    shapes: Shapes = field(default_factory=Shapes)


@dataclass
class Latents:
    """Normalisation of the latents that a head reads and forecasts."""

    embedding_norm: Literal["none", "l1", "l2", "layer", "standardize"] = "standardize"
    statistics_clips: int = 256  # training clips for the channels' mean and standard deviation, measured once per run


@dataclass
class Model:
    """The head, a transformer. The width of the latents comes from the backbone."""

    head: str = "predictor"  # a key of flperf.models.heads.HEADS
    num_context_latents: int = 16  # latent frames (V-JEPA 2: 2 video frames each)
    num_target_latents: Optional[int] = None  # null: all after the context
    hidden_dim: int = 1024
    depth: int = 12
    num_heads: int = 8
    mlp_ratio: float = 4.0
    # safetensors file by parameter name, from export or import-weights; missing parameters start fresh
    initial_weights: Optional[str] = None
    positions: Literal["rope3d", "sincos", "none"] = "rope3d"
    # recomputes activations to save memory; selective: all but the matrix products
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    fused_kernels: bool = False  # on CUDA: backward passes between the products of a head in flperf's Triton kernels


@dataclass
class Objective:
    """The training objective. flow_matching predicts data - noise at x_tau = (1 - tau) noise + tau data."""

    kind: str = "regression"  # a key of flperf.objectives.build.OBJECTIVES
    loss: Literal["mse", "l1", "smooth_l1", "cosine"] = "mse"
    tau_distribution: Literal["uniform", "logit_normal"] = "uniform"
    tau_mean: float = 0.0  # of the logit, logit_normal only
    tau_std: float = 1.0
    tau_shift: Optional[float] = 1.0  # above 1: more noise; null: sqrt(n d / 4096), the dimension shift
    context_dropout: float = 0.0  # fraction of the clips trained without their context, for guidance


@dataclass
class Sampling:
    """How a flow-matching head forecasts during evaluation."""

    solver: Literal["euler", "midpoint", "heun", "dopri5"] = "euler"  # dopri5 has adaptive steps
    steps: int = 20
    shift: float = 1.0  # above 1: shorter steps near the noise
    tolerance: float = 1e-3  # of dopri5, relative and absolute
    samples: int = 4  # per clip; the forecast is their mean
    # classifier-free guidance, 1: none; above 1: needs a head trained with objective.context_dropout
    guidance: float = 1.0
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])  # of tau


@dataclass
class Trainer:
    """Optimisation. `batch_size` counts the clips of one update over all processes and accumulation steps."""

    batch_size: int = 32
    # clips in one forward pass on one process, at most; null: batch_size / processes
    micro_batch_size: Optional[int] = None
    max_steps: Optional[int] = None
    max_epochs: Optional[float] = None
    # stop with a checkpoint after this many steps of this launch; the schedule is unchanged
    stop_after: Optional[int] = None
    learning_rate: float = 3e-4
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    warmup_steps: int = 500
    schedule: Literal["cosine", "constant"] = "cosine"
    final_learning_rate: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: Optional[float] = 0.999
    max_skipped_updates: int = 20  # the run ends after this many non-finite updates in a row


@dataclass
class Engine:
    """How the work is distributed over devices and executed. It does not change what is learnt."""

    zero_stage: int = 1
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 if the device multiplies it faster
    compile: bool = True
    # seconds that a collective may take; a process without a heartbeat for a tenth of it counts as failed
    timeout: float = 600


@dataclass
class Evaluation:
    """When and how a run is evaluated. Intervals are in steps (`500`) or epochs (`1 epoch`)."""

    eval_every: str = "1 epoch"
    eval_first: bool = False
    max_clips: Optional[int] = 512
    batch_size: Optional[int] = None  # clips per process; null: the training micro-batch
    sampling: Sampling = field(default_factory=Sampling)
    dump_examples: int = 2  # clips whose tensors, videos and pictures are written at each evaluation
    probe_clips: int = 2000  # training clips on which `flperf evaluate` trains its linear probe


@dataclass
class Checkpoint:
    """When checkpoints are written (an interval in steps or epochs), and how many are kept."""

    save_every: str = "1 epoch"
    keep: int = 2


@dataclass
class Tracking:
    """How often metrics are logged (in steps), and where to."""

    log_every: int = 10
    wandb: Literal["auto", "offline", "none"] = "auto"  # auto: online if an API key is set, else offline
    project: str = "flperf"  # of W&B
    tensorboard: bool = False  # event files in the run's folder; needs `pip install tensorboard`


@dataclass
class Config:
    """The whole tree; each section is a dataclass above."""

    name: str = "???"  # the run's folder in `experiment`; by default the stem of the configuration file
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
