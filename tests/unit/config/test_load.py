"""Configuration files, what they inherit, overrides, and the message for each mistake."""

from pathlib import Path

import pytest

from flperf.config import Source, differences, dump_config, load_config, parse_config
from flperf.errors import UserError

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def write(tmp_path):
    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
        return path

    write_file("base.yaml", "trainer: {max_steps: 3, betas: [0.8, 0.9]}\nmodel: {hidden_dim: 64, num_heads: 4}\n")
    return write_file


def test_reference_configurations_load():
    files = sorted((CONFIGS / "references").glob("*.yaml"))
    assert len(files) == 9
    for file in files:
        config = load_config(file)
        assert (config.name, config.backbone.kind) == (file.stem, file.stem.split("_")[0])
        assert (config.trainer.batch_size, config.trainer.warmup_steps) == (64, 2000)  # of training/base.yaml


@pytest.mark.parametrize("path", ["demo.yaml", "shapes/predictor.yaml", "shapes/flow_matching.yaml"])
def test_small_configurations_need_no_download(path):
    assert load_config(CONFIGS / path).backbone.weights is None


def test_a_configuration_that_an_earlier_version_wrote_loads():
    config = load_config(CONFIGS / "demo.yaml")
    earlier = dump_config(config).replace("fused_kernels: false", "fused_adaln: false")
    assert "fused_adaln" in earlier and parse_config(earlier, "config.yaml") == config


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


def test_keys_in_upper_case_are_those_in_lower_case(write):
    write("upper.yaml", "TRAINER: {BATCH_SIZE: 4, MAX_STEPS: 3}\nMODEL: {HIDDEN_DIM: 64, NUM_HEADS: 4}\n")
    path = write("own.yaml", "INHERITS: [upper.yaml]\nMODEL: {DEPTH: '${TRAINER.MAX_STEPS}'}\n")
    config = load_config(path, ["TRAINER.WARMUP_STEPS=2", "LATENTS.STATISTICS_CLIPS=${TRAINER.BATCH_SIZE}"])
    trainer = config.trainer
    assert (trainer.batch_size, trainer.warmup_steps) == (4, 2)
    assert (config.model.depth, config.latents.statistics_clips) == (3, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {depth: 2}", "unknown key modle: did you mean model"),
        ("model: {depht: 2}", "unknown key model.depht: did you mean model.depth"),
        ("model: {mixed_precision: bf16}", "unknown key model.mixed_precision: is engine.precision here"),
        ("model: 3", "model: is a section"),
        ("model:", "model: is a section"),
        ("model: {depth: many}", "model.depth"),
        ("backbone: {encode: half}", "backbone.encode"),
        ("trainer: {betas: {a: 1}}", "trainer.betas: must be a list"),
        ("backbone: {architecture: [1]}", "backbone.architecture: must be a mapping"),
        ("model: {depth: '${model.nothing}'}", "model.depth"),
        ("inherits: [missing.yaml]", "missing.yaml"),
        ("inherits: base.yaml", "inherits: must be a list"),
        ("inherits: {a: b}", "inherits: must be a list of paths, is {'a': 'b'}"),
        ("inherits: [bad.yaml]", "circular"),
        ("model: {depth: 2}\nseed: 1\nmodel: {num_heads: 2}", "line 3: the key model occurs twice"),
        ("trainer: {batch_size: 4, BATCH_SIZE: 8}", "the key batch_size occurs twice"),
        ("model: {depth: [", "not valid YAML"),
        ("- a list", "must be a mapping"),
        (
            "dataset: {sources: [{train: a, wieght: 2}]}",
            "dataset.sources[0].wieght: did you mean dataset.sources[0].weight",
        ),
        ("dataset: {sources: [{train: a}, {train: b, weight: x}]}", "dataset.sources[1].weight: Value 'x'"),
        ("dataset: {sources: [{train: null}]}", "dataset.sources[0].train: "),
        ("dataset: {sources: [{weight: 2}]}", "dataset.sources[0].train: must be set"),
        (
            "dataset: {sources: [a.csv]}",
            "dataset.sources: must be a list of sections with the keys train, weight",
        ),
        ("dataset: {sources: {train: a}}", "dataset.sources: must be a list of sections"),
        ("dataset: {sources: a.csv}", "dataset.sources: must be a list of sections"),
        ("inherits: [base.yaml]\ndataset: {stride: 0}", "dataset.stride: must be at least 1, is 0"),
    ],
)
def test_a_mistake_is_reported_in_one_line_with_file_and_key(write, text, message):
    path = write("bad.yaml", text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert message in str(caught.value) and "bad.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_mistake_in_an_inherited_file_is_reported_with_that_file(write):
    write("parent.yaml", "model: {depht: 2}")
    child = write("child.yaml", "inherits: [parent.yaml]\n")
    with pytest.raises(UserError, match=r"parent\.yaml: unknown key model\.depht"):
        load_config(child)


@pytest.mark.parametrize(
    "override", ["model.depht=2", "model.depth=x", "model.depth", "=3", "dataset.sources[0].weight=2"]
)
def test_a_mistake_in_an_override_is_reported_with_the_command_line(write, override):
    with pytest.raises(UserError, match="command line: "):
        load_config(write("c.yaml", "inherits: [base.yaml]"), [override])


def test_sources_are_a_list_that_files_and_overrides_replace(write):
    path = write("s.yaml", "inherits: [base.yaml]\nDATASET: {SOURCES: [{TRAIN: a.csv}, {TRAIN: b.csv, WEIGHT: 3}]}\n")
    assert load_config(path).dataset.sources == [Source("a.csv", 1.0), Source("b.csv", 3.0)]
    config = load_config(path, ["dataset.sources=[{train: c.csv, weight: 2e-3}]"])
    assert config.dataset.sources == [Source("c.csv", 0.002)]
    assert parse_config(dump_config(config), "dumped").dataset == config.dataset
    assert load_config(path, ["dataset.sources=null"]).dataset.sources is None


@pytest.mark.parametrize("path", ["nowhere.yaml", "/dev/null/nowhere.yaml"])
def test_a_missing_file_is_named(path):
    with pytest.raises(UserError, match=f"there is no file {path}"):
        load_config(path)


@pytest.mark.parametrize(("written", "mode"), [("true", "full"), ("false", "none"), ("selective", "selective")])
def test_activation_checkpointing_of_version_0_1_is_still_read(write, written, mode):
    path = write("old.yaml", f"trainer: {{max_steps: 1}}\nmodel: {{activation_checkpointing: {written}}}\n")
    assert load_config(path).model.activation_checkpointing == mode
    assert load_config(path, [f"model.activation_checkpointing={written}"]).model.activation_checkpointing == mode


def test_differences_name_nested_keys():
    assert differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}}) == ["a.c: 2 -> 4", "d: 3 -> None"]
    before, after = [{"train": "a", "weight": 1}, {"train": "b", "weight": 2}], [{"train": "a", "weight": 1}]
    assert differences({"s": before}, {"s": [*after, {"train": "b", "weight": 3}]}) == ["s[1].weight: 2 -> 3"]
    assert differences({"s": before}, {"s": after}) == [f"s: {before} -> {after}"]
