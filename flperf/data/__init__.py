"""Where clips come from; `open_dataset` is the way in."""

from flperf.data.dataset import DATASETS, WITHOUT_VIDEO, Dataset, open_dataset, prepare_dataset
from flperf.data.preprocessing import Preprocessing
from flperf.data.samplers import BatchShare, ClipBatch
