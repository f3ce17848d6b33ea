"""The fused backward passes of a head on the CPU. tests/unit/models/heads/test_fused.py has whole heads."""

import pytest
import torch
from flperf_kernels.bias_gradients import gelu_backward, heads_backward
from flperf_kernels.residual_norm import residual_norm_backward
from fused_inputs import (
    DTYPES,
    HEADS,
    NORMS,
    SIZES,
    assert_exact,
    exact_gelu,
    exact_heads,
    exact_norm,
    heads_arguments,
    norm_arguments,
    randoms,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_residual_and_norm(name, size, dtype):
    arguments = norm_arguments(name, size, dtype)
    assert_exact(residual_norm_backward(*arguments), exact_norm(*arguments), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_heads(name, dtype):
    arguments = heads_arguments(name, dtype)
    assert_exact(heads_backward(*arguments), exact_heads(*arguments), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu(dtype):
    grad, x = randoms((3, 37, 199), (3, 37, 199), dtype=dtype)
    assert_exact(gelu_backward(grad, 2 * x), exact_gelu(grad, 2 * x), dtype)


def test_opcheck():
    """Results are as their descriptions for tracing say, and share no memory."""
    checks = ("test_schema", "test_faketensor")
    for name in NORMS:
        arguments = norm_arguments(name, (2, 3, 8), torch.bfloat16)
        torch.library.opcheck(torch.ops.flperf.residual_norm_backward.default, arguments, test_utils=checks)
    grads, *tables = heads_arguments("keys, values", torch.bfloat16)
    torch.library.opcheck(torch.ops.flperf.heads_backward.default, (grads, *tables), test_utils=checks)
    pair = randoms((2, 3, 8), (2, 3, 8), dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.flperf.gelu_backward.default, pair, test_utils=checks)
