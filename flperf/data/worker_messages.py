"""What worker processes are told and what they answer. Importing it does not import a decoder."""

from dataclasses import dataclass, field

from flperf.data.preprocessing import Preprocessing
from flperf.data.samplers import FrameSampling
from flperf.data.shared_memory import Place
from flperf.data.unreadable import Reasons

MESSAGE_BYTES = 2**16  # more than any message to or from the server has


@dataclass(frozen=True)
class Reading:
    """How a worker reads clips: uint8 `f h w c`."""

    frame_sampling: FrameSampling
    preprocessing: Preprocessing
    device: str = "cpu"  # the type of device on which DALI would decode
    reusing: bool = False  # leave to DALI only files for which it can use its decoder again
    cores: frozenset[int] = frozenset()  # to run on; all that are allowed if empty

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.frame_sampling.n_frames, *self.preprocessing.size, 3)


@dataclass(frozen=True)
class Task:
    """A clip to be read into a slot."""

    path: str
    uniform: float  # in [0, 1): where a random start falls
    place: Place
    with_dali: bool = False  # leave the decoding to DALI if it can be relied on for this file


@dataclass
class Answer:
    """A clip that has been read, or is left to DALI."""

    reasons: Reasons  # as `shortage` returns them
    indices: list[int] = field(default_factory=list)  # frames for DALI to decode; none if they have been decoded
    preprocessing: Preprocessing | None = None  # what is left to do on the frames that DALI decodes
    colours: list[list[float]] | None = None  # what corrects DALI's colours, see `colour_correction`
    obstacle: str | None = None  # why the clip was not left to DALI
    seconds: float = 0.0  # of the processor
