"""The preprocessing of the backbone's Hugging Face processor, applied by both decoders.

The processors themselves need torchvision, so this file implements their rules (transformers 5.23:
VJEPA2VideoProcessor, DINOv3ViTImageProcessor), and that of 4DS, whose weights come without one: resize with antialiased
bilinear weights, centre crop, then `rescale * x`, `- mean`, `/ std`. The decoders resize and crop 8-bit frames; the
compiled encoder does the rest, so that only bytes are copied to the device.
"""

import math
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from flperf.config import Backbone
from flperf.data.text_files import read_json
from flperf.errors import UserError, first_line

Size = tuple[int, int]  # (height, width)
BLOCK = 16  # pixels across a block of H.264

_COMMON = {
    "do_resize": True,
    "resample": 2,  # PIL's bilinear
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
# in the order in which transformers looks for them
_FILES = ("processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class Geometry:
    """For frames of one size: resize to `resized`, crop at `offset`."""

    resized: Size
    offset: tuple[int, int]  # (top, left) of the crop in the resized frame


@dataclass(frozen=True)
class Preprocessing:
    """Resize to a shortest edge or an exact size, centre crop; the encoder computes `(rescale * x - mean) / std`.

    Frames that `flperf prepare` stored are padded to whole blocks on the right and at the bottom: only the part `shown`
    is used, and with `resize` None it is taken as it is.
    """

    resize: int | Size | None
    crop: Size | None
    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shown: Size | None = None

    @classmethod
    def of(cls, backbone: Backbone) -> "Preprocessing":
        """The preprocessing of a backbone. Raises `UserError` if its configuration can't be read or is not
        supported."""
        settings = _settings(backbone)
        if not settings["do_resize"] or settings["resample"] != 2:
            raise UserError(
                "backbone.processor: only resizing (do_resize) with bilinear weights (resample 2) is supported"
            )
        crop = _as_size(settings["crop_size"]) if settings["do_center_crop"] else None
        resize = _resize_rule(settings["size"])
        if crop is None and isinstance(resize, int):
            raise UserError(
                "backbone.processor: a shortest edge without crop_size leaves clips of different sizes; set "
                "do_center_crop"
            )
        smallest = (resize, resize) if isinstance(resize, int) else resize
        if crop and (crop[0] > smallest[0] or crop[1] > smallest[1]):
            raise UserError(f"backbone.processor: crop_size {crop} is larger than the resized frame {smallest}")
        return cls(
            resize=resize,
            crop=crop,
            rescale=settings["rescale_factor"] if settings["do_rescale"] else 1.0,
            mean=tuple(settings["image_mean"]) if settings["do_normalize"] else (0.0, 0.0, 0.0),
            std=tuple(settings["image_std"]) if settings["do_normalize"] else (1.0, 1.0, 1.0),
        )

    @property
    def size(self) -> Size:
        """(height, width) of the result."""
        return self.crop or cast(Size, self.resize)  # a shortest edge always has a crop

    def geometry(self, height: int, width: int) -> Geometry:
        """Resized size (the longer edge floored) and integer crop offsets as the processor computes them."""
        if isinstance(self.resize, int):
            longer = int(self.resize * max(height, width) / min(height, width))
            resized = (self.resize, longer) if height <= width else (longer, self.resize)
        else:
            resized = self.resize or self.size
        offset = ((resized[0] - self.size[0]) // 2, (resized[1] - self.size[1]) // 2)
        return Geometry(resized, offset)

    def visible(self, frames: Tensor) -> Tensor:
        """Frames `… h w c` without the padding of prepared ones. Raises `ValueError` if they have another size than
        they were prepared in."""
        if self.shown is None:
            return frames
        height, width = frames.shape[-3:-1]
        if (height, width) != padded(self.shown):
            needed = _in_words(padded(self.shown))
            raise ValueError(f"its frames are {_in_words((height, width))}, but were prepared as {needed}")
        return frames[..., : self.shown[0], : self.shown[1], :]

    @property
    def smallest(self) -> Size:
        """(height, width) below which frames are enlarged."""
        return (self.resize, self.resize) if isinstance(self.resize, int) else self.resize or self.size

    def describe(self) -> str:
        """What is done to frames, in words."""
        resized = f"a shorter edge of {self.resize}" if isinstance(self.resize, int) else _in_words(self.resize)
        return f"resized to {resized}" + (f", cropped to {_in_words(self.crop)}" if self.crop else "")

    def apply(self, frames: Tensor) -> Tensor:
        """Resize and crop uint8 frames `f h w c`, bit for bit as `F.interpolate(…, antialias=True)` and a crop would.
        On a GPU, whose kernel has no uint8, the result is fp32: whole numbers within 1 of the uint8 result.

        Pixels right of and below the crop are not computed, which saves a quarter of the time at 340 × 256. The kernel
        gets the scale as an argument, so it needs neither the whole frame nor the whole output. Returns a view.
        Raises `ValueError` for frames that are not of the size in which they were prepared.
        """
        frames = self.visible(frames)
        if self.resize is None:
            return frames
        (top, left), (height, width) = self.geometry(frames.shape[1], frames.shape[2]).offset, self.size
        rows, columns = _extents(self, frames.shape[1], frames.shape[2])
        # f c h w by strides only, as the kernel requires
        needed = frames[:, : rows.source, : columns.source].permute(0, 3, 1, 2)
        if needed.is_cuda:
            needed = needed.float()
        resized = torch.ops.aten._upsample_bilinear2d_aa(
            needed, (rows.resized, columns.resized), False, rows.factor, columns.factor
        )  # the operator of F.interpolate, called directly because it takes sizes and factors together
        cropped = resized[:, :, top : top + height, left : left + width].permute(0, 2, 3, 1)
        return cropped.round() if cropped.is_floating_point() else cropped


def padded(size: Size) -> Size:
    """(height, width) of whole blocks that hold a frame. A size of whole blocks is stored without cropping, on which
    NVDEC's cached decoders depend."""
    height, width = (-(-length // BLOCK) * BLOCK for length in size)
    return height, width


def _in_words(size: Size | None) -> str:
    return f"{size[0]} x {size[1]}" if size else "nothing"


@dataclass(frozen=True)
class _Extent:
    source: int
    resized: int
    factor: float


@lru_cache
def _extents(preprocessing: Preprocessing, height: int, width: int) -> tuple[_Extent, _Extent]:
    """What `apply` reads and computes of the rows and columns of a frame; the frames of a clip are resized one by
    one."""
    geometry = preprocessing.geometry(height, width)
    ends = (offset + size for offset, size in zip(geometry.offset, preprocessing.size, strict=True))
    rows, columns = map(_extent, (height, width), geometry.resized, ends)
    return rows, columns


def _extent(source: int, resized: int, end: int) -> _Extent:
    """How much of an axis to read and to compute for the first `end` positions of the resized axis."""
    scale = source / resized
    needed = min(source, math.ceil(end * scale + max(scale, 1.0)) + 1)  # the filter reaches max(scale, 1) further
    if needed == end < resized:  # with equal sizes the operator would leave the axis as it is
        end += 1
    return _Extent(needed, end, resized / source)


def _settings(backbone: Backbone) -> dict[str, Any]:
    """The processor's keys: the defaults of its class, overridden by its file, overridden by `backbone.processor`."""
    defaults = _class_defaults(backbone)
    stored = _read_file(backbone.weights) if backbone.weights and backbone.kind != "4ds" else {}
    settings = defaults | {key: value for key, value in stored.items() if key in defaults and value is not None}
    if backbone.kind == "vjepa2":  # its processor ignores the size in its file and computes it from the crop
        settings["size"] = {"shortest_edge": int(_as_size((settings | backbone.processor)["crop_size"])[0] * 256 / 224)}
    for key in backbone.processor:
        if key not in defaults:
            raise UserError(f"backbone.processor: unknown key {key}: known here: {', '.join(defaults)}")
    return settings | backbone.processor


def _class_defaults(backbone: Backbone) -> dict[str, Any]:
    """The defaults of the processor class, at the image size of the architecture."""
    if backbone.kind == "vjepa2":
        crop_size = backbone.architecture.get("crop_size") or 256
        return _COMMON | {"do_center_crop": True, "crop_size": crop_size, "size": None}
    image_size = backbone.architecture.get("image_size") or 224
    if backbone.kind == "4ds":  # pixels in [0, 1] as they are
        return _COMMON | {
            "do_normalize": False,
            "do_center_crop": True,
            "crop_size": image_size,
            "size": {"shortest_edge": image_size},
        }
    return _COMMON | {"do_center_crop": False, "crop_size": image_size, "size": image_size}


def _read_file(weights: str) -> dict[str, Any]:
    """The preprocessor configuration of a local folder or of the hub."""
    for name in _FILES:
        file = os.path.join(weights, name) if os.path.isdir(weights) else _from_hub(weights, name)
        if file is None or not os.path.isfile(file):
            continue
        stored = read_json(file, "backbone.weights", "a folder as on the hub")
        if not isinstance(stored, dict):
            raise UserError(f"{file}: holds no settings of a processor; download it again")
        if name == "processor_config.json":  # since transformers 5, one file for all processors of a model
            stored = stored.get("video_processor") or stored.get("image_processor")
        if stored is not None:
            return stored
    raise UserError(
        f"backbone.weights: {weights} holds none of {', '.join(_FILES)}; point it to a folder that does, as on the hub"
    )


def _from_hub(name: str, filename: str) -> str | None:
    """Path of a file in the hub's cache, downloaded if necessary; None if the repository has no such file."""
    from huggingface_hub import errors, hf_hub_download  # imported only for names of the hub

    try:
        return hf_hub_download(name, filename)
    except errors.LocalEntryNotFoundError:
        reason = "the hub can't be reached, and the local cache does not have it"
    except errors.EntryNotFoundError:
        return None
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        reason = first_line(error)
    raise UserError(f"backbone.weights: {name} is not a local folder, and {reason}; point it to a downloaded copy")


def _resize_rule(size: Any) -> int | Size:
    if isinstance(size, dict) and "shortest_edge" in size:
        return size["shortest_edge"]
    return _as_size(size)


def _as_size(size: Any) -> Size:
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict) and size.keys() >= {"height", "width"}:
        return size["height"], size["width"]
    raise UserError(
        f"backbone.processor: {size!r} is not a size: write 256, {{shortest_edge: 292}} or {{height: 224, width: 224}}"
    )
