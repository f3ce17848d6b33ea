"""What a run logs as MFU rests on counted operations: held against what PyTorch counts in a real training step."""

import pytest
import torch
from runs import REGIMES, TINY
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop

from flperf.config import parse_config
from flperf.engine import start_process
from flperf.run import build_run, flops_per_clip

# Wide enough that what is not three times its forward weighs little: the first layers' inputs need no gradient.
WIDER = ["model.depth=8", "model.hidden_dim=96", "trainer.batch_size=2", "trainer.ema_decay=null"]


def counted_step(run) -> dict[str, int]:
    """FLOPs a clip of encoding, and of the head's forward and backward pass, as they are run."""
    video = torch.randint(0, 256, (2, 8, 32, 32, 3), dtype=torch.uint8)
    with sdpa_kernel(SDPBackend.MATH):  # CPU attention is no operator that PyTorch counts; as matrix products it is
        with FlopCounterMode(display=False) as encode:
            latents = run.encoder(video[:, :4]), run.encoder(video[:, 4:])
        with FlopCounterMode(display=False) as train:
            run.objective.loss(run.engine.module, *latents, torch.arange(2)).backward()
    return {"encoder": encode.get_total_flops() / 2, "head": train.get_total_flops() / 2}


@pytest.mark.parametrize("regime", REGIMES)
def test_logged_flops_are_those_of_a_training_step(tmp_path, regime):
    config = parse_config(TINY.format(folder=tmp_path), "tiny", [*REGIMES[regime], *WIDER, "name=tiny"])
    run = build_run(config, start_process())
    expected = counted_step(run)
    assert flops_per_clip(run) == pytest.approx(expected, rel=0.01)


def test_attention_trains_at_three_times_its_forward_not_as_pytorch_counts_it():
    """PyTorch counts five products for the backward pass of fused attention, one of them the scores computed again: not model FLOPs."""
    b, a, n, k = 2, 3, 64, 16
    shape = (b, a, n, k)
    forward = flop_registry[torch.ops.aten._scaled_dot_product_flash_attention](shape, shape, shape, out_val=None)
    backward = sdpa_backward_flop(shape, shape, shape, shape)
    assert forward == 4 * b * a * n * n * k
    assert forward + backward * 4 / 5 == 3 * forward
