"""Attention as encoders and heads call it, against its formula."""

import pytest
import torch

from flperf.models.attention import _xformers_is_fastest, attention, attention_operator


@pytest.mark.parametrize("width", [64, 88])
def test_attention_is_its_formula(width):
    """On parts of one projection, as blocks have them, and with fewer queries than keys."""
    generator = torch.Generator().manual_seed(0)
    # each b n a k
    query, key, value = torch.randn(2, 37, 3, 4, width, generator=generator).to(torch.float16).unbind(2)
    query = query[:, :20]
    scores = torch.einsum("bnak, bmak -> banm", query.double(), key.double()) / width**0.5
    expected = torch.einsum("banm, bmak -> bnak", scores.softmax(-1), value.double())
    mixed = attention(query, key, value)
    assert mixed.shape == query.shape and mixed.dtype == query.dtype
    torch.testing.assert_close(mixed.double(), expected, rtol=0, atol=4e-3)


def test_the_operator_has_a_name():
    assert attention_operator(128, torch.float32, torch.device("cpu")) == "PyTorch scaled_dot_product_attention"


@pytest.mark.parametrize(("capability", "taken"), [((8, 0), True), ((9, 0), False), ((10, 0), False)])
def test_xformers_is_used_where_its_kernels_are_the_fastest(monkeypatch, capability, taken):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert _xformers_is_fastest() == taken
