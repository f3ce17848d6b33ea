"""Attention on a GPU, against the CPU's in fp32."""

import pytest
import torch

from flperf.models.attention import attention


@pytest.mark.parametrize("width", [64, 88])
def test_attention_is_that_of_the_cpu(width):
    """On parts of one projection, as blocks have them, and with fewer queries than keys."""
    generator = torch.Generator().manual_seed(0)
    projected = torch.randn(2, 37, 3, 4, width, generator=generator).to(torch.float16)  # b n three a k
    query, key, value = projected.cuda().unbind(2)
    mixed = attention(query[:, :20], key, value)
    query, key, value = projected.float().unbind(2)
    torch.testing.assert_close(mixed.float().cpu(), attention(query[:, :20], key, value), rtol=0, atol=4e-3)
