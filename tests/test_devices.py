"""Peaks: the vendor's, which MFU is a share of, and what a device here was measured to do."""

import torch

from flperf import devices


def test_a_known_gpu_has_its_stated_peak_and_a_measured_one(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch, "ones", lambda *size, **options: torch.empty(size, device="meta"))
    monkeypatch.setattr(devices, "best_seconds", lambda function, device: 2e-3)
    assert devices.peak_flops(gpu, torch.bfloat16) == 989e12
    assert devices.measured_flops(gpu, torch.bfloat16) == 2 * 8192**3 / 2e-3
    assert devices.peak_flops(gpu, torch.float32) == devices.measured_flops(gpu, torch.float32)  # which the table does not state
