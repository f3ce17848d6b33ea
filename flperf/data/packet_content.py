"""What one packet of a video stream holds."""

from typing import NamedTuple

Orientation = tuple[int, ...]
"""Signs of (a, b, c, d) in x' = a x + c y, y' = b x + d y, by which a frame is turned and mirrored for display, with x
to the right and y downwards."""


class Content(NamedTuple):
    """What one packet holds."""

    frames: int | None  # that it becomes; None if only the decoder knows
    is_entry: bool = False  # decoding may start here; frames that come later but are shown before may not be decodable
    damage: str = ""  # why it, or what it refers to, can't be intact
    is_reference: bool = True  # later frames may refer to it
    parameters: bytes = b""  # of the sequence, which tell the size of its frames; empty if the packet has none
    orientation: Orientation | None = None  # of its frame and those shown after it
    order: int | None = None  # of display; None if the stream doesn't say


UNKNOWN = Content(None)
INTRA = Content(1, is_entry=True)
DAMAGED_HEAD = Content(1, damage="its head is damaged")
