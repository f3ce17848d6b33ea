import pytest
import torch


@pytest.fixture
def graphs_only():
    """torch.compile traces and differentiates graphs, and runs them without generating code."""
    torch._dynamo.reset()
    torch.compiler.set_default_backend("aot_eager_decomp_partition")
    yield
    torch.compiler.set_default_backend("inductor")
    torch._dynamo.reset()
