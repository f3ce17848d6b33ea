"""The compilation of a block is shown on a terminal, and only there."""

import io

import pytest
import torch
from torch import nn

from flperf.models import compile as compilation


class Terminal(io.StringIO):
    def __init__(self, watched: bool):
        super().__init__()
        self.watched = watched

    def isatty(self) -> bool:
        return self.watched


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


@pytest.mark.parametrize("watched", [True, False])
def test_the_first_pass_is_named_on_a_terminal(watched, monkeypatch, graphs_only):
    terminal = Terminal(watched)
    monkeypatch.setattr(compilation.sys, "stderr", terminal)
    blocks = [Double(), Double()]
    for number, block in enumerate(blocks, start=1):
        compilation.compile_forward(block, f"head block {number}/2")
    for _ in range(2):
        assert all(block(torch.ones(3)).tolist() == [2.0, 2.0, 2.0] for block in blocks)
    lines = [line for line in terminal.getvalue().split(compilation.ERASE_LINE) if line]
    assert lines == (["compiling head block 1/2 …", "compiling head block 2/2 …"] if watched else [])
