import math
import re
from operator import attrgetter
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from flperf.config import Config, differences, load_config
from flperf.config.validate import ALLOWED, BELOW_1, check_values, parse_interval
from flperf.errors import UserError

CONFIGS = Path(__file__).parents[3] / "configs"
REFERENCES = [  # those that FutureLatents' README names, and one of 4DS
    "vjepa2_kinetics_400",
    "vjepa2_kinetics_400_deterministic",
    "vjepa2_kinetics_400_deterministic_cross_attention",
    "dinov3_kinetics_400_deterministic",
    "dinov3_kinetics_400_deterministic_cross_attention",
    "vjepa2_kinetics_400_cached",
    "4ds_kinetics_400_deterministic",
    "vjepa2_bouncing_shapes_deterministic",
    "vjepa2_bouncing_shapes_flow_matching",
]


@pytest.fixture
def write(tmp_path):
    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
        return path

    write_file("base.yaml", "trainer: {max_steps: 3, betas: [0.8, 0.9]}\nmodel: {hidden_dim: 64, num_heads: 4}\n")
    return write_file


@pytest.mark.parametrize("name", REFERENCES)
def test_reference_configurations_load(name):
    config = load_config(CONFIGS / "references" / f"{name}.yaml")
    assert config.name == name
    assert config.backbone.kind == name.split("_")[0]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_top_level_configurations_load(path):
    assert load_config(path).backbone.weights is None  # they need no download


def test_inheritance_merges_mappings_replaces_lists_and_own_keys_win(write):
    write("first.yaml", "inherits: [base.yaml]\nmodel: {depth: 3}\nbackbone: {architecture: {a: 1, b: 1}}\n")
    write("sub/second.yaml", "trainer: {betas: [0.5, 0.6]}\nmodel: {depth: 4}\nbackbone: {architecture: {b: 2}}\n")
    own = write("own.yaml", "inherits: [first.yaml, sub/second.yaml]\nmodel: {num_heads: 8}\n")
    config = load_config(own)
    assert config.backbone.architecture == {"a": 1, "b": 2}
    assert config.trainer.betas == [0.5, 0.6]
    assert (config.model.hidden_dim, config.model.depth, config.model.num_heads) == (64, 4, 8)
    assert config.name == "own"


def test_overrides_win_and_interpolations_resolve(write):
    path = write("c.yaml", "inherits: [base.yaml]\nmodel: {depth: '${trainer.max_steps}'}\n")
    config = load_config(path, ["trainer.max_steps=7", "trainer.learning_rate=1e-4", "name=other"])
    assert (config.model.depth, config.trainer.learning_rate, config.name) == (7, 1e-4, "other")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("modle: {depth: 2}", "unknown key modle: did you mean model"),
        ("model: {depht: 2}", "unknown key model.depht: did you mean model.depth"),
        ("model: 3", "model: is a section"),
        ("model: {depth: many}", "model.depth"),
        ("backbone: {encode: half}", "backbone.encode"),
        ("trainer: {betas: {a: 1}}", "trainer.betas"),
        ("model: {depth: '${model.nothing}'}", "model.depth"),
        ("inherits: [missing.yaml]", "missing.yaml"),
        ("inherits: base.yaml", "inherits: must be a list"),
        ("inherits: 5", "inherits: must be a list of paths, is 5"),
        ("inherits: {a: b}", "inherits: must be a list of paths, is {'a': 'b'}"),
        ("backbone: {architecture: [1]}", "backbone.architecture: must be a mapping"),
        ("model: {depth: 2}\nseed: 1\nmodel: {num_heads: 2}", "line 3: the key model stands twice"),
        ("trainer: {batch_size: 4, BATCH_SIZE: 8}", "the key batch_size stands twice"),
        ("inherits: [bad.yaml]", "circular"),
        ("model: {depth: [", "not valid YAML"),
        ("- a list", "must be a mapping"),
        ("inherits: [base.yaml]\ntrainer: {max_epochs: 2}", "max_steps and trainer.max_epochs"),
        (
            "inherits: [base.yaml]\nmodel: {num_heads: 5}",
            "model.hidden_dim: must be an even multiple of model.num_heads 5, is 64",
        ),
        ("inherits: [base.yaml]\nmodel: {hidden_dim: 27, num_heads: 3}", "model.hidden_dim: must be an even multiple"),
        ("inherits: [base.yaml]\ndataset: {stride: 0}", "dataset.stride"),
        ("inherits: [base.yaml]\nengine: {zero_stage: 4}", "engine.zero_stage"),
        ("inherits: [base.yaml]\ncheckpoint: {save_every: never}", "checkpoint.save_every"),
    ],
)
def test_mistakes_are_one_line_with_file_and_key(write, text, key):
    path = write("bad.yaml", text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    message = str(caught.value)
    assert key in message and "bad.yaml" in message and "\n" not in message


def test_a_mistake_is_blamed_on_the_file_it_stands_in(write):
    write("parent.yaml", "model: {depht: 2}")
    child = write("child.yaml", "inherits: [parent.yaml]\n")
    with pytest.raises(UserError, match=r"parent\.yaml: unknown key model\.depht"):
        load_config(child)


@pytest.mark.parametrize("override", ["model.depht=2", "model.depth=x", "model.depth", "=3"])
def test_bad_overrides_name_the_command_line(write, override):
    with pytest.raises(UserError, match="command line: "):
        load_config(write("c.yaml", "inherits: [base.yaml]"), [override])


@pytest.mark.parametrize("path", ["nowhere.yaml", "/dev/null/nowhere.yaml"])
def test_missing_file(path):
    with pytest.raises(UserError, match=f"there is no file {path}"):
        load_config(path)


def keys(tree: dict, prefix: str = "") -> dict:
    """Every leaf of the default configuration by its dotted key."""
    found = {}
    for name, value in tree.items():
        found |= keys(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


ZERO_MEANS_NONE = {  # or no correction, or a rate; anywhere else a zero is a mistake
    *("seed", "dataset.shapes.validation_clips", "dataset.shapes.visualisation_clips", "dataset.shapes.splice_at"),
    *("objective.tau_mean", "objective.tau_std", "objective.context_dropout", "engine.zero_stage"),
    *(
        "trainer.learning_rate",
        "trainer.final_learning_rate",
        "trainer.weight_decay",
        "trainer.warmup_steps",
        "trainer.ema_decay",
    ),
    *("evaluation.sampling.guidance", "evaluation.dump_examples", "evaluation.probe_clips"),
}


def test_every_number_has_a_range():
    defaults = keys(OmegaConf.to_container(OmegaConf.structured(Config)))
    numbers = {
        key for key, value in defaults.items() if isinstance(value, int | float | list) and not isinstance(value, bool)
    }
    unset = {key for key, value in defaults.items() if value is None}
    texts = {"backbone.weights", "dataset.train", "dataset.validation", "dataset.labels", "model.initial_weights"}
    assert numbers | unset - texts == ALLOWED.keys()


def refused(key: str, value) -> bool:
    config = Config(name="own")
    config.trainer.max_steps = None if key == "trainer.max_epochs" else 3
    # which fit any other value
    config.objective.context_dropout, config.model.num_heads, config.model.positions = 0.1, 1, "none"
    section, _, name = key.rpartition(".")
    setattr(attrgetter(section)(config) if section else config, name, value)
    try:
        check_values(config, "own.yaml")
    except UserError as error:
        assert str(error) == f"own.yaml: {key}: must be {ALLOWED[key].text}, is {value}"
        return True
    return False


@pytest.mark.parametrize("key", ALLOWED)
def test_a_number_out_of_range_is_one_line_with_key_and_value(key):
    if ALLOWED[key].count:
        assert not refused(key, [0.5, 0.5])
        assert refused(key, [0.5]) and refused(key, [0.5, 0.5, 0.5]) and refused(key, [0.5, math.nan])
        assert refused(key, [-1.0, 0.5]) == (not key.startswith("dataset.shapes"))
        return
    assert refused(key, -1) == (key != "objective.tau_mean")
    assert refused(key, 0) == (key not in ZERO_MEANS_NONE)
    assert refused(key, math.nan) and refused(key, math.inf)
    assert not refused(key, 0.5 if ALLOWED[key] is BELOW_1 else 1)


@pytest.mark.parametrize(
    ("key", "value"), [("trainer.ema_decay", 1), ("trainer.betas", "[0.9, 2.0]"), ("engine.zero_stage", 4)]
)
def test_numbers_have_upper_ends(write, key, value):
    with pytest.raises(UserError, match=f"own.yaml: {key}: must be .*, is {re.escape(str(value))}"):
        load_config(write("own.yaml", "inherits: [base.yaml]\n"), [f"{key}={value}"])


@pytest.mark.parametrize("name", ["''", ".", "..", "../aside", "a/b", "/tmp/elsewhere", "a/", "debug", "compile_cache"])
def test_a_name_is_one_folder_inside_the_experiment(write, name):
    with pytest.raises(UserError, match="own.yaml: name: must be the name of a folder"):
        load_config(write("own.yaml", "inherits: [base.yaml]\n"), [f"name={name}"])


def test_keys_in_upper_case_are_those_in_lower_case(write):
    write("upper.yaml", "TRAINER: {BATCH_SIZE: 4, MAX_STEPS: 3}\nMODEL: {HIDDEN_DIM: 64, NUM_HEADS: 4}\n")
    path = write("own.yaml", "INHERITS: [upper.yaml]\nMODEL: {DEPTH: '${TRAINER.MAX_STEPS}'}\n")
    config = load_config(path, ["TRAINER.WARMUP_STEPS=2", "LATENTS.STATISTICS_CLIPS=${TRAINER.BATCH_SIZE}"])
    assert (
        config.trainer.batch_size,
        config.trainer.warmup_steps,
        config.model.depth,
        config.latents.statistics_clips,
    ) == (4, 2, 3, 4)


@pytest.mark.parametrize(
    ("old", "told"),
    [
        ("trainer.mixed_precision=bf16", "unknown key trainer.mixed_precision: is engine.precision here"),
        ("trainer.loss=l1", "is objective.loss here"),
        ("trainer.eval_every=1", "is evaluation.eval_every here"),
        ("TRAINER.N_FRAMES=16", "unknown key trainer.n_frames: is dataset.n_frames here"),
        (
            "trainer.training.loss=l1",
            "unknown key trainer.training: is a section of FutureLatents; `flperf import-config FILE`",
        ),
        ("model.type=flow_matching", "is model.head and objective.kind here"),
        ("model.num_train_timesteps=1000", "has no counterpart here: tau is continuous"),
        ("trainer.max_grad_value=1", "trainer.max_grad_norm"),
        ("datasets.train.name=kinetics_400", "unknown key datasets: is a section of FutureLatents"),
    ],
)
def test_a_key_of_futurelatents_is_told_what_it_is_here(write, old, told):
    with pytest.raises(UserError) as caught:
        load_config(write("own.yaml", "inherits: [base.yaml]\n"), [old])
    assert told in str(caught.value)


@pytest.mark.parametrize(("written", "meant"), [("true", "full"), ("false", "none"), ("selective", "selective")])
def test_checkpointing_as_version_0_1_wrote_it_is_still_read(write, written, meant):
    path = write("old.yaml", f"trainer: {{max_steps: 1}}\nmodel: {{activation_checkpointing: {written}}}\n")
    assert load_config(path).model.activation_checkpointing == meant
    assert load_config(path, [f"model.activation_checkpointing={written}"]).model.activation_checkpointing == meant


def test_intervals():
    assert parse_interval("500", "k") == (500, "step")
    assert parse_interval("1 epoch", "k") == (1, "epoch")
    assert parse_interval("0.5 epochs", "k") == (0.5, "epoch")
    for bad in ("0", "-1", "1 week", ""):
        with pytest.raises(UserError, match="k: "):
            parse_interval(bad, "k")


def test_differences_name_nested_keys():
    assert differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}}) == ["a.c: 2 -> 4", "d: 3 -> None"]
