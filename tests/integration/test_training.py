"""Short runs of the whole line under the real launcher, with 1 and 2 processes over gloo."""

import gzip
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from runs import BACKBONES, REGIMES, ROOT, curves, launch

from flperf.config import dump_config, load_config
from flperf.engine import preemption as interruption
from flperf.engine.checkpoint_files import latest_checkpoint, read_index, read_weights
from flperf.engine.compile_cache import CACHE_VARIABLES
from flperf.errors import UserError
from flperf.objectives.regression import Regression
from flperf.train import train as train_here
from flperf.training import loop

STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def matrix(tiny) -> dict[str, dict]:
    """Every regime x backbone x ZeRO stage in fp32, every regime x stage in bf16, with 2 processes; and fp32 with
    accumulation."""
    requests = {
        f"{regime}-{backbone}-{stage}": REGIMES[regime] + BACKBONES[backbone] + [f"engine.zero_stage={stage}"]
        for regime, backbone, stage in itertools.product(REGIMES, BACKBONES, STAGES)
    }
    requests |= {
        f"{regime}-bf16-{stage}": REGIMES[regime] + ["engine.precision=bf16", f"engine.zero_stage={stage}"]
        for regime, stage in itertools.product(REGIMES, STAGES)
    }
    requests |= {
        f"{regime}-accumulated": REGIMES[regime] + ["trainer.micro_batch_size=1", "engine.zero_stage=2"]
        for regime in REGIMES
    }
    return curves(tiny, requests, processes=2)


@pytest.mark.parametrize(("regime", "backbone"), itertools.product(REGIMES, BACKBONES))
def test_zero_stages_train_alike_in_fp32(matrix, regime, backbone):
    """The stages differ in the order of sums alone. Each fp32 sum over at most 2^17 gradients errs by less than 2^-24
    * 17 relatively (pairwise), and four updates at a rate of 1e-3 carry that on by less than a factor of ten:
    1e-5."""
    curves = [matrix[f"{regime}-{backbone}-{stage}"] for stage in STAGES]
    assert len(curves[0]["loss"]) == len(curves[0]["seen"]) == 4
    for other in curves[1:]:
        assert other["loss"] == pytest.approx(curves[0]["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(curves[0]["grad_norm"], rel=1e-4)
        assert other["seen"] == curves[0]["seen"]


@pytest.mark.parametrize("regime", REGIMES)
def test_zero_stages_train_alike_in_bf16(matrix, regime):
    """Gradients are averaged in bf16, so each errs by up to 2^-8 relatively; an update moves a weight by at most the
    rate 1e-3 (Adam), and the loss by at most grad_norm * |update| of it: sum over the updates of 2^-8 * grad_norm *
    1e-3 * sqrt(parameters)."""
    reference = matrix[f"{regime}-bf16-0"]
    parameters = 60_000
    bound = sum(2**-8 * norm * 1e-3 * parameters**0.5 for norm in reference["grad_norm"])
    for stage in STAGES[1:]:
        assert matrix[f"{regime}-bf16-{stage}"]["loss"] == pytest.approx(reference["loss"], abs=bound)


@pytest.mark.parametrize("regime", REGIMES)
def test_accumulation_equals_one_large_batch(matrix, regime):
    assert matrix[f"{regime}-accumulated"]["loss"] == pytest.approx(matrix[f"{regime}-vjepa2-2"]["loss"], rel=1e-5)


def test_one_process_sees_and_learns_the_same_as_two(matrix, tiny):
    """1 process x batch 4 against 2 processes x batch 2: the same clips, noise and losses in every step."""
    requests = {f"{regime}-alone": REGIMES[regime] for regime in REGIMES}
    alone = curves(tiny, requests, processes=1)
    for regime in REGIMES:
        one, two = alone[f"{regime}-alone"], matrix[f"{regime}-vjepa2-1"]
        assert len(one["seen"]) == 4 and one["seen"] == two["seen"]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


def test_validation_counts_every_clip_once_at_any_world_size(matrix, tiny):
    """5 clips on 2 processes x batch 2 leave a partial batch; the result must be that of one process."""
    alone = curves(tiny, {"validation-alone": REGIMES["flow_matching"]}, processes=1)["validation-alone"]
    (one,), (two,) = alone["validation"], matrix["flow_matching-vjepa2-1"]["validation"]
    for key in ("copy_last_l1", "mean_mse"):
        assert one[key] == pytest.approx(two[key], rel=1e-6)
    assert one["forecast_mse"] == pytest.approx(two["forecast_mse"], rel=1e-4)


RESUMED = [
    (regime, stage, precision)
    for regime, stage in [("flow_matching", 0), ("flow_matching", 1), ("predictor", 2), ("cross_attention", 3)]
    for precision in ("fp32", "bf16")
]


@pytest.fixture(scope="module")
def resumed(tiny) -> tuple[dict, dict]:
    """Six steps in one launch, and three steps; then a second launch that goes on with the latter."""
    common = {
        f"{regime}-{stage}-{precision}": REGIMES[regime]
        + [f"engine.zero_stage={stage}", f"engine.precision={precision}", "trainer.max_steps=6"]
        for regime, stage, precision in RESUMED
    }
    wholes = {f"whole-{name}": overrides for name, overrides in common.items()}
    parts = {f"parts-{name}": [*overrides, "trainer.stop_after=3"] for name, overrides in common.items()}
    first = curves(tiny, wholes | parts, processes=1)
    return first, curves(tiny, {f"parts-{name}": overrides for name, overrides in common.items()}, processes=1)


@pytest.mark.parametrize(("regime", "stage", "precision"), RESUMED)
def test_resumed_training_is_the_undisturbed_one(resumed, regime, stage, precision):
    """Bit for bit in fp32. oneDNN's bf16 products differ from run to run on a CPU, disturbed or not: there to a
    bf16's rounding, 2^-8."""
    (first, second), name = resumed, f"{regime}-{stage}-{precision}"
    whole, rest = first[f"whole-{name}"], second[f"parts-{name}"]
    tolerance = 0.0 if precision == "fp32" else 2**-8
    assert rest["step"] == [1, 2, 3, 4, 5, 6]  # one file of metrics for both launches
    assert first[f"parts-{name}"]["seen"] + rest["seen"] == whole["seen"] and len(whole["seen"]) == 6
    for key in ("loss", "grad_norm"):
        assert rest[key] == pytest.approx(whole[key], rel=tolerance, abs=0)
    forecast = [line["validation"][-1]["forecast_mse"] for line in (rest, whole)]  # of the averaged weights
    assert forecast[0] == pytest.approx(forecast[1], rel=tolerance, abs=0)


def train(config, *arguments: str, processes: int = 1, **environment: str) -> subprocess.CompletedProcess:
    return launch(processes, str(ROOT / "flperf/train.py"), "--config", str(config), *arguments, **environment)


@pytest.fixture
def here(tiny, tmp_path, monkeypatch):
    """The real entry point inside this process, which it leaves as it was. Returns the run's folder and what ended
    the run."""
    handlers = {number: signal.getsignal(number) for number in interruption.STOP_SIGNALS}
    monkeypatch.setattr(interruption, "_received", [])

    def start(name: str, *arguments: str) -> tuple[Path, BaseException | None]:
        folder, end = tiny.parent / "experiment" / name, None
        try:
            train_here(["--config", str(tiny), f"name={name}", *arguments])
        except (UserError, SystemExit) as error:
            end = error
        return folder, end

    with mock.patch.dict(os.environ, dict.fromkeys(CACHE_VARIABLES, str(tmp_path))):
        yield start
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_two_processes_with_compiled_blocks_at_zero_3(tiny):
    """Parameters that come and go under the compiled graphs: the losses must be those of eager ZeRO 1."""
    common = [*REGIMES["flow_matching"], "checkpoint.save_every=1000"]
    runs = curves(
        tiny,
        {
            "eager": [*common, "engine.zero_stage=1", "evaluation.dump_examples=1"],
            "compiled": [*common, "engine.zero_stage=3", "engine.compile=true"],
        },
        processes=2,
    )
    assert runs["compiled"]["loss"] == pytest.approx(runs["eager"]["loss"], rel=1e-5)
    (example,) = tiny.parent.glob("experiment/eager/dump/*/*")  # one, of one of the processes
    assert (example / "overview.png").is_file()


def test_nothing_recompiles_after_the_second_step(tiny):
    script = (
        "import sys, torch, flperf.training.loop as loop\n"
        "from flperf import train\n"
        "steps, original = [], loop.train_step\n"
        "def step(*arguments):\n"
        "    torch._dynamo.config.error_on_recompile = len(steps) >= 2\n"
        "    steps.append(1)\n"
        "    result = original(*arguments)\n"
        "    torch._dynamo.config.error_on_recompile = False\n"  # evaluation has graphs of its own
        "    return result\n"
        "loop.train_step = step\n"
        "train.main(sys.argv[1:])\n"
        "print('steps', len(steps))\n"
    )
    arguments = [
        "--config",
        str(tiny),
        *REGIMES["flow_matching"],
        "name=recompile",
        "engine.compile=true",
        "evaluation.eval_every=1000",
    ]
    finished = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=600, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "steps 4" in finished.stdout


def losses_in(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of every training step that was logged."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if "split" not in line]


def test_a_killed_run_comes_back(tiny, here):
    """SIGKILL at an arbitrary moment of a run that saves after every step; the next start resumes and ends where it
    should, with the losses of an undisturbed run, bit for bit."""
    arguments = [
        "--config",
        str(tiny),
        "name=killed",
        "trainer.max_steps=400",
        "checkpoint.save_every=1",
        "checkpoint.keep=3",
    ]
    folder = tiny.parent / "experiment/killed"
    command = [sys.executable, str(ROOT / "flperf/train.py"), *arguments]
    for moment in (3, 7):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.time() + 120
        while (
            not (folder / "metrics.jsonl").exists()
            or len(folder.joinpath("metrics.jsonl").read_text().splitlines()) < moment
        ):
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finished = train(tiny, *arguments[2:], "trainer.stop_after=3")
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "resumed at step" in finished.stdout
    losses = losses_in(folder)
    steps = [step for step, _ in losses]
    undisturbed, _ = here(
        "undisturbed", "trainer.max_steps=400", "evaluation.dump_examples=0", f"trainer.stop_after={steps[-1]}"
    )
    assert set(losses) == set(losses_in(undisturbed))
    assert int(folder.joinpath("checkpoints/latest").read_text().removeprefix("step_")) == steps[-1]
    assert len([path for path in folder.joinpath("checkpoints").glob("step_*") if path.is_dir()]) <= 4


def test_a_signal_is_obeyed_before_the_next_validation(here, monkeypatch):
    """The vote on it takes one step; the validation that is then due would take the time that is left."""
    steps, validated = loop.train_step, []

    def step(*arguments):
        os.kill(os.getpid(), signal.SIGUSR1)
        return steps(*arguments)

    monkeypatch.setattr(loop, "train_step", step)
    monkeypatch.setattr(loop, "validate", lambda run, tracker, schedule, step: validated.append(step))
    folder, end = here("obedient", "evaluation.eval_every=1")
    assert isinstance(end, interruption.Preempted) and validated == [1]
    assert latest_checkpoint(folder / "checkpoints").name == "step_00000002"


def test_a_validation_that_fails_takes_no_step_along(here, monkeypatch):
    def fail(*_):
        raise UserError("no clip can be read")

    monkeypatch.setattr(loop, "validate", fail)
    folder, end = here("unlucky", "evaluation.eval_every=2", "checkpoint.save_every=2")
    assert "no clip can be read" in str(end) and latest_checkpoint(folder / "checkpoints").name == "step_00000002"


def test_a_dry_run_does_not_mind_an_earlier_run(here, tiny):
    folder, end = here("earlier", "--dry-run")
    assert end is None and not folder.exists()
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(load_config(tiny, ["name=earlier", "seed=7"])))
    assert here("earlier", "--dry-run") == (folder, None)
    _, end = here("earlier")
    assert "seed: 7 -> 0" in str(end) and [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_a_run_explains_itself_and_is_not_overwritten(tiny):
    arguments = ["name=kept", "trainer.max_steps=2"]
    assert train(tiny, *arguments).returncode == 0
    folder = tiny.parent / "experiment/kept"
    description = json.loads((folder / "run.json").read_text())
    assert description["world_size"] == 1 and description["versions"]["torch"] and description["command"]
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    expected = (
        "step epoch loss lr grad_norm clips_per_s tokens_per_s step_ms data_ms encode_ms head_ms optim_ms mfu memory_gb"
    )
    assert {*expected.split(), "skipped_clips"} <= line.keys()

    other = train(tiny, *arguments, "model.depth=3")
    assert other.returncode != 0 and "model.depth: 2 -> 3" in other.stderr and "Traceback" not in other.stderr
    again = train(tiny, *arguments, "tracking.log_every=2")
    assert again.returncode == 0 and "step 2 of 2" in again.stdout
    anew = train(tiny, *arguments, "model.depth=3", "--overwrite")
    assert anew.returncode == 0 and (folder.parent / "kept.replaced-1/metrics.jsonl").exists()


def test_dry_run_says_sizes_and_writes_nothing(tiny):
    finished = train(tiny, "--dry-run", "name=dry", *REGIMES["flow_matching"], processes=2)
    assert finished.returncode == 0, finished.stderr[-3000:]
    for word in ("hidden_dim: 32", "training clips", "parameters", "FLOPs", "memory"):
        assert word in finished.stdout
    assert not (tiny.parent / "experiment/dry").exists()


def test_debug_runs_are_small_and_apart(tiny):
    finished = train(tiny, "--debug", "name=debugged")
    assert finished.returncode == 0, finished.stderr[-3000:]
    folder = tiny.parent / "experiment/debug/debugged"
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 10
    assert not (tiny.parent / "experiment/debugged").exists()


def test_a_profile_says_where_a_step_goes(tiny):
    finished = train(tiny, "--profile", "name=profiled", "trainer.max_steps=12")
    assert finished.returncode == 0, finished.stderr[-3000:]
    folder = tiny.parent / "experiment/profiled/profile"
    rows = [
        re.fullmatch(r"\s*(.+?)\s+([\d.]+) ms\s+[\d.]+%", line).groups()
        for line in (folder / "table.txt").read_text().splitlines()
    ]
    milliseconds = {name: float(value) for name, value in rows}
    parts = sum(value for name, value in milliseconds.items() if not name.startswith("of it") and name != "whole step")
    assert milliseconds["head, backward"] > 0 and parts == pytest.approx(milliseconds["whole step"], rel=0.2)
    trace = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))
    assert any(event.get("name") == "flperf encode" for event in trace["traceEvents"])


def test_a_diverging_run_ends_with_one_clear_line(tiny):
    overrides = ["trainer.learning_rate=1e38", "trainer.max_steps=50", "trainer.max_skipped_updates=3"]
    for stage in (0, 2, 3):
        finished = train(tiny, f"name=diverging-{stage}", f"engine.zero_stage={stage}", *overrides)
        assert finished.returncode != 0
        assert "3 updates in a row had a non-finite loss or gradient" in finished.stderr, finished.stderr[-2000:]
        assert "Traceback" not in finished.stderr


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 2])
def test_one_loss_that_is_no_number_costs_one_update(here, monkeypatch, stage, precision):
    """It is skipped and counted, by Adam's bias correction not; what follows is finite, and so are weights and moving
    average."""
    loss, calls = Regression.loss, itertools.count(1)
    monkeypatch.setattr(
        Regression, "loss", lambda *inputs, **more: loss(*inputs, **more) * (math.nan if next(calls) == 3 else 1)
    )
    options = [
        f"engine.zero_stage={stage}",
        f"engine.precision={precision}",
        "trainer.max_steps=6",
        "dataset.shapes.validation_clips=0",
    ]
    folder, end = here(f"once-{stage}-{precision}", *options)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert end is None and [line["skipped_updates"] for line in lines] == [0, 0, 1, 1, 1, 1]
    assert [line["step"] for line in lines if line["loss"] is None] == [3]
    assert all(line["grad_norm"] > 0 for line in lines[3:])
    checkpoint = latest_checkpoint(folder / "checkpoints")
    index = read_index(checkpoint)
    assert (index.step, index.optimizer_step, index.skipped_updates) == (6, 5, 1)
    for average in (False, True):
        assert all(tensor.isfinite().all() for tensor in read_weights(checkpoint, average).values())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset.kind=kinetics_400", "dataset.train=nowhere.csv"], "dataset.train"),
        (["dataset.kind=kinetics_400_cached", "dataset.train=nowhere.csv"], "dataset.train"),
        (["backbone.weights=/no/such/folder"], "backbone"),
        (["model.num_context_latents=9"], "model.num_context_latents"),
        (["model.head=dit"], "objective.kind"),
        (["model.hiden_dim=3"], "did you mean model.hidden_dim"),
    ],
)
def test_mistakes_end_in_one_line_that_names_the_key(tiny, overrides, message):
    command = [sys.executable, str(ROOT / "flperf/train.py"), "--config", str(tiny), "name=mistake", *overrides]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode != 0
    last = finished.stderr.strip().splitlines()[-1]
    assert last.startswith("flperf: ") and message in last and "Traceback" not in finished.stderr
    assert not (tiny.parent / "experiment/mistake").exists()
