"""In which precision a run computes, and how its learning rate goes."""

import pytest
import torch

from flperf.config import Trainer
from flperf.engine import process
from flperf.engine.optimizer import learning_rate


@pytest.mark.parametrize(
    "native, bf16, fp32, chosen", [(True, 2e11, 1e11, "bf16"), (True, 1e11, 2e11, "fp32"), (False, 2e11, 1e11, "fp32")]
)
def test_a_cpu_computes_in_what_it_multiplies_faster(monkeypatch, native, bf16, fp32, chosen):
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


def test_the_learning_rate_warms_up_then_falls_to_its_final_value():
    trainer = Trainer(learning_rate=1.0, warmup_steps=4, final_learning_rate=0.1)
    rates = [learning_rate(step, trainer, 20) for step in range(21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(later < earlier for earlier, later in zip(rates[4:], rates[5:], strict=False))
    assert rates[20] == pytest.approx(0.1)
