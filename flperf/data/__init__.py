"""Clips for training and evaluation; `open_dataset` opens a dataset."""

from flperf.data.dataset import Dataset, load_with
from flperf.data.kinds import DATASETS, WITHOUT_VIDEO, open_dataset, prepare_dataset
from flperf.data.loader import Reader
from flperf.data.preprocessing import Preprocessing
from flperf.data.samplers import BatchShare, ClipBatch
from flperf.data.videos import read_frames
