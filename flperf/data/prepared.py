"""Which preprocessing is left to do on files that `flperf prepare` wrote.

Each such file says in its comment, as JSON, what was done to its frames. The file that describes the whole set, beside
its indices, says the same. So a file is recognised wherever it lies, and a configuration for which a set was not
prepared is refused before anything else is loaded.
"""

import json
import os
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flperf.data.preprocessing import Preprocessing, Size
from flperf.data.text_files import read_json
from flperf.errors import UserError

if TYPE_CHECKING:  # it imports a decoder
    from flperf.data.video_file import VideoFile

VERSION = 1
KEY = "flperf_prepared"  # of the JSON: the version
IDENTITY = "prepared.json"  # describes a set
PREPARE_AGAIN = (
    "prepare the original files again with this configuration, or once for several backbones with --short-side"
)


@dataclass(frozen=True)
class Preparation:
    """What was done to the frames of a file: resized and cropped as a backbone's `Preprocessing` does, or only resized
    if their shorter side was longer than `short_side`."""

    resize: int | Size | None
    crop: Size | None
    short_side: int | None
    shown: Size  # (height, width) of the frames without padding; of a set, the smallest possible
    shrunk: bool  # whether frames became smaller; of a set, whether those of any file did

    @classmethod
    def parse(cls, content: Any) -> "Preparation":
        """Raises `ValueError` if JSON does not describe a preparation."""
        try:
            if content[KEY] != VERSION:
                raise ValueError(f"it was prepared by another version of flperf (format {content[KEY]!r})")
            names = ("resize", "crop", "short_side", "shown")
            resize, crop, short_side, shown = (_as_size(content[name]) for name in names)
            if isinstance(crop, int) or isinstance(short_side, tuple) or not isinstance(shown, tuple):
                raise TypeError("sizes of the wrong kind")
            return cls(resize, crop, short_side, shown, content["shrunk"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"it doesn't say how it was prepared: {error}") from None

    def as_json(self) -> dict:
        """The JSON that `parse` reads."""
        return {KEY: VERSION} | asdict(self)

    def remaining(self, preprocessing: Preprocessing, where: str) -> Preprocessing:
        """What is left of a backbone's preprocessing. Raises `UserError` if it would need other frames than these."""
        if self.short_side is None:
            if (self.resize, self.crop) == (preprocessing.resize, preprocessing.crop):
                return replace(preprocessing, resize=None, crop=preprocessing.size, shown=self.shown)
            done = replace(preprocessing, resize=self.resize, crop=self.crop).describe()
            raise UserError(
                f"{where}: was prepared for frames {done}; this backbone needs them {preprocessing.describe()}: "
                f"{PREPARE_AGAIN}"
            )
        height, width = preprocessing.smallest
        if self.shrunk and (self.shown[0] < height or self.shown[1] < width):
            raise UserError(
                f"{where}: was prepared with --short-side {self.short_side}; this backbone needs frames "
                f"{preprocessing.describe()}, which would be enlarged: prepare the original files again with "
                f"--short-side {max(height, width)}"
            )
        return replace(preprocessing, shown=self.shown)


def is_prepared(file: "VideoFile") -> bool:
    """Whether `flperf prepare` wrote a file."""
    return file.container.metadata.get("comment", "").startswith(f'{{"{KEY}"')


def remaining_preprocessing(preprocessing: Preprocessing, file: "VideoFile") -> Preprocessing:
    """What is left to do on the frames of a file. Raises `UserError` if it was prepared for another backbone,
    `ValueError` if its comment is damaged."""
    if not is_prepared(file):
        return preprocessing
    return _parse_comment(file.container.metadata["comment"]).remaining(preprocessing, file.path)


def is_prepared_set(file: str | None) -> bool:
    """Whether the index of a split lies in a folder that `flperf prepare` wrote."""
    return file is not None and Path(file).with_name(IDENTITY).is_file()


def check_set(file: str | None, key: str, preprocessing: Preprocessing | None) -> None:
    """Raise `UserError` if an index that `key` names belongs to a set that was prepared for another backbone."""
    content = read_identity(Path(file or "").parent, key)
    if content is None or preprocessing is None:
        return
    try:
        preparation = Preparation.parse(content)
    except ValueError as error:
        raise UserError(f"{Path(file or '').parent / IDENTITY}: {error}; {PREPARE_AGAIN}") from None
    preparation.remaining(preprocessing, f"{key}: {file}")


def read_identity(folder: Path, key: str) -> dict | None:
    """The description of a prepared set; None of a folder that holds none."""
    file = folder / IDENTITY
    if not os.path.isfile(file):
        return None
    content = read_json(str(file), key, "another folder")
    if not isinstance(content, dict):
        raise UserError(f"{file}: does not describe a prepared set; choose another folder")
    return content


@lru_cache(maxsize=256)
def _parse_comment(comment: str) -> Preparation:
    try:
        content = json.loads(comment)
    except ValueError:
        raise ValueError("the comment that says how it was prepared is damaged") from None
    return Preparation.parse(content)


def _as_size(value: Any) -> Any:
    """A size as a tuple; a positive number and None as they are. Raises `TypeError` for anything else."""
    numbers = value if isinstance(value, list) and len(value) == 2 else [value]
    if value is not None and not all(type(number) is int and number > 0 for number in numbers):
        raise TypeError(f"{value!r} is not a size")
    return tuple(value) if isinstance(value, list) else value
