"""Peaks: the vendor's, which MFU is a share of, and what a device here was measured to do."""

import time

import pytest
import torch

from flperf.engine import devices


@pytest.fixture(autouse=True)
def measured_anew():
    """Nothing that was measured before counts in these tests, and nothing of theirs after them."""
    devices.measured_flops.cache_clear()
    yield
    devices.measured_flops.cache_clear()


def test_a_known_gpu_has_its_stated_peak_and_a_measured_one(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch, "randn", lambda *size, **options: torch.empty(size, device="meta"))
    monkeypatch.setattr(devices, "best_seconds", lambda function, device: 2e-3)
    assert devices.peak_flops(gpu, torch.bfloat16) == 989e12
    assert devices.measured_flops(gpu, torch.bfloat16) == 2 * 8192**3 / 2e-3
    # which the table does not state
    assert devices.peak_flops(gpu, torch.float32) == devices.measured_flops(gpu, torch.float32)


@pytest.mark.parametrize(("rate", "largest"), [(1e9, 256), (5e9, 512), (1e12, 1024)])
def test_a_peak_is_measured_on_products_that_do_not_take_long(monkeypatch, rate, largest):
    """A CPU that has to emulate bf16 does 1 GFLOP/s: the largest product would take it two seconds, and it is timed
    several times."""
    multiplied = []
    monkeypatch.setattr(
        torch, "randn", lambda *size, **options: multiplied.append(size[0]) or torch.empty(size, device="meta")
    )
    monkeypatch.setattr(devices, "best_seconds", lambda function, device: 2 * multiplied[-1] ** 3 / rate)
    assert devices.measured_flops(torch.device("cpu"), torch.bfloat16) == pytest.approx(rate)
    assert multiplied[-1] == largest


def test_a_disturbance_of_a_tenth_of_a_second_is_not_measured(monkeypatch):
    """Another process that takes a core makes each short product wait for it, sixteen times its own time."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def product() -> None:
        now[0] += 16e-3 if now[0] < 0.1 else 1e-3

    assert devices.best_seconds(product, torch.device("cpu")) == pytest.approx(1e-3)
