"""The embedding of tubelets equals its convolution."""

import pytest
import torch
from torch import nn

from flperf.models.backbones.tubelets import TubeletEmbedding


# b f c h w
@pytest.mark.parametrize("shape", [(2, 4, 3, 12, 8), (1, 5, 3, 15, 11)], ids=["whole", "with pixels left over"])
@pytest.mark.parametrize("bias", [True, False])
def test_is_the_convolution(shape, bias):
    convolution = nn.Conv3d(3, 6, kernel_size=(2, 4, 2), stride=(2, 4, 2), bias=bias, dtype=torch.float64)
    pixels = torch.randn(shape, dtype=torch.float64)
    expected = convolution(pixels.transpose(1, 2))  # b d t h w
    torch.testing.assert_close(TubeletEmbedding(convolution)(pixels), expected.movedim(1, -1))
