"""The FLOPs behind MFU and estimates, compared with those that PyTorch counts in real passes."""

import pytest
import torch
from runs import BACKBONES, FOUR_DS, REGIMES, ROOT, TINY
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop

from flperf.config import Model, load_config, parse_config
from flperf.data.preprocessing import Preprocessing
from flperf.engine.process import batch_share, start_process
from flperf.estimate.workload import backbone_without_weights
from flperf.models.encoder import Encoder, build_encoder, encode_clip
from flperf.models.flops import encoder_flops, head_flops
from flperf.models.heads import build_head
from flperf.models.latents import LatentGeometry
from flperf.run import Components, build_components, flops_per_clip

# Deep and wide enough that the first layers, whose inputs need no gradient, count little: training is three times the
# forward pass.
WIDER = ["model.depth=8", "model.hidden_dim=96", "trainer.batch_size=2", "trainer.ema_decay=null"]


def counted_step(components: Components, head: torch.nn.Module) -> dict[str, int]:
    """FLOPs per clip of encoding, and of the head's forward and backward pass."""
    video = torch.randint(0, 256, (2, 8, 32, 32, 3), dtype=torch.uint8)
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch counts matrix products, but not fused attention on a CPU
        with FlopCounterMode(display=False) as encode:
            latents = components.encoder(video[:, :4]), components.encoder(video[:, 4:])
        with FlopCounterMode(display=False) as train:
            components.objective.loss(head, *latents, torch.arange(2)).backward()
    return {"encoder": encode.get_total_flops() / 2, "head": train.get_total_flops() / 2}


@pytest.mark.parametrize("regime", REGIMES)
def test_logged_flops_are_those_of_a_training_step(tmp_path, regime):
    config = parse_config(TINY.format(folder=tmp_path), "tiny", [*REGIMES[regime], *WIDER, "name=tiny"])
    process = start_process()
    components = build_components(config, process, batch_share(config.trainer, process))
    head = build_head(config.model, components.geometry, seed=0, compile=False)
    assert flops_per_clip(components) == pytest.approx(counted_step(components, head), rel=0.01)


@pytest.mark.parametrize("mode", ["split", "joint"])
@pytest.mark.parametrize("kind", ["vjepa2", "dinov3", "4ds"])
def test_encoding_is_counted_for_every_backbone_and_mode(tmp_path, kind, mode):
    config = parse_config(TINY.format(folder=tmp_path), "tiny", [*{**BACKBONES, "4ds": FOUR_DS}[kind], "name=tiny"])
    encoder = build_encoder(
        config.backbone,
        Preprocessing.of(config.backbone),
        dtype=torch.float32,
        device=torch.device("cpu"),
        compile=False,
    )
    geometry, video = LatentGeometry(1, 3, 2, 2, 24), torch.zeros(1, 8, 32, 32, 3, dtype=torch.uint8)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        encode_clip(encoder, video, geometry, mode)
    assert encoder_flops(encoder, geometry, mode) == counted.get_total_flops()


def test_attention_is_counted_without_recomputed_scores():
    """The part that is quadratic in tokens is three times its forward pass. PyTorch counts five products for the
    backward pass of fused attention. One of them computes the scores again, which are not FLOPs of the model."""
    layouts = [LatentGeometry(frames, frames, 4, 4, 24) for frames in (1, 2)]
    model = Model(head="predictor", num_context_latents=1, hidden_dim=32, depth=3, num_heads=2)
    once, twice = (
        3 * head_flops(build_head(model, geometry, seed=0, compile=False), geometry, False) for geometry in layouts
    )
    forward, backward = 0, 0
    for sign, tokens in ((-2, 32), (1, 64)):  # the linear part cancels out
        shape = (1, 2, tokens, 16)
        forward += (
            sign
            * model.depth
            * flop_registry[torch.ops.aten._scaled_dot_product_flash_attention](shape, shape, shape, out_val=None)
        )
        backward += sign * model.depth * sdpa_backward_flop(shape, shape, shape, shape)
    assert twice - 2 * once == forward + backward * 4 / 5


@pytest.mark.parametrize(("encode", "flops"), [("joint", 11.6e12), ("split", 8.2e12)])
def test_flops_of_vit_l_at_64_frames(encode, flops):
    """24 blocks of 24 n d^2 + 4 n^2 d for n tokens of width d: 8,192 tokens, or twice 4,096."""
    config = load_config(str(ROOT / "configs/references/vjepa2_kinetics_400_deterministic.yaml"))
    backbone = backbone_without_weights(config.backbone)
    with torch.device("meta"):
        encoder = Encoder(backbone, Preprocessing.of(backbone), torch.bfloat16)
    groups, n, d = (1, 8192, 1024) if encode == "joint" else (2, 4096, 1024)
    counted = encoder_flops(encoder, LatentGeometry(16, 16, 16, 16, d), encode)
    assert counted == pytest.approx(groups * 24 * (24 * n * d**2 + 4 * n**2 * d), rel=0.01)
    assert counted == pytest.approx(flops, rel=0.01)
