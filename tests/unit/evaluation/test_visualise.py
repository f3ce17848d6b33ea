"""Dumps: videos that play, tensors that are what was given, colours that compare, and the notebook that shows them."""

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import av
import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from runs import ROOT

from flperf.config import Config, Trainer
from flperf.data.demo import write_demo
from flperf.errors import UserError
from flperf.evaluation.visualise import Example, Projection, convert_video_tensor_to_mp4, save_mp4_video, write_example
from flperf.models.baselines import Baselines
from flperf.training.loop import Schedule

NAMES = {"video.pt", "video.mp4", "overview.png"} | {
    f"{part}_{what}" for part in ("context", "target", "prediction") for what in ("latents.pt", "pca.pt", "pca.mp4")
}


def latents(frames: int, seed: int = 0, dim: int = 6) -> torch.Tensor:
    return torch.randn(frames, 4, 5, dim, generator=torch.Generator().manual_seed(seed))


def example(**replaced) -> Example:
    place = torch.zeros(3, 4, 5, 6)
    baselines = Baselines(place, place, torch.zeros(3, 19, 6))
    video = torch.randint(0, 256, (10, 63, 65, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Example(
        **{
            "context": latents(2),
            "forecast": latents(3, 1),
            "target": latents(3, 2),
            "video": video,
            "baselines": baselines,
        }
        | replaced
    )


def decoded(path) -> tuple[np.ndarray, float]:
    with av.open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), rate


@pytest.mark.parametrize("size", [(64, 48), (63, 65), (1, 7)])
def test_a_video_plays_what_was_written(tmp_path, size):
    """A smooth picture: H.264 at this quality errs by a few levels; odd sizes gain a line that repeats the last one."""
    y, x = (torch.linspace(0, 1, n) for n in size)
    video = torch.stack([(y[:, None] + x + phase) / 3 for phase in torch.linspace(0, 1, 9)])[:, None].repeat(1, 3, 1, 1)
    frames, rate = convert_video_tensor_to_mp4(video)
    path = save_mp4_video(frames, tmp_path / "clip", rate)
    played, played_rate = decoded(path)
    assert path.name == "clip.mp4" and played.shape == frames.shape and played_rate == rate
    assert frames.shape[1] - size[0] in (0, 1) and frames.shape[2] - size[1] in (0, 1) and not frames.shape[1] % 2
    expected = (video * 255).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(frames[:, : size[0], : size[1]].astype(float) - expected).max() == 0
    assert np.abs(played.astype(float) - frames).mean() < 3


def test_a_wrong_shape_is_named():
    with pytest.raises(ValueError, match="t c h w"):
        convert_video_tensor_to_mp4(torch.zeros(3, 8, 8))


def test_one_basis_for_all():
    first = latents(5)
    projection = Projection(first)
    assert torch.equal(projection(first), Projection(first.clone())(first))
    assert projection(first).min() >= 0 and projection(first).max() <= 1
    assert torch.equal(projection(first[2:3]), projection(first)[2:3])
    # The basis is one of directions: latents that differ along none of the three strongest look alike.
    weak = torch.linalg.eigh(first.flatten(0, -2).double().T.cov()).eigenvectors[:, 0].float()
    torch.testing.assert_close(projection(first + 3 * weak), projection(first), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "values", [torch.zeros(3, 2, 2, 8), latents(3, dim=2), latents(3, dim=1)], ids=["constant", "two", "one"]
)
def test_degenerate_latents_have_colours_too(values):
    colours = Projection(values)(values)
    assert colours.shape == (*values.shape[:3], 3) and torch.isfinite(colours).all()


def test_an_example_holds_what_was_given(tmp_path):
    given = example()
    picture = write_example(tmp_path / "clip", given)
    assert picture.read_bytes()[:4] == b"\x89PNG" and {path.name for path in (tmp_path / "clip").iterdir()} == NAMES
    load = lambda name: torch.load(tmp_path / "clip" / f"{name}.pt", weights_only=True)  # noqa: E731
    for name, tensor in (("context", given.context), ("target", given.target), ("prediction", given.forecast)):
        assert torch.equal(load(f"{name}_latents"), tensor)
        assert load(f"{name}_pca").shape == (*tensor.shape[:3], 3)
    assert torch.equal(load("video"), given.video.permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("replaced", "missing"),
    [
        ({"video": None}, {"video.pt", "video.mp4"}),
        ({"target": None, "baselines": None}, {"target_latents.pt", "target_pca.pt", "target_pca.mp4"}),
        ({"forecast": latents(30, 1)}, set()),  # a roll-out far beyond the truth
        ({"forecast": latents(1, 1)}, set()),
    ],
    ids=["cached latents", "an unknown future", "a long roll-out", "a short forecast"],
)
def test_what_there_is_is_written(tmp_path, replaced, missing):
    write_example(tmp_path / "clip", example(**replaced))
    assert {path.name for path in (tmp_path / "clip").iterdir()} == NAMES - missing


def test_a_folder_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        write_example(tmp_path / "file" / "clip", example())


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    """Dumps of the demo, on fewer clips and for a few steps, stopped and resumed."""
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder / "data", {"train": 10, "validation": 2})
    changed = [
        f"experiment={folder}/experiment",
        *(f"dataset.{key}={folder}/data/{key}.csv" for key in ("train", "validation", "labels")),
    ]
    changed += [
        "trainer.batch_size=4",
        "trainer.max_steps=4",
        "trainer.stop_after=2",
        "evaluation.eval_every=2",
        "checkpoint.save_every=2",
    ]
    changed += ["latents.statistics_clips=4", "evaluation.sampling.steps=2", "engine.compile=false"]
    command = [sys.executable, str(ROOT / "flperf/train.py"), "--config", str(ROOT / "configs/demo.yaml"), *changed]
    for _ in range(2):
        finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert finished.returncode == 0, finished.stderr[-3000:]
    return folder / "experiment/demo/dump"


@pytest.mark.parametrize("clips", [1, 4, 10, 12])
def test_no_evaluation_takes_anothers_folder(clips):
    run = SimpleNamespace(
        config=Config(trainer=Trainer(batch_size=4, max_steps=30)), dataset=SimpleNamespace(train_size=clips)
    )
    names = [Schedule(run, 0).dump_name(step) for step in range(31)]
    assert len(set(names)) == 31
    ends = {math.ceil(epoch * clips / 4) for epoch in range(4 * 31)}  # steps with which an epoch ends
    assert {step for step, name in enumerate(names) if "step" not in name} == ends & set(range(31))


def test_a_run_leaves_a_folder_for_every_evaluation(dump):
    assert sorted(path.name for path in dump.iterdir()) == ["epoch_00_step_000002", "epoch_01_step_000004"]
    for evaluation in dump.iterdir():
        assert {path.name for path in evaluation.iterdir()} == {"example_00", "example_01"}
        assert {path.name for path in (evaluation / "example_01").iterdir()} == NAMES


def test_matplotlib_stays_unloaded_where_nothing_is_drawn():
    check = "import sys, flperf.training.loop; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, check=False).returncode == 0


def test_the_notebook_runs_from_top_to_bottom(dump):
    path = ROOT / "notebooks/visualise_dumps.ipynb"
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "strip the outputs before committing"
    os.environ["FLPERF_DUMP"] = str(dump)
    try:
        NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(path.parent)}}).execute()
    finally:
        del os.environ["FLPERF_DUMP"]
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in json.dumps(output.get("data", {})) for output in shown) >= 5
