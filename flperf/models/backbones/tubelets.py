"""Pixels to tokens, the first layer of video encoders."""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class TubeletEmbedding(nn.Module):
    """A convolution that steps by its kernel, as the matrix product that it is.

    cuDNN has releases whose three-dimensional convolution takes many times as long in bf16 (huggingface/transformers,
    issue 45750; pytorch/pytorch, issue 174051).
    """

    def __init__(self, convolution: nn.Conv3d):
        super().__init__()
        self.tubelet = convolution.kernel_size
        self.weight = nn.Parameter(rearrange(convolution.weight.detach(), "d c p q r -> d (p q r c)").contiguous())
        self.bias = convolution.bias

    def forward(self, pixels: Tensor) -> Tensor:
        """b f c h w -> b t h w d; what fills no tubelet is left out. Fastest where channels lie side by side, as
        pixels come."""
        frames, rows, columns = self.tubelet
        t, h, w = pixels.shape[1] // frames, pixels.shape[3] // rows, pixels.shape[4] // columns
        whole = pixels[:, : t * frames, :, : h * rows, : w * columns]
        tubelets = rearrange(whole, "b (t p) c (h q) (w r) -> b t h w (p q r c)", p=frames, q=rows, r=columns)
        return F.linear(tubelets, self.weight, self.bias)
