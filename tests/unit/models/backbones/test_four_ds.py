"""4DS: the layout of published files, and features against an independent implementation in NumPy."""

import numpy as np
import pytest
import torch

from flperf.config import Backbone
from flperf.data.preprocessing import Preprocessing
from flperf.errors import UserError
from flperf.models.backbones.four_ds import POSITIONS, SIZES, FourDS, Size, blocks_before
from flperf.models.encoder import Encoder

SIZE = Size(hidden_size=24, num_hidden_layers=4, intermediate_size=40, num_attention_heads=3)
ARCHITECTURE = {**vars(SIZE), "readout": 1.0}
BLOCKS = 3  # of the 4: the input of the last one is the last feature
CROP = (32, 48)


def published(prefix: str = "params/") -> dict[str, np.ndarray]:
    """Random arrays in the layout of the published files."""
    random, (dim, heads, width, hidden) = np.random.default_rng(0), (24, 3, 8, 40)
    shapes = {
        "encoder/patch_embedding/Conv_0/kernel": (2, 16, 16, 3, dim),
        "encoder/patch_embedding/Conv_0/bias": (dim,),
        "encoder/posenc/embeddings": (*POSITIONS, dim),
    }
    for block in range(SIZE.num_hidden_layers):
        layer = f"processor/layers_{block}"
        for part in ("query", "key", "value"):
            shapes |= {
                f"{layer}/attention/{part}/kernel": (dim, heads, width),
                f"{layer}/attention/{part}/bias": (heads, width),
            }
        shapes |= {f"{layer}/attention/out/kernel": (heads, width, dim), f"{layer}/attention/out/bias": (dim,)}
        shapes |= {
            f"{layer}/{norm}/{part}": (dim,) for norm in ("attention_norm", "mlp_norm") for part in ("scale", "bias")
        }
        shapes |= {f"{layer}/mlp/dense_in/kernel": (dim, hidden), f"{layer}/mlp/dense_in/bias": (hidden,)}
        shapes |= {f"{layer}/mlp/dense_out/kernel": (hidden, dim), f"{layer}/mlp/dense_out/bias": (dim,)}
    scale = {1: 0.5, 2: 0.3, 3: 0.3, 4: 0.5, 5: 0.05}
    return {
        prefix + key: (scale[len(shape)] * random.standard_normal(shape)).astype(np.float32)
        for key, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("4ds") / "weights.npz"
    np.savez(path, **published())
    return path


def backbone(path, **architecture) -> Backbone:
    return Backbone(kind="4ds", weights=str(path), architecture=ARCHITECTURE | architecture)


def norm(x, weights, key):
    centred = x - x.mean(-1, keepdims=True)
    return (
        centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * weights[f"{key}/scale"]
        + weights[f"{key}/bias"]
    )


def features(weights: dict, video: np.ndarray, blocks: int) -> np.ndarray:
    """The input of block `blocks`, t h w d in fp64, of a video f h w c in [0, 1] on the grid of the learned
    positions."""
    weights = {key.removeprefix("params/"): value.astype(np.float64) for key, value in weights.items()}
    frames, height, width, _ = video.shape
    tubelets = video.reshape(frames // 2, 2, height // 16, 16, width // 16, 16, 3)
    tokens = np.einsum("tahpwqc,apqcd->thwd", tubelets, weights["encoder/patch_embedding/Conv_0/kernel"])
    tokens = tokens + weights["encoder/patch_embedding/Conv_0/bias"] + weights["encoder/posenc/embeddings"]
    shape = tokens.shape
    x = tokens.reshape(-1, shape[-1])
    for block in range(blocks):
        layer = f"processor/layers_{block}"
        normed = norm(x, weights, f"{layer}/attention_norm")
        query, key, value = (
            np.einsum("nd,dak->nak", normed, weights[f"{layer}/attention/{part}/kernel"])
            + weights[f"{layer}/attention/{part}/bias"]
            for part in ("query", "key", "value")
        )
        logits = np.einsum("nak,mak->anm", query, key) / np.sqrt(query.shape[-1])
        attended = np.exp(logits - logits.max(-1, keepdims=True))
        mixed = np.einsum("anm,mak->nak", attended / attended.sum(-1, keepdims=True), value)
        x = (
            x
            + np.einsum("nak,akd->nd", mixed, weights[f"{layer}/attention/out/kernel"])
            + weights[f"{layer}/attention/out/bias"]
        )
        hidden = (
            norm(x, weights, f"{layer}/mlp_norm") @ weights[f"{layer}/mlp/dense_in/kernel"]
            + weights[f"{layer}/mlp/dense_in/bias"]
        )
        hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + hidden @ weights[f"{layer}/mlp/dense_out/kernel"] + weights[f"{layer}/mlp/dense_out/bias"]
    return x.reshape(shape)


@pytest.mark.parametrize("readout,blocks", [(1.0, 3), (0.7, 1), (0.2, 0)])
def test_published_weights_give_the_features_of_the_formulas(file, readout, blocks):
    """In fp64 both err by a few thousand roundings of 2^-53 at most, on values of order 1: less than 1e-12. Any
    difference of the formulas (tanh or erf GELU, eps 1e-5, a swapped axis) shows at 1e-4 or more."""
    module = FourDS(backbone(file, readout=readout), (224, 224)).double().eval()
    assert len(module.blocks) == blocks
    video = np.random.default_rng(1).random((16, 224, 224, 3))
    with torch.no_grad():
        latents = module(torch.from_numpy(video).permute(0, 3, 1, 2)[None])[0]
    expected = features(published(), video, blocks)
    assert latents.shape == expected.shape == (*POSITIONS, 24)
    np.testing.assert_allclose(latents.numpy(), expected, rtol=1e-10, atol=1e-10)


def test_a_file_with_a_readout_behind_the_backbone_loads_alike(file, tmp_path):
    whole = published("params/layers_0/") | {"params/layers_2/query": np.zeros((1, 2, 3), np.float32)}
    np.savez(tmp_path / "depth.npz", **whole)
    alone, with_readout = (FourDS(backbone(path), CROP).state_dict() for path in (file, tmp_path / "depth.npz"))
    assert alone.keys() == with_readout.keys() and all(torch.equal(alone[key], with_readout[key]) for key in alone)


@pytest.mark.parametrize("layers", [size.num_hidden_layers for size in SIZES.values()])
@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.95, 1.0])
def test_the_readout_is_the_one_of_the_published_list(layers, fraction):
    """The list by the number of blocks that computed each entry: the tokens, then the input of every block."""
    published_list = [0, *range(layers)]
    assert blocks_before(fraction, layers) == published_list[int(len(published_list) * fraction) - 1]


def test_positions_are_interpolated_linearly(file):
    """Positions that are linear in an index stay so on any grid: index i of n becomes (i + 1/2) N/n - 1/2 of the N
    learned positions, clamped to them."""
    module = FourDS(backbone(file), CROP)
    grid = (3, 5, 28)
    along = torch.meshgrid(*(torch.arange(float(count)) for count in POSITIONS), indexing="ij")
    with torch.no_grad():
        module.positions.copy_(torch.stack([along[channel % 3] for channel in range(24)], dim=-1))
        stretched = module._positions(torch.Size(grid))
    assert stretched.shape == (*grid, 24)
    for axis, (count, learned) in enumerate(zip(grid, POSITIONS, strict=True)):
        expected = ((torch.arange(count) + 0.5) * learned / count - 0.5).clamp(0, learned - 1)
        expected = expected.view([-1 if i == axis else 1 for i in range(3)]).expand(grid)
        torch.testing.assert_close(stretched[..., axis], expected, rtol=0, atol=1e-5)
    assert torch.equal(module._positions(torch.Size(POSITIONS)), module.positions)


def test_as_an_encoder(file):
    """Pixels are scaled to [0, 1], other sizes of clips are supported, and blocks after the readout don't exist."""
    chosen = backbone(file, image_size=48)
    preprocessing = Preprocessing.of(chosen)
    assert (preprocessing.resize, preprocessing.size, preprocessing.mean, preprocessing.std) == (
        48,
        (48, 48),
        (0.0,) * 3,
        (1.0,) * 3,
    )
    encoder = Encoder(chosen, preprocessing, torch.float32)
    assert torch.equal(
        encoder.normalise(torch.full((1, 2, 48, 48, 3), 255, dtype=torch.uint8)), torch.ones(1, 2, 3, 48, 48)
    )
    video = torch.randint(0, 256, (2, 6, 48, 48, 3), dtype=torch.uint8)
    assert encoder(video).shape == (2, *encoder.latent_shape(6)) == (2, 3, 3, 3, 24)
    assert len(encoder.backbone.blocks) == BLOCKS
    assert Preprocessing.of(Backbone(kind="4ds")).size == (224, 224)


def write_without(path, arrays, key=None, **replaced):
    np.savez(path, **{name: value for name, value in (arrays | replaced).items() if name != key})


def test_a_bad_file_is_named_with_its_key(file, tmp_path):
    path, arrays = tmp_path / "bad.npz", published()
    with pytest.raises(UserError, match=r"backbone.weights: there is no file .*nowhere.npz"):
        FourDS(backbone(tmp_path / "nowhere.npz"), CROP)
    key = "params/processor/layers_2/attention/out/bias"
    write_without(path, arrays, key)
    with pytest.raises(UserError, match=rf"bad.npz: has no key {key}$"):
        FourDS(backbone(path), CROP)
    key = "params/processor/layers_1/mlp/dense_in/kernel"
    write_without(path, arrays, **{key: np.zeros((40, 24), np.float32)})
    with pytest.raises(UserError, match=rf"bad.npz: {key} has shape \[40, 24\], .* makes it \[24, 40\]"):
        FourDS(backbone(path), CROP)
    write_without(path, arrays, "params/processor/layers_3/mlp/dense_in/kernel")  # of the block that does not run
    FourDS(backbone(path), CROP)
    path.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match="bad.npz: is no complete npz file"):
        FourDS(backbone(path), CROP)
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 255
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="bad.npz: params/.* is damaged"):
        FourDS(backbone(path), CROP)
    np.save(tmp_path / "bad.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="bad.npy: is no complete npz file"):
        FourDS(backbone(tmp_path / "bad.npy"), CROP)


@pytest.mark.parametrize(
    "architecture,message",
    [
        ({"size": "XL"}, r"architecture.size: 'XL' is none of S, B, L, H, g, G, e"),
        ({"hiden_size": 3}, r"architecture.hiden_size: 4DS has no such key"),
        ({"hidden_size": 48}, r"architecture: write either size or all of"),
        ({"size": "B", **vars(SIZE)}, r"architecture: write either size or all of"),
        ({**vars(SIZE), "hidden_size": 25}, r"architecture: .* a multiple of num_attention_heads"),
        ({"readout": 95}, r"architecture.readout: must be a fraction"),
    ],
)
def test_mistakes_in_the_architecture_are_named(architecture, message):
    with pytest.raises(UserError, match=f"backbone.{message}"):
        FourDS(Backbone(kind="4ds", architecture=architecture), CROP)


def test_frames_of_broken_patches_are_refused():
    with pytest.raises(UserError, match="whole patches"):
        FourDS(Backbone(kind="4ds", architecture=vars(SIZE)), (32, 40))
