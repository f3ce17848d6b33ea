"""The table of frozen backbones by `backbone.kind`. A new one is a file in this folder and a line in the table; the
rule by which its frames are resized goes into flperf/data/preprocessing.py.

A backbone is built from `(Backbone, crop)` and maps normalised pixels `b f c h w` to latents `b t h w d`. Attributes:
`blocks` (compiled one by one), `patch_size`, `dim`, `frames_per_latent` (video frames from one latent frame to the
next) and `frames_covered` (how many of these, from the first on, a latent frame is computed from).
"""

from flperf.models.backbones.dinov3 import DINOv3
from flperf.models.backbones.four_ds import FourDS
from flperf.models.backbones.vjepa2 import VJEPA2

BACKBONES = {"vjepa2": VJEPA2, "dinov3": DINOv3, "4ds": FourDS}
