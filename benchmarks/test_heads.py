"""Each head, compiled in the compute dtype, against eager in fp32 and in that dtype: the forward pass alone, and with
the backward pass.

    python -m pytest benchmarks/test_heads.py

Forward and backward count as three times the FLOPs of forward. Activation checkpointing and the fused backward
passes are timed against the same head without them.
"""

from collections.abc import Callable

import pytest
import torch

from benchmarks.sizes import (
    BATCH,
    DEVICE,
    DTYPE,
    HEADS,
    ON_GPU,
    configuration,
    encoder_of,
    geometry_of,
    head_of,
    latents_of,
)
from flperf.models.flops import head_flops
from flperf.models.latents import LatentGeometry

EAGER = {"eager fp32": torch.float32, "eager": DTYPE}


@pytest.fixture(scope="module")
def geometry() -> LatentGeometry:
    config = configuration()
    return geometry_of(config, encoder_of(config, DTYPE, False))


class Pass:
    """A head and random latents: `forward` runs it without gradients, `forward_backward` with them."""

    def __init__(self, name: str, geometry: LatentGeometry, dtype: torch.dtype, compile: bool, *overrides: str):
        self.head = head_of(configuration(name, "vjepa2", *overrides), geometry, dtype, compile)
        context, target = latents_of(geometry, dtype)
        self.inputs = (context, target, torch.rand(BATCH, device=DEVICE)) if name == "dit" else (context,)

    @torch.no_grad()
    def forward(self) -> None:
        self.head(*self.inputs)

    def forward_backward(self) -> None:
        self.head.zero_grad(set_to_none=True)
        self.head(*self.inputs).float().square().mean().backward()


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("what", ["forward", "forward and backward"])
def test_head(benchmark, record, geometry, name, what):
    benchmark.group = f"{what}, {name}"

    def of(pass_: Pass) -> Callable[[], None]:
        return pass_.forward if what == "forward" else pass_.forward_backward

    ours = Pass(name, geometry, DTYPE, True)
    beside = {way: of(Pass(name, geometry, dtype, False)) for way, dtype in EAGER.items()}
    flops = BATCH * head_flops(ours.head, geometry, name == "dit") * (1 if what == "forward" else 3)
    record(of(ours), "clips", BATCH, flops=flops, dtype=DTYPE, beside=beside)


def against_itself(
    record, geometry: LatentGeometry, name: str, beside: str, override: str = "", instead: str = ""
) -> None:
    """The head with an override, beside one with another instead."""
    ours, other = (
        Pass(name, geometry, DTYPE, True, *([changed] if changed else [])) for changed in (override, instead)
    )
    flops = 3 * BATCH * head_flops(other.head, geometry, name == "dit")
    record(ours.forward_backward, "clips", BATCH, flops=flops, dtype=DTYPE, beside={beside: other.forward_backward})


@pytest.mark.benchmark(group="DiT with activation checkpointing")
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointed(record, geometry, mode):
    """Recomputation does not count as FLOPs."""
    against_itself(record, geometry, "dit", "all activations kept", f"model.activation_checkpointing={mode}")


@pytest.mark.skipif(not ON_GPU, reason="on a CPU the fused backward passes are not used")
@pytest.mark.benchmark(group="fused backward passes")
@pytest.mark.parametrize("name", HEADS)
def test_fused_kernels(record, geometry, name):
    against_itself(record, geometry, name, "with its kernels", instead="model.fused_kernels=true")
