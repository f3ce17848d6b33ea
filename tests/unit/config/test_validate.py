"""Values that are refused, and the message that names the key, the value and what is allowed."""

import re

import pytest

from flperf.config import load_config
from flperf.config.validate import parse_interval
from flperf.errors import UserError


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("trainer: {max_steps: 3}\nmodel: {hidden_dim: 64, num_heads: 4}\n")
    return lambda *overrides: load_config(path, overrides)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("dataset.stride", "0", "at least 1"),
        ("dataset.threads", "0", "at least 1"),  # null by default
        ("dataset.fps", "0", "above 0"),
        ("dataset.fps", ".inf", "above 0"),
        ("trainer.warmup_steps", "-1", "at least 0"),
        ("trainer.learning_rate", "nan", "at least 0"),
        ("trainer.max_grad_norm", "inf", "above 0"),
        ("trainer.ema_decay", "1", "in [0, 1)"),
        ("trainer.betas", "[0.9, 2.0]", "two numbers in [0, 1)"),
        ("trainer.betas", "[0.9]", "two numbers in [0, 1)"),
        ("objective.tau_mean", "inf", "a finite number"),
        ("engine.zero_stage", "4", "0, 1, 2 or 3"),
        ("dataset.shapes.square_init", "[1.0, .nan]", "two finite numbers"),
        ("dataset.sources", "[{train: a.csv}, {train: b.csv, weight: 0}]", "above 0 and finite"),
        ("dataset.sources", "[{train: a.csv}, {train: b.csv, weight: .nan}]", "above 0 and finite"),
        ("evaluation.sampling.guidance_interval", "[0.0, 1.5]", "two ascending numbers in [0, 1]"),
        ("evaluation.sampling.guidance_interval", "[0.7, 0.2]", "two ascending numbers in [0, 1]"),
    ],
)
def test_a_number_out_of_range_is_refused(load, key, value, allowed):
    name = "dataset.sources[1].weight" if key == "dataset.sources" else key
    with pytest.raises(UserError, match=re.escape(f"own.yaml: {name}: must be {allowed}, is ")):
        load(f"{key}={value}")


def test_the_ends_of_a_range_are_allowed(load):
    load("dataset.stride=1", "trainer.warmup_steps=0", "trainer.ema_decay=0", "engine.zero_stage=3")
    load("dataset.threads=null", "objective.tau_mean=-2", "dataset.shapes.square_init=[-1.0, 0.5]")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.max_epochs=2"], "set exactly one of trainer.max_steps and trainer.max_epochs"),
        (["trainer.max_steps=null"], "set exactly one of trainer.max_steps and trainer.max_epochs"),
        (["model.num_heads=5"], "model.hidden_dim: must be an even multiple of model.num_heads 5, is 64"),
        (["model.num_heads=64"], "model.hidden_dim: must be an even multiple of model.num_heads 64, is 64"),
        (["model.num_heads=5", "model.positions=none"], "model.hidden_dim: must be a multiple of model.num_heads 5"),
        (["dataset.sources=[{train: a.csv}]", "dataset.train=b.csv"], "dataset.sources and dataset.train are both set"),
        (["dataset.sources=[{train: a.csv}]", "dataset.kind=demo"], "dataset.sources: dataset.kind 'demo' has its own"),
        (["dataset.sources=[{train: a.csv}]", "dataset.kind=bouncing_shapes"], "dataset.sources: dataset.kind 'bounc"),
        (["evaluation.sampling.guidance=2"], "evaluation.sampling.guidance: needs objective.context_dropout above 0"),
        (["dataset.kind=bouncing_shapes", "dataset.fps=12"], "dataset.fps: frames of bouncing_shapes have no time"),
        (["objective.kind=flow_matching", "objective.loss=cosine"], "objective.loss: cosine is not defined"),
        (["checkpoint.save_every=never"], "checkpoint.save_every: 'never' is not a number of steps or epochs"),
        (["evaluation.eval_every=0"], "evaluation.eval_every: '0' is not a number of steps or epochs"),
    ],
)
def test_keys_that_do_not_fit_together_are_refused(load, overrides, message):
    with pytest.raises(UserError, match=re.escape(f"own.yaml: {message}")):
        load(*overrides)


@pytest.mark.parametrize("name", ["''", ".", "..", "../aside", "a/b", "/tmp/elsewhere", "a/", "debug", "compile_cache"])
def test_a_name_is_one_folder_inside_the_experiment(load, name):
    with pytest.raises(UserError, match="own.yaml: name: must be the name of a folder"):
        load(f"name={name}")


def test_intervals_are_steps_or_epochs():
    assert parse_interval("500", "k") == parse_interval("500 steps", "k") == (500, "step")
    assert parse_interval("1 epoch", "k") == (1, "epoch")
    assert parse_interval("0.5 epochs", "k") == (0.5, "epoch")
    for bad in ("0", "-1", "1 week", ""):
        with pytest.raises(UserError, match="k: "):
            parse_interval(bad, "k")
