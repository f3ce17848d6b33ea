"""The compute dtype of a process, and its share of a batch."""

import pytest
import torch

from flperf.config import Trainer
from flperf.engine import process
from flperf.engine.process import Process, batch_share
from flperf.errors import UserError


@pytest.mark.parametrize(
    "native, bf16, fp32, chosen", [(True, 2e11, 1e11, "bf16"), (True, 1e11, 2e11, "fp32"), (False, 2e11, 1e11, "fp32")]
)
def test_a_cpu_computes_in_the_dtype_that_it_multiplies_faster(monkeypatch, native, bf16, fp32, chosen):
    rates = {torch.bfloat16: bf16, torch.float32: fp32}
    monkeypatch.setattr(process, "peak_flops", lambda device, dtype: rates[dtype])
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    process.bf16_is_faster.cache_clear()
    try:
        dtype = process.compute_dtype("auto", torch.device("cpu"))
    finally:
        process.bf16_is_faster.cache_clear()
    assert dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[chosen]
    assert process.compute_dtype("bf16", torch.device("cpu")) == torch.bfloat16


def share_of(world_size: int, batch_size: int, micro_batch_size: int | None):
    trainer = Trainer(batch_size=batch_size, micro_batch_size=micro_batch_size)
    return batch_share(trainer, Process(0, 0, world_size, torch.device("cpu")))


@pytest.mark.parametrize(
    ("world_size", "micro_batch_size", "expected"),
    [(1, None, 24), (1, 8, 8), (2, 8, 6), (4, 8, 6), (8, 8, 3), (3, 5, 4), (24, 8, 1)],
)
def test_the_batch_size_is_the_same_at_any_world_size(capsys, world_size, micro_batch_size, expected):
    found = share_of(world_size, 24, micro_batch_size)
    assert found.micro_batch_size == expected and found.micro_batch_size * found.accumulation_steps * world_size == 24
    assert ("trainer.micro_batch_size: 8" in capsys.readouterr().out) == (micro_batch_size == 8 and expected != 8)


@pytest.mark.parametrize("world_size", [5, 16, 48])
def test_a_batch_that_cannot_be_divided_is_refused(world_size):
    with pytest.raises(
        UserError, match=f"trainer.batch_size: 24 clips cannot be divided evenly among {world_size} processes"
    ):
        share_of(world_size, 24, 8)
