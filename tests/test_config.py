from pathlib import Path

import pytest

from flperf.config import UserError, differences, load_config, parse_interval

CONFIGS = Path(__file__).parents[1] / "configs"
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
        ("inherits: [bad.yaml]", "circular"),
        ("model: {depth: [", "not valid YAML"),
        ("- a list", "must be a mapping"),
        ("inherits: [base.yaml]\ntrainer: {max_epochs: 2}", "max_steps and trainer.max_epochs"),
        ("inherits: [base.yaml]\nmodel: {num_heads: 5}", "model.hidden_dim"),
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


def test_missing_file():
    with pytest.raises(UserError, match=r"there is no file nowhere\.yaml"):
        load_config("nowhere.yaml")


def test_intervals():
    assert parse_interval("500", "k") == (500, "step")
    assert parse_interval("1 epoch", "k") == (1, "epoch")
    assert parse_interval("0.5 epochs", "k") == (0.5, "epoch")
    for bad in ("0", "-1", "1 week", ""):
        with pytest.raises(UserError, match="k: "):
            parse_interval(bad, "k")


def test_differences_name_nested_keys():
    assert differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}}) == ["a.c: 2 -> 4", "d: 3 -> None"]
