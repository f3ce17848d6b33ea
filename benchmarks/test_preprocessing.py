"""Preprocessing of decoded frames: the steps of the Hugging Face processor, in float and on bytes, and ours.

    python -m pytest benchmarks/test_preprocessing.py

A clip of 64 frames of 340 x 256, already decoded. The processor resizes (antialiased; in fp32, or on bytes as
torchvision does), crops, rescales and normalises whole frames. Ours resizes bytes, and only the pixels that the crop
keeps. The encoder's compiled graph then normalises them; `normalised` includes that step.
"""

from functools import partial

import pytest
import torch

from benchmarks.sizes import DTYPE, QUICK, compiled_normalisation
from benchmarks.usual_way import PROCESSORS, processed
from flperf.config import Backbone
from flperf.data.preprocessing import Preprocessing

PREPROCESSING = Preprocessing.of(Backbone(architecture={"crop_size": 256}))
FRAMES = 2 if QUICK else 64


def ours(dtype: torch.dtype):
    normalise = compiled_normalisation(PREPROCESSING, dtype)
    return lambda frames: normalise(PREPROCESSING.apply(frames).contiguous()[None])


OURS = {
    "bytes": lambda: lambda frames: PREPROCESSING.apply(frames).contiguous(),
    "normalised to fp32": lambda: ours(torch.float32),
    "normalised": lambda: ours(DTYPE),
}


@pytest.mark.benchmark(group="preprocessing of a decoded clip")
@pytest.mark.parametrize("variant", OURS)
def test_preprocess(record, variant):
    frames = torch.randint(0, 256, (FRAMES, 256, 340, 3), dtype=torch.uint8)
    function = OURS[variant]()
    moved = frames.nbytes + function(frames).nbytes
    beside = {f"the {name}": partial(processed, frames, PREPROCESSING, dtype) for name, dtype in PROCESSORS.items()}
    record(lambda: function(frames), "clips", 1, bytes=moved, rounds=9, beside=beside)
