"""Each head, forward alone and with its backward pass: eager fp32, eager and compiled in the compute dtype.

    python -m pytest benchmarks/test_heads.py

Forward and backward count three times the forward's operations. `checkpointed` keeps only the blocks' inputs and computes the rest again.
"""

import pytest
import torch

from benchmarks.sizes import BATCH, DEVICE, DTYPE, HEADS, configuration, encoder_of, head_of, latents_of, layout_of
from flperf.latents import Layout
from flperf.throughput import head_flops

VARIANTS = {"eager fp32": (torch.float32, False, []), "eager": (DTYPE, False, []), "compiled": (DTYPE, True, [])}
CHECKPOINTED = {"compiled, checkpointed": (DTYPE, True, ["model.activation_checkpointing=true"])}


@pytest.fixture(scope="module")
def layout() -> Layout:
    config = configuration()
    return layout_of(config, encoder_of(config, DTYPE, False))


def inputs(name: str, layout: Layout, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    context, target = latents_of(layout, dtype)
    return (context, target, torch.rand(BATCH, device=DEVICE)) if name == "dit" else (context,)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", HEADS)
def test_forward(benchmark, record, layout, name, variant):
    dtype, compile, overrides = VARIANTS[variant]
    benchmark.group = f"forward, {name}"
    head = head_of(configuration(name, "vjepa2", *overrides), layout, dtype, compile)
    given = inputs(name, layout, dtype)
    with torch.no_grad():
        record(lambda: head(*given), "clips", BATCH, flops=BATCH * head_flops(head, layout, name == "dit"), dtype=dtype)


@pytest.mark.parametrize("variant", VARIANTS | CHECKPOINTED)
@pytest.mark.parametrize("name", HEADS)
def test_forward_backward(benchmark, record, layout, name, variant):
    dtype, compile, overrides = (VARIANTS | CHECKPOINTED)[variant]
    benchmark.group = f"forward and backward, {name}"
    head = head_of(configuration(name, "vjepa2", *overrides), layout, dtype, compile)
    given = inputs(name, layout, dtype)

    def step() -> None:
        head.zero_grad(set_to_none=True)
        head(*given).float().square().mean().backward()

    record(step, "clips", BATCH, flops=3 * BATCH * head_flops(head, layout, name == "dit"), dtype=dtype)
