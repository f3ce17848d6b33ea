"""The frozen encoder: eager fp32, eager and compiled in the compute dtype, split and joint.

    python -m pytest benchmarks/test_encoder.py

`joint` attends over the whole clip, as FutureLatents does; `split` encodes context and target apart, which is also less work.
"""

import pytest
import torch

from benchmarks.sizes import BACKBONES, BATCH, DTYPE, configuration, encoder_of, layout_of, video_of
from flperf.encoder import encode_clip
from flperf.throughput import encoder_flops

VARIANTS = {"eager fp32": (torch.float32, False), "eager": (DTYPE, False), "compiled": (DTYPE, True)}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", ["joint", "split"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_encode(benchmark, record, backbone, mode, variant):
    dtype, compile = VARIANTS[variant]
    benchmark.group = f"encoder, {backbone}"
    config = configuration("predictor", backbone)
    encoder = encoder_of(config, dtype, compile)
    layout, video = layout_of(config, encoder), video_of(config)
    flops = BATCH * encoder_flops(encoder, layout, mode)
    record(lambda: encode_clip(encoder, video, layout, mode), "clips", BATCH, flops=flops, dtype=dtype)
