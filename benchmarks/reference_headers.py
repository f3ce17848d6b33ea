"""Writes a header to each reference configuration: its command, requirements and sizes.

    python -m benchmarks.reference_headers

Models are built on the meta device, so neither download nor GPU is needed. Memory is estimated, not measured.
"""

from pathlib import Path

import torch

from benchmarks.sizes import REFERENCE
from flperf.config import Config, load_config
from flperf.data.preprocessing import Preprocessing
from flperf.estimate.zero import model_states
from flperf.models.encoder import Encoder
from flperf.models.flops import count_parameters, encoder_flops, head_flops
from flperf.models.heads import build_head
from flperf.models.latents import latent_geometry

FOLDER = Path(__file__).parents[1] / "configs/references"
PROCESSES, BF16 = 8, 2
NEEDS = {
    "vjepa2": "facebook/vjepa2-vitl-fpc64-256 from the hub",
    "dinov3": "facebook/dinov3-vitl16-pretrain-lvd1689m from the hub (accept its licence there)",
    "4ds": "scaling4d_dist_b.npz in data/weights",
    "kinetics_400": "Kinetics-400 (see docs/guide.md)",
    "kinetics_400_cached": "latents of Kinetics-400 from `flperf encode`; the encoder does not run",
    "bouncing_shapes": "no data: clips are drawn",
}


def without_weights(config: Config) -> Config:
    """The same architecture with random weights, in place."""
    if config.backbone.kind != "4ds":
        config.backbone.architecture = dict(REFERENCE[config.backbone.kind])
    config.backbone.weights = None
    return config


def header(file: Path) -> str:
    """The header of a configuration file, as comment lines."""
    config = without_weights(load_config(file))
    cached = config.dataset.kind == "kinetics_400_cached"
    with torch.device("meta"):
        encoder = Encoder(config.backbone, Preprocessing.of(config.backbone), torch.float32)
        geometry = latent_geometry(config, *encoder.latent_shape(config.dataset.n_frames))
        head = build_head(config.model, geometry, seed=0, compile=False)
    parameters, flow_matching = count_parameters(head), config.objective.kind == "flow_matching"
    frozen = 0 if cached else count_parameters(encoder)
    flops = [
        3 * head_flops(head, geometry, flow_matching),
        0 if cached else encoder_flops(encoder, geometry, config.backbone.encode),
    ]
    states = model_states(
        parameters, config.engine.zero_stage, PROCESSES, BF16, average=config.trainer.ema_decay is not None
    )
    needs = [NEEDS[config.dataset.kind]] + ([] if cached else [NEEDS[config.backbone.kind]])
    total = (states.total + BF16 * frozen) / 1e9
    estimate = f"estimated for bf16, ZeRO {config.engine.zero_stage}, {PROCESSES} GPUs; see `flperf train --dry-run`"
    lines = [
        f"deepspeed flperf/train.py --config configs/references/{file.name}",
        f"needs       {'; '.join(needs)}",
        f"parameters  {parameters:,} in the head" + (f", {frozen:,} in the frozen encoder" if frozen else ""),
        f"FLOPs       per training clip: {flops[0] / 1e12:.2f} T in the head"
        + (f" + {flops[1] / 1e12:.2f} T in the encoder" if frozen else ""),
        f"memory      {total:.1f} GB per GPU without activations ({estimate})",
    ]
    return "".join(f"# {line}\n" for line in lines)


def body(text: str) -> str:
    """The text of a file without the comment lines at its start."""
    lines = text.splitlines(keepends=True)
    while lines and lines[0].startswith("#"):
        lines.pop(0)
    return "".join(lines)


def main() -> None:
    for file in sorted(FOLDER.glob("*.yaml")):
        file.write_text(header(file) + body(file.read_text()))
        print(file.name)


if __name__ == "__main__":
    main()
