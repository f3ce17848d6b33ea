"""The preprocessing of the Hugging Face processors, compared with transformers and with plain torch."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers.image_transforms import get_resize_output_image_size

from flperf.config import Backbone
from flperf.data.preprocessing import Preprocessing
from flperf.errors import UserError

RULES = [
    Backbone(),
    Backbone(architecture={"crop_size": 64}),
    Backbone(kind="dinov3"),
    Backbone(kind="dinov3", architecture={"image_size": 48}),
]
SIZES = [(256, 340), (340, 256), (64, 64), (73, 200), (524, 70), (290, 646), (1080, 1920), (17, 23)]


def plain(preprocessing: Preprocessing, frames: torch.Tensor) -> torch.Tensor:
    """Resize the whole frame with F.interpolate, then crop."""
    geometry = preprocessing.geometry(*frames.shape[1:3])
    resized = F.interpolate(frames.permute(0, 3, 1, 2), size=geometry.resized, mode="bilinear", antialias=True)
    (top, left), (height, width) = geometry.offset, preprocessing.size
    return resized[:, :, top : top + height, left : left + width].permute(0, 2, 3, 1)


def noise(frames: int, height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("backbone", RULES, ids=lambda b: f"{b.kind}{b.architecture}")
def test_frames_are_those_of_plain_torch_bit_for_bit(backbone):
    preprocessing = Preprocessing.of(backbone)
    for size in SIZES:
        frames = noise(2, *size)
        assert torch.equal(preprocessing.apply(frames), plain(preprocessing, frames)), size


def test_random_sizes_bit_for_bit():
    random, preprocessing = np.random.default_rng(1), Preprocessing.of(Backbone(architecture={"crop_size": 56}))
    for _ in range(100):
        height, width = random.integers(20, 200, 2)
        frames = noise(1, height, width)
        assert torch.equal(preprocessing.apply(frames), plain(preprocessing, frames)), (height, width)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_offsets_are_those_of_transformers(size, monkeypatch):
    # not installed
    monkeypatch.setattr("transformers.image_utils.PIL", SimpleNamespace(Image=SimpleNamespace(Image=())), raising=False)
    preprocessing = Preprocessing.of(Backbone())
    geometry = preprocessing.geometry(*size)
    assert preprocessing.resize == 292  # int(256 * 256 / 224), floored
    assert geometry.resized == get_resize_output_image_size(
        np.zeros((3, *size)), 292, default_to_square=False, input_data_format="channels_first"
    )
    assert geometry.offset == tuple(int((edge - 256) / 2.0) for edge in geometry.resized)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("backbone", [*RULES, Backbone(kind="4ds")], ids=lambda b: f"{b.kind}{b.architecture}")
def test_a_gpus_frames_are_within_one_level(backbone, device):
    """A GPU resizes in fp32, and so does a CPU here; the processor resizes bytes. Edges of the frame are included."""
    preprocessing = Preprocessing.of(backbone)
    for size in [(96, 130), (130, 74), (256, 340), (60, 60), (57, 133), (30, 300), (1080, 1920)]:
        frames = noise(2, *size)
        resized = preprocessing.apply(frames.float() if device == "cpu" else frames.to(device)).cpu()
        assert torch.equal(resized, resized.round())
        assert (resized - preprocessing.apply(frames)).abs().max() <= 1, size


def test_dinov3_in_bytes_is_within_rounding_of_its_float_path():
    preprocessing = Preprocessing.of(Backbone(kind="dinov3"))
    frames = noise(1, 256, 340)
    exact = F.interpolate(frames.permute(0, 3, 1, 2).float(), size=(224, 224), mode="bilinear", antialias=True)
    assert (preprocessing.apply(frames).permute(0, 3, 1, 2) - exact).abs().max() <= 1.0  # two roundings, one an axis


@pytest.mark.parametrize(
    "name", ["video_preprocessor_config.json", "preprocessor_config.json", "processor_config.json"]
)
def test_the_stored_configuration_is_read(tmp_path, name):
    stored = {
        "crop_size": {"height": 384, "width": 384},
        "size": {"shortest_edge": 100},
        "image_mean": [0.5] * 3,
        "do_rescale": True,
    }
    (tmp_path / name).write_text(json.dumps({"video_processor": stored} if name == "processor_config.json" else stored))
    preprocessing = Preprocessing.of(Backbone(weights=str(tmp_path)))
    # the processor ignores the size in its file
    assert preprocessing.crop == (384, 384) and preprocessing.resize == 438
    assert preprocessing.mean == (0.5, 0.5, 0.5) and preprocessing.std == (0.229, 0.224, 0.225)
    replaced = Preprocessing.of(Backbone(weights=str(tmp_path), processor={"crop_size": 224, "do_normalize": False}))
    assert replaced.size == (224, 224) and replaced.resize == 256 and replaced.std == (1, 1, 1)


@pytest.mark.parametrize(
    "processor,message",
    [
        ({"crop_sise": 3}, "unknown key crop_sise"),
        ({"resample": 3}, "bilinear"),
        ({"do_center_crop": False}, "different sizes"),
        ({"size": {"shortest_edge": 100}}, "larger than the resized"),
        ({"size": "large"}, "is not a size"),
    ],
)
def test_unsupported_rules_are_refused(processor, message):
    with pytest.raises(UserError, match=f"backbone.processor: .*{message}"):
        Preprocessing.of(Backbone(processor=processor))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", "{}".encode("utf-16"), b'{"size": "\xe9"}'])
def test_a_damaged_configuration_is_named(tmp_path, content):
    (tmp_path / "preprocessor_config.json").write_bytes(content)
    with pytest.raises(UserError, match="preprocessor_config.json: (is not|holds no)"):
        Preprocessing.of(Backbone(weights=str(tmp_path)))


def test_weights_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for weights in (str(tmp_path), "/no/such/folder", "flperf/no-such-model"):
        with pytest.raises(UserError, match="backbone.weights: .*point it to"):
            Preprocessing.of(Backbone(weights=weights))
