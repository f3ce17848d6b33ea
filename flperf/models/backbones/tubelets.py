"""The first layer of video encoders, from pixels to tokens."""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class TubeletEmbedding(nn.Module):
    """A convolution whose stride is its kernel size, computed as a matrix product.

    The 3-D convolution of some releases of cuDNN takes many times as long in bf16 (huggingface/transformers, issue
    45750; pytorch/pytorch, issue 174051).
    """

    def __init__(self, convolution: nn.Conv3d):
        super().__init__()
        self.tubelet = convolution.kernel_size
        self.weight = nn.Parameter(rearrange(convolution.weight.detach(), "d c p q r -> d (p q r c)").contiguous())
        self.bias = convolution.bias

    def forward(self, pixels: Tensor) -> Tensor:
        """b f c h w -> b t h w d. Pixels that fill no tubelet are left out. Fastest if the channels of a pixel are
        contiguous."""
        frames, rows, columns = self.tubelet
        t, h, w = pixels.shape[1] // frames, pixels.shape[3] // rows, pixels.shape[4] // columns
        whole = pixels[:, : t * frames, :, : h * rows, : w * columns]
        tubelets = rearrange(whole, "b (t p) c (h q) (w r) -> b t h w (p q r c)", p=frames, q=rows, r=columns)
        return F.linear(tubelets, self.weight, self.bias)
