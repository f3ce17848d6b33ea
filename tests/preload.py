"""Imported once by the parent of the forked processes (see worlds.py): whatever a command of flperf imports. Nothing
here may start threads, which a fork does not copy.
"""

import gc

import deepspeed  # noqa: F401
import pytest  # noqa: F401
import scipy.optimize  # noqa: F401
import sklearn.linear_model  # noqa: F401
from transformers import DINOv3ViTModel, VJEPA2Model, VJEPA2VideoProcessor  # noqa: F401

import flperf.cli
import flperf.training.loop

for command in flperf.cli.COMMANDS:
    flperf.cli.load_command(command)
gc.freeze()  # else the first collection in a child writes to, and so copies, the memory of all that is imported here
