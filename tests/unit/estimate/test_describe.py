"""The sizes that a run prints when it starts, and with --dry-run."""

from dataclasses import replace

import pytest
import torch
from runs import TINY

from flperf.config import parse_config
from flperf.data.annotations import SourceClips
from flperf.data.samplers import FrameSampling
from flperf.data.short_clips import ShortClips
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


def test_a_run_says_how_many_clips_are_short(built):
    components, _ = built
    by_time = FrameSampling(64, 2, "random", fps=12.5)
    known, unknown = ShortClips(by_time, "train.csv", 200, 31), ShortClips(by_time, "clips/val.csv", 40, None)
    dataset = replace(components.dataset, short={"train": known, "validation": unknown})
    lines = describe(replace(components, dataset=dataset)).splitlines()
    window, done = "5.04 s (64 frames, 12.5 a second)", "repeat their last frame (dataset.short_clips: pad)"
    assert f"clips     31 of 200 training clips are shorter than the window of {window} and {done}" in lines
    assert any("flperf index --csv clips/val.csv --out clips/val.index.csv" in line for line in lines)
    assert "shorter" not in describe(components)  # drawn clips


@pytest.mark.parametrize(("keys", "frames"), [({}, 64 * 2 - 1), ({"fps": 15.0}, 127), ({"fps": 60.0}, 32)])
def test_decoded_frames_of_a_clip_by_time_are_those_of_a_file_of_thirty_a_second(built, keys, frames):
    _, workload = built
    dataset = replace(workload.config.dataset, kind="kinetics_400", n_frames=64, stride=2, start="first", **keys)
    assert replace(workload, config=replace(workload.config, dataset=dataset)).frames == frames


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
