"""4DS, "Scaling 4D Representations" (arXiv:2412.15212): a plain pre-norm ViT over tubelets of 2 x 16 x 16, on pixels
in [0, 1].

It follows the published code (github.com/google-deepmind/representations4d, and kauldron's transformer blocks).
Published weights are flat npz files in Flax's layouts. A readout takes an inner layer, so later blocks are neither
loaded nor run.
"""

import zipfile
import zlib
from contextlib import nullcontext
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flperf.config import Backbone
from flperf.errors import UserError
from flperf.models.attention import attention
from flperf.models.backbones.tubelets import TubeletEmbedding

TUBELET = (2, 16, 16)
POSITIONS = (8, 14, 14)  # the grid of the learned positions: 16 frames of 224 x 224


@dataclass(frozen=True)
class Size:
    """Width, depth, width inside the MLP, attention heads."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int


SIZES = {
    "S": Size(384, 12, 1536, 6),
    "B": Size(768, 12, 3072, 12),
    "L": Size(1024, 24, 4096, 16),
    "H": Size(1280, 32, 5120, 16),
    "g": Size(1408, 40, 6144, 16),
    "G": Size(1664, 48, 8192, 16),
    "e": Size(1792, 56, 15360, 16),
}


class FourDS(nn.Module):
    """`architecture`: `size` (a key of SIZES, default B) or the four fields of `Size`; `readout` (default 0.95), the
    fraction of the depth.

    The published list of features has L + 1 entries: the input of block 0 (patch embedding with positions), and then
    the inputs of blocks 0 … L-1. A fraction selects entry int((L + 1) * fraction) - 1. That is the output of the
    first n blocks, n = max(int((L + 1) * fraction) - 2, 0): 10 of the 12 blocks of size B at 0.95. The list never
    contains the output of the last block.
    """

    def __init__(self, backbone: Backbone, crop: tuple[int, int]):
        super().__init__()
        size, readout = _architecture(backbone)
        if any(edge % TUBELET[1] for edge in crop):
            raise UserError(
                f"backbone.processor: 4DS takes frames of whole patches of 16 pixels, not {crop[0]} x {crop[1]}"
            )
        self.frames_per_latent = self.frames_covered = TUBELET[0]
        self.patch_size = TUBELET[1]
        self.dim = size.hidden_size
        depth = blocks_before(readout, size.num_hidden_layers)
        with torch.device("meta") if backbone.weights else nullcontext(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.patch_embedding = TubeletEmbedding(nn.Conv3d(3, size.hidden_size, TUBELET, stride=TUBELET))
            self.positions = nn.Parameter(0.02 * torch.randn(*POSITIONS, size.hidden_size))
            self.blocks = nn.ModuleList(Block(size) for _ in range(depth))
        if backbone.weights:
            self.load_state_dict(read_weights(backbone.weights, size, depth), assign=True)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: in [0, 1], b f c h w -> b t h w d."""
        x = self.patch_embedding(pixels)
        grid = x.shape[1:4]
        x = rearrange(x + self._positions(grid), "b t h w d -> b (t h w) d")
        for block in self.blocks:
            x = block(x)
        return rearrange(x, "b (t h w) d -> b t h w d", t=grid[0], h=grid[1], w=grid[2])

    def _positions(self, grid: torch.Size) -> Tensor:
        """The learned positions, interpolated trilinearly to the clip's grid if that is not the grid of training."""
        if grid == POSITIONS:
            return self.positions
        planes = rearrange(self.positions, "t h w d -> 1 d t h w")
        return rearrange(
            F.interpolate(planes, size=grid, mode="trilinear", align_corners=False), "1 d t h w -> t h w d"
        )


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), with biases everywhere. The softmax of the fused attention is fp32
    in any dtype."""

    def __init__(self, size: Size):
        super().__init__()
        dim = size.hidden_size
        self.num_heads = size.num_attention_heads
        self.attention_norm = nn.LayerNorm(dim, eps=1e-6)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.mlp_norm = nn.LayerNorm(dim, eps=1e-6)
        self.dense_in = nn.Linear(dim, size.intermediate_size)
        self.dense_out = nn.Linear(size.intermediate_size, dim)

    def forward(self, x: Tensor) -> Tensor:
        """b n d -> b n d."""
        projected = self.query_key_value(self.attention_norm(x))
        query, key, value = rearrange(projected, "b n (three a k) -> three b n a k", three=3, a=self.num_heads).unbind()
        x = x + self.out(rearrange(attention(query, key, value), "b n a k -> b n (a k)"))
        return x + self.dense_out(F.gelu(self.dense_in(self.mlp_norm(x)), approximate="tanh"))


def blocks_before(fraction: float, layers: int) -> int:
    """How many blocks run for a readout at a fraction of the depth; see `FourDS`."""
    return max(int((layers + 1) * fraction) - 2, 0)


def _architecture(backbone: Backbone) -> tuple[Size, float]:
    """Size and readout of `backbone.architecture`, checked."""
    stated = {key: value for key, value in backbone.architecture.items() if value is not None}
    readout = stated.pop("readout", 0.95)
    stated.pop("image_size", None)  # the preprocessing's
    explicit = {field.name for field in fields(Size)}
    for key in stated.keys() - explicit - {"size"}:
        raise UserError(
            f"backbone.architecture.{key}: 4DS has no such key: size, readout, image_size, "
            f"{', '.join(sorted(explicit))}"
        )
    if not isinstance(readout, int | float) or not 0 < readout <= 1:
        raise UserError(
            f"backbone.architecture.readout: must be a fraction of the depth, above 0 and at most 1, is {readout!r}"
        )
    if not explicit & stated.keys():
        name = stated.get("size", "B")
        if name not in SIZES:
            raise UserError(f"backbone.architecture.size: {name!r} is none of {', '.join(SIZES)}")
        return SIZES[name], readout
    if "size" in stated or explicit - stated.keys():
        raise UserError(f"backbone.architecture: write either size or all of {', '.join(sorted(explicit))}")
    size = Size(**stated)
    if (
        any(not isinstance(value, int) or value < 1 for value in stated.values())
        or size.hidden_size % size.num_attention_heads
    ):
        raise UserError(
            f"backbone.architecture: {stated}: must be positive integers, hidden_size a multiple of num_attention_heads"
        )
    return size, readout


def read_weights(path: str, size: Size, depth: int) -> dict[str, Tensor]:
    """The state of a `FourDS` of `depth` blocks from a published npz file, which holds a backbone alone or one with a
    readout.

    Raises `UserError` with file and key if either is missing or damaged, or if the architecture differs.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise UserError(f"backbone.weights: {path}: is a single array, not an npz file of named arrays")
            return _state(_Keys(path, file), size, depth)
    except FileNotFoundError:
        raise UserError(
            f"backbone.weights: there is no file {path}; download the npz file of a 4DS backbone and name it here"
        ) from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"backbone.weights: {path}: is no complete npz file ({_line(error)}); download it again"
        ) from None


class _Keys:
    """Arrays of an npz file by their key without the prefix, which is `params/` for a backbone alone and
    `params/layers_0/` for one with a readout."""

    def __init__(self, path: str, file: np.lib.npyio.NpzFile):
        self.path, self.file = path, file
        positions = "encoder/posenc/embeddings"
        found = [name for name in file.files if name.endswith(positions)]
        self.prefix = found[0].removesuffix(positions) if found else "params/"

    def __call__(self, key: str, *shape: int) -> Tensor:
        """The array in fp32. Raises `UserError` unless it has this shape."""
        name = self.prefix + key
        if name not in self.file.files:
            raise UserError(f"backbone.weights: {self.path}: has no key {name}")
        try:
            array = self.file[name]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(
                f"backbone.weights: {self.path}: {name} is damaged ({_line(error)}); download it again"
            ) from None
        if array.shape != shape:
            raise UserError(
                f"backbone.weights: {self.path}: {name} has shape {list(array.shape)}, but backbone.architecture "
                f"makes it {list(shape)}"
            )
        return torch.from_numpy(array.astype(np.float32, order="C"))


def _state(read: _Keys, size: Size, depth: int) -> dict[str, Tensor]:
    dim, hidden, heads = size.hidden_size, size.intermediate_size, size.num_attention_heads
    width = dim // heads
    convolution = "encoder/patch_embedding/Conv_0"
    state = {
        "positions": read("encoder/posenc/embeddings", *POSITIONS, dim),
        "patch_embedding.weight": rearrange(
            read(f"{convolution}/kernel", *TUBELET, 3, dim), "t h w c d -> d (t h w c)"
        ).contiguous(),
        "patch_embedding.bias": read(f"{convolution}/bias", dim),
    }
    for block in range(depth):
        layer, target = f"processor/layers_{block}", f"blocks.{block}"
        for norm in ("attention_norm", "mlp_norm"):
            state[f"{target}.{norm}.weight"] = read(f"{layer}/{norm}/scale", dim)
            state[f"{target}.{norm}.bias"] = read(f"{layer}/{norm}/bias", dim)
        names = [f"{layer}/attention/{name}" for name in ("query", "key", "value")]
        kernels = [rearrange(read(f"{name}/kernel", dim, heads, width), "d a k -> (a k) d") for name in names]
        biases = [read(f"{name}/bias", heads, width).flatten() for name in names]
        state[f"{target}.query_key_value.weight"] = torch.cat(kernels)
        state[f"{target}.query_key_value.bias"] = torch.cat(biases)
        kernel = read(f"{layer}/attention/out/kernel", heads, width, dim)
        state[f"{target}.out.weight"] = rearrange(kernel, "a k d -> d (a k)").contiguous()
        state[f"{target}.out.bias"] = read(f"{layer}/attention/out/bias", dim)
        for dense, (inputs, outputs) in {"dense_in": (dim, hidden), "dense_out": (hidden, dim)}.items():
            state[f"{target}.{dense}.weight"] = read(f"{layer}/mlp/{dense}/kernel", inputs, outputs).T.contiguous()
            state[f"{target}.{dense}.bias"] = read(f"{layer}/mlp/{dense}/bias", outputs)
    return state


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
