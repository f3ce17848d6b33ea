"""The sizes that a run prints when it starts, and with --dry-run."""

from dataclasses import replace

import pytest
import torch
from runs import TINY

from flperf.config import parse_config
from flperf.data.annotations import SourceClips
from flperf.engine.devices import DEVICES
from flperf.engine.process import batch_share, start_process
from flperf.estimate.describe import describe
from flperf.estimate.workload import Workload, build_workload
from flperf.run import Components, build_components, flops_per_clip

PROCESSES = 2
CPU = replace(DEVICES["h100"], link=None)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Components, Workload]:
    folder = tmp_path_factory.mktemp("describe")
    config = parse_config(TINY.format(folder=folder), "tiny", ["name=tiny", "model.hidden_dim=512", "model.depth=1"])
    process = start_process()
    components = build_components(config, process, batch_share(config.trainer, replace(process, world_size=PROCESSES)))
    return components, build_workload(config, torch.float32, PROCESSES)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("micro_batch_size", [1, 2], ids=["accumulated", "one micro-batch"])
def test_a_dry_run_and_an_estimate_show_the_same_model_states(built, stage, dtype, micro_batch_size):
    components, workload = built
    share = replace(components.share, micro_batch_size=micro_batch_size)
    config = replace(components.config, engine=replace(components.config.engine, zero_stage=stage))
    text = describe(replace(components, config=config, dtype=dtype, share=share))
    estimated = replace(workload, config=config, dtype=dtype, share=share).states(stage, PROCESSES, CPU).total
    assert estimated > 10e6  # three digits of GB tell the stages apart
    assert f" {estimated / 1e9:.3f} GB of model states a process at ZeRO {stage};" in text


def test_an_estimate_counts_the_flops_that_a_run_logs(built):
    components, workload = built
    assert workload.flops == sum(flops_per_clip(components).values()) > 0


def test_a_run_says_what_it_mixes(built):
    """Without sources there is no such line."""
    components, _ = built
    assert "source " not in describe(components)
    sources = (SourceClips("a.csv", 8, 1.0), SourceClips("b.csv", 2, 3.0))
    train = replace(components.dataset.splits["train"], sources=sources)
    dataset = replace(components.dataset, splits=components.dataset.splits | {"train": train})
    text = describe(replace(components, dataset=dataset))
    assert "\nsource    a.csv: 8 clips, 0.25 of the samples; an epoch reads each clip 0.312 times\n" in text
    assert "\nsource    b.csv: 2 clips, 0.75 of the samples; an epoch reads each clip 3.75 times\n" in text
