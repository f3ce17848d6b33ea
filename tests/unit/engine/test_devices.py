"""Peak rates of devices: stated by the vendor, or measured."""

import time

import pytest
import torch

from flperf.engine import devices


@pytest.fixture(autouse=True)
def no_cached_measurements():
    """Neither in these tests nor after them."""
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
    # The table has no fp32 peak.
    assert devices.peak_flops(gpu, torch.float32) == devices.measured_flops(gpu, torch.float32)


@pytest.mark.parametrize(("rate", "largest"), [(1e9, 256), (5e9, 512), (1e12, 1024)])
def test_a_slow_device_is_measured_on_small_products(monkeypatch, rate, largest):
    """A CPU that emulates bf16 has 1 GFLOP/s: it would take two seconds for the largest product, which is repeated."""
    multiplied = []
    monkeypatch.setattr(
        torch, "randn", lambda *size, **options: multiplied.append(size[0]) or torch.empty(size, device="meta")
    )
    monkeypatch.setattr(devices, "best_seconds", lambda function, device: 2 * multiplied[-1] ** 3 / rate)
    assert devices.measured_flops(torch.device("cpu"), torch.bfloat16) == pytest.approx(rate)
    assert multiplied[-1] == largest


def test_a_disturbance_of_a_tenth_of_a_second_does_not_change_the_measurement(monkeypatch):
    """Another process that keeps a core makes each short product wait, sixteen times as long as the product takes."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def product() -> None:
        now[0] += 16e-3 if now[0] < 0.1 else 1e-3

    assert devices.best_seconds(product, torch.device("cpu")) == pytest.approx(1e-3)
