"""The sizes that benchmarks run at: the reference size on a GPU, a small one on a CPU. Weights are random, so that
nothing is downloaded."""

import torch

from flperf.config import Config, load_config
from flperf.data.preprocessing import Preprocessing
from flperf.engine.process import compute_dtype
from flperf.models.compile import compile_forward
from flperf.models.encoder import Encoder, PixelNormalisation, build_encoder
from flperf.models.heads import build_head
from flperf.models.latents import LatentGeometry, latent_geometry

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
DTYPE = compute_dtype("auto", DEVICE)
BATCH = 8 if ON_GPU else 4

HEADS = {
    "predictor": ["model.head=predictor"],
    "cross_attention": ["model.head=cross_attention"],
    "dit": ["model.head=dit", "objective.kind=flow_matching"],
}
BACKBONES = ("vjepa2", "dinov3", "4ds")
REFERENCE = {
    "frames": 64,
    "vjepa2": {},  # transformers' default is ViT-L at 256
    "dinov3": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "image_size": 224,
    },
    "4ds": {"size": "L", "image_size": 224},
    "model": ["model.hidden_dim=1024", "model.depth=12", "model.num_heads=8", "model.num_context_latents=16"],
}
SMALL = {
    "frames": 16,
    "vjepa2": {"crop_size": 96, "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3},
    "dinov3": {
        "image_size": 96,
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "intermediate_size": 768,
    },
    "4ds": {
        "image_size": 96,
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "intermediate_size": 768,
    },
    "model": ["model.hidden_dim=256", "model.depth=4", "model.num_heads=4", "model.num_context_latents=4"],
}
MIDDLE = {
    "frames": 16,
    "vjepa2": {"crop_size": 128, "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
    "model": ["model.hidden_dim=384", "model.depth=6", "model.num_heads=6", "model.num_context_latents=4"],
}
SIZE, STEP_SIZE = (REFERENCE, REFERENCE) if ON_GPU else (SMALL, MIDDLE)
TOY = {
    "frames": 8,
    "vjepa2": {"crop_size": 32, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    "dinov3": {
        "image_size": 32,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 96,
    },
    "4ds": {
        "image_size": 32,
        "hidden_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 96,
    },
    "model": ["model.hidden_dim=48", "model.depth=2", "model.num_heads=2", "model.num_context_latents=2"],
}
QUICK = False
DEMO = "configs/demo.yaml"


def be_quick() -> None:
    """Switch to toy sizes. Call it before the benchmarks are imported."""
    global SIZE, STEP_SIZE, BATCH, QUICK
    SIZE, STEP_SIZE, BATCH, QUICK = TOY, TOY, 2, True


def configuration(
    head: str = "predictor", backbone: str = "vjepa2", *overrides: str, size: dict | None = None
) -> Config:
    """A run on drawn clips, with a backbone with random weights and a head, at this device's size."""
    size = size or SIZE
    # Merging replaces the demo's backbone key by key, so keys that this size does not set are reset to null.
    defaults = {key: "null" for key in ("crop_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    architecture = [f"backbone.architecture.{key}={value}" for key, value in (defaults | size[backbone]).items()]
    stride = ["backbone.frame_stride=4" if ON_GPU else "backbone.frame_stride=2"] if backbone == "dinov3" else []
    common = ["dataset.kind=bouncing_shapes", f"dataset.n_frames={size['frames']}", f"trainer.batch_size={BATCH}"]
    kind = ["objective.kind=regression", *HEADS[head]]
    return load_config(
        DEMO, [*common, f"backbone.kind={backbone}", *architecture, *stride, *size["model"], *kind, *overrides]
    )


def encoder_of(config: Config, dtype: torch.dtype, compile: bool) -> Encoder:
    return build_encoder(
        config.backbone, Preprocessing.of(config.backbone), dtype=dtype, device=DEVICE, compile=compile
    )


def compiled_normalisation(preprocessing: Preprocessing, dtype: torch.dtype) -> PixelNormalisation:
    """The encoder's first step alone, compiled as in the encoder, on the CPU."""
    normalise = PixelNormalisation(preprocessing, dtype)
    compile_forward(normalise, "pixel normalisation")
    return normalise


def geometry_of(config: Config, encoder: Encoder) -> LatentGeometry:
    return latent_geometry(config, *encoder.latent_shape(config.dataset.n_frames))


def head_of(config: Config, geometry: LatentGeometry, dtype: torch.dtype, compile: bool) -> torch.nn.Module:
    head = build_head(config.model, geometry, seed=0, compile=compile).to(DEVICE)
    for parameter in head.parameters():  # tables (buffers) stay fp32
        parameter.data = parameter.data.to(dtype)
    return head


def video_of(config: Config) -> torch.Tensor:
    height, width = Preprocessing.of(config.backbone).size
    return torch.randint(0, 256, (BATCH, config.dataset.n_frames, height, width, 3), dtype=torch.uint8, device=DEVICE)


def latents_of(geometry: LatentGeometry, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Random context and target latents, `b t h w d` each."""
    grid = (geometry.height, geometry.width, geometry.dim)
    shapes = ((BATCH, frames, *grid) for frames in (geometry.context_frames, geometry.target_frames))
    context, target = (torch.randn(shape, device=DEVICE, dtype=dtype) for shape in shapes)
    return context, target
