"""The frozen encoder, compiled in the compute dtype, in turns with eager in fp32 and in that dtype, and with
transformers' own layers.

    python -m pytest benchmarks/test_encoder.py

`joint` attends over the whole clip, as FutureLatents does. `split` encodes context and target separately, which is also
less work.
"""

from functools import partial
from unittest.mock import patch

import pytest
import torch

from benchmarks.sizes import BACKBONES, BATCH, DTYPE, configuration, encoder_of, geometry_of, video_of
from benchmarks.usual_way import TransformersVJEPA2
from flperf.models import backbones
from flperf.models.encoder import encode_clip
from flperf.models.flops import encoder_flops


@pytest.mark.parametrize("mode", ["joint", "split"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_encode(benchmark, record, backbone, mode):
    benchmark.group = f"encoder, {backbone}"
    config = configuration("predictor", backbone)
    ours = encoder_of(config, DTYPE, True)
    others = {"eager fp32": encoder_of(config, torch.float32, False), "eager": encoder_of(config, DTYPE, False)}
    if (backbone, mode) == ("vjepa2", "joint"):
        with patch.dict(backbones.BACKBONES, vjepa2=TransformersVJEPA2):
            others |= {
                f"transformers' layers, {way}": encoder_of(config, DTYPE, way == "compiled")
                for way in ("eager", "compiled")
            }
    geometry, video = geometry_of(config, ours), video_of(config)
    beside = {name: partial(encode_clip, encoder, video, geometry, mode) for name, encoder in others.items()}
    flops = BATCH * encoder_flops(ours, geometry, mode)
    record(partial(encode_clip, ours, video, geometry, mode), "clips", BATCH, flops=flops, dtype=DTYPE, beside=beside)
