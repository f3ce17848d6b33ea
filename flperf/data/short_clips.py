"""How many clips of a split are shorter than the window. An index tells before any file is read."""

from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from flperf.data.annotations import Annotations
from flperf.data.samplers import FrameSampling
from flperf.data.unreadable import SHORTEN_WINDOW
from flperf.errors import UserError


@dataclass(frozen=True)
class ShortClips:
    """The number of short clips among the `clips` of a split that the file names; None without an index."""

    frame_sampling: FrameSampling
    file: str
    clips: int
    short: int | None

    def describe(self, split: str) -> str:
        """One sentence, for example on the "training" clips."""
        window = self.frame_sampling.describe()
        if self.short is None:
            index = Path(self.file).with_suffix(".index.csv")
            return (
                f"how many {split} clips are shorter than the window of {window} is unknown without an index: "
                f"flperf index --csv {quote(self.file)} --out {quote(str(index))}"
            )
        done = {"pad": "repeat their last frame", "skip": "are left out"}[self.frame_sampling.short_clips]
        consequence = f" and {done} (dataset.short_clips: {self.frame_sampling.short_clips})" if self.short else ""
        return f"{self.short} of {self.clips} {split} clips are shorter than the window of {window}{consequence}"


def choose_clips(
    annotations: Annotations, frame_sampling: FrameSampling, file: str, limit: int | None
) -> tuple[Annotations, ShortClips]:
    """The clips of a split to be used, the first `limit` of them, and the number of short ones, which are left out if
    `dataset.short_clips` is "skip". Raises `UserError` if no clip remains."""
    skip = frame_sampling.short_clips == "skip"
    if annotations.lengths is None or not skip:
        annotations = annotations.chosen(range(len(annotations))[:limit])
    if annotations.lengths is None:
        return annotations, ShortClips(frame_sampling, file, len(annotations), None)
    long = [row for row, length in enumerate(annotations.lengths) if not frame_sampling.is_short(*length)]
    found = ShortClips(frame_sampling, file, len(annotations), len(annotations) - len(long))
    if not skip:
        return annotations, found
    if not long:
        raise UserError(
            f"{file}: all {found.clips} clips are shorter than the window of "
            f"{frame_sampling.describe()}; {SHORTEN_WINDOW}"
        )
    return annotations.chosen(long[:limit]), found
