"""Examples that a run dumps at each evaluation, and the notebook that shows them."""

import json
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient
from runs import ROOT
from worlds import flperf

from flperf.data.demo import write_demo


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    """The dump folder of a short run of the demo on a few clips, stopped and resumed."""
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder / "data", {"train": 10, "validation": 2})
    arguments = [
        *("--config", str(ROOT / "configs/demo.yaml"), f"experiment={folder}/experiment"),
        *(f"dataset.{key}={folder}/data/{key}.csv" for key in ("train", "validation", "labels")),
        *("trainer.batch_size=4", "trainer.max_steps=4", "trainer.stop_after=2"),
        *("evaluation.eval_every=2", "checkpoint.save_every=2"),
        *("latents.statistics_clips=4", "evaluation.sampling.steps=2", "engine.compile=false", "engine.precision=fp32"),
        *("backbone.architecture.hidden_size=24", "backbone.architecture.pred_num_hidden_layers=1", "model.depth=1"),
    ]
    for _ in range(2):
        finished = flperf("train", *arguments)
        assert finished.returncode == 0, finished.stderr[-3000:]
    return folder / "experiment/demo/dump"


def test_a_run_leaves_a_folder_for_each_evaluation(dump):
    assert sorted(path.name for path in dump.iterdir()) == ["epoch_00_step_000002", "epoch_01_step_000004"]
    for evaluation in dump.iterdir():
        assert {path.name for path in evaluation.iterdir()} == {"example_00", "example_01"}
        files = {path.name for path in (evaluation / "example_01").iterdir()}
        assert {"video.mp4", "overview.png", "prediction_latents.pt", "target_pca.mp4"} <= files


def test_the_notebook_runs_from_top_to_bottom(dump, monkeypatch):
    path = ROOT / "notebooks/visualise_dumps.ipynb"
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "strip the outputs before committing"
    monkeypatch.setenv("FLPERF_DUMP", str(dump))
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(path.parent)}}).execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in json.dumps(output.get("data", {})) for output in shown) >= 5


def test_training_does_not_import_matplotlib():
    check = "import sys, flperf.training.loop; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, check=False).returncode == 0
