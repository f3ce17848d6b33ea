"""The FLOPs behind MFU and estimates, compared with those that PyTorch counts in real passes."""

import pytest
import torch
from runs import BACKBONES, FOUR_DS, REGIMES, ROOT, TINY
from small_heads import GEOMETRY, small
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flperf.config import load_config, parse_config
from flperf.data.preprocessing import Preprocessing
from flperf.engine.process import batch_share, start_process
from flperf.estimate.workload import backbone_without_weights
from flperf.models.encoder import Encoder, build_encoder, encode_clip
from flperf.models.flops import encoder_flops, head_flops
from flperf.models.heads import HEADS, build_head
from flperf.models.latents import LatentGeometry
from flperf.run import build_components, flops_per_clip


def counted(function) -> int:
    """FLOPs of a call. PyTorch counts a CPU's attention only if it runs as matrix products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("mode", ["split", "joint"])
@pytest.mark.parametrize("kind", ["vjepa2", "dinov3", "4ds"])
def test_encoding(tmp_path, kind, mode):
    config = parse_config(TINY.format(folder=tmp_path), "tiny", [*{**BACKBONES, "4ds": FOUR_DS}[kind], "name=tiny"])
    preprocessing = Preprocessing.of(config.backbone)
    encoder = build_encoder(
        config.backbone, preprocessing, dtype=torch.float32, device=torch.device("cpu"), compile=False
    )
    geometry, video = LatentGeometry(1, 3, 2, 2, 24), torch.zeros(1, 8, 32, 32, 3, dtype=torch.uint8)
    assert encoder_flops(encoder, geometry, mode) == counted(lambda: encode_clip(encoder, video, geometry, mode))


@pytest.mark.parametrize(("encode", "flops"), [("joint", 11.6e12), ("split", 8.2e12)])
def test_encoding_64_frames_by_vit_l(encode, flops):
    """24 blocks of 24 n d^2 + 4 n^2 d for n tokens of width d: 8,192 tokens at once, or twice 4,096."""
    config = load_config(ROOT / "configs/references/vjepa2_kinetics_400_deterministic.yaml")
    backbone = backbone_without_weights(config.backbone)
    with torch.device("meta"):
        encoder = Encoder(backbone, Preprocessing.of(backbone), torch.bfloat16)
    passes, n, d = (1, 8192, 1024) if encode == "joint" else (2, 4096, 1024)
    found = encoder_flops(encoder, LatentGeometry(16, 16, 16, 16, d), encode)
    assert found == pytest.approx(passes * 24 * (24 * n * d**2 + 4 * n**2 * d), rel=0.01)
    assert found == pytest.approx(flops, rel=0.01)


@pytest.mark.parametrize("name", HEADS)
def test_the_forward_pass_of_a_head(name):
    """A linear layer costs 2 per token and weight; attention costs 4 per query, key and channel."""
    d, depth, context, target = 32, 2, GEOMETRY.context_tokens, GEOMETRY.target_tokens

    def linear(tokens: int, rows: int, columns: int) -> int:
        return 2 * tokens * rows * columns

    def attend(queries: int, keys: int) -> int:
        return 4 * queries * keys * d

    own = context + target if name == "predictor" else target
    block = linear(own, d, 12 * d) + attend(own, own)
    if name != "predictor":
        block += linear(own, d, 2 * d) + linear(context, d, 2 * d) + attend(own, context)
    total = linear(context, 20, d) + depth * block + linear(target, d, 20)
    if name == "dit":
        total += linear(target, 20, d) + linear(1, 256, d) + linear(1, d, d)
        total += depth * linear(1, d, 9 * d) + linear(1, d, 2 * d)
    assert head_flops(build_head(small(name), GEOMETRY, seed=0, compile=False), GEOMETRY, name == "dit") == total


# Deep and wide enough that the first layers, whose inputs need no gradient, count little. Training then costs three
# times the forward pass.
WIDER = ["model.depth=8", "model.hidden_dim=96", "trainer.batch_size=2", "trainer.ema_decay=null"]


@pytest.mark.parametrize("regime", REGIMES)
def test_a_training_step(tmp_path, regime):
    config = parse_config(TINY.format(folder=tmp_path), "tiny", [*REGIMES[regime], *WIDER, "name=tiny"])
    process = start_process()
    components = build_components(config, process, batch_share(config.trainer, process))
    head = build_head(config.model, components.geometry, seed=0, compile=False)
    video, latents = torch.randint(0, 256, (2, 8, 32, 32, 3), dtype=torch.uint8), []
    encoding = counted(lambda: latents.extend(components.encoder(part) for part in video.split(4, dim=1)))
    step = counted(lambda: components.objective.loss(head, *latents, torch.arange(2)).backward())
    assert flops_per_clip(components) == pytest.approx({"encoder": encoding / 2, "head": step / 2}, rel=0.01)
