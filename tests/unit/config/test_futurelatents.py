"""Configurations of FutureLatents in the forms of its versions, translated; and the hints for single old keys."""

import pytest
import yaml
from omegaconf import OmegaConf

from flperf.config import Config, parse_config
from flperf.config.futurelatents import former_key, translate
from flperf.config.load import parse_yaml
from flperf.errors import UserError

TRAINER = """
trainer:
  n_frames: 64
  training: {learning_rate: 1e-5, epochs: 12, mixed_precision: fp16, max_grad_norm: 1.0, max_grad_value: null}
encoder_trainable: false
model: {type: deterministic_cross_attention, num_context_latents: 16}
"""


def translated(text: str) -> tuple[Config, str]:
    """The new configuration, as it is loaded, and the report."""
    values, report = translate(parse_yaml(text, "old.yaml"), processes=1)
    tree = OmegaConf.create({})
    for key, value in values.items():
        OmegaConf.update(tree, key, value, force_add=True)
    return parse_config(yaml.safe_dump(OmegaConf.to_container(tree)), "new.yaml", ["name=new"]), "\n".join(report)


def test_flow_matching_on_shapes():
    config, _ = translated("""
datasets: {synthetic_bouncing_shapes: {n_frame: 16, size: 256, square_size: 64, square_init: [40.0, 50.0]}}
backbone: {backbone_type: dinov3, hf_repo: /weights/dinov3, image_size: 256, frame_stride: 2, patch_size: 16}
trainer: {training: {epochs: 1, normalize_embeddings: true, mixed_precision: "no", learning_rate: 1.0e-4}}
model:
  type: flow_matching
  num_context_latents: 4
  flow_matching: {num_train_timesteps: 1000, dit: {hidden_dim: 64, depth: 2, num_heads: 2}}
""")
    assert (config.model.head, config.objective.kind, config.model.depth) == ("dit", "flow_matching", 2)
    shapes = config.dataset.shapes
    assert (config.dataset.kind, shapes.square_size, shapes.square_init) == ("bouncing_shapes", 64, [40, 50])
    assert (config.backbone.kind, config.backbone.frame_stride, config.backbone.processor["size"]) == ("dinov3", 2, 256)
    assert (config.latents.embedding_norm, config.engine.precision) == ("l2", "fp32")


SHAPES = """
datasets:
  train: {name: synthetic_bouncing_shapes, synthetic_bouncing_shapes: {length: 8192, image_size: 128, square_size: 64}}
  val: {name: synthetic_bouncing_shapes, synthetic_bouncing_shapes: {length: 512, image_size: 128, square_size: 32}}
  visualisation: {name: synthetic_bouncing_shapes, synthetic_bouncing_shapes: {length: 4, square_size: 16}}
backbone: {backbone_type: dinov3, hf_repo: facebook/dinov3, image_size: 128}
"""


def test_shapes_by_split():
    config, report = translated(TRAINER + SHAPES)
    shapes = config.dataset.shapes
    assert (shapes.train_clips, shapes.validation_clips, shapes.visualisation_clips) == (8192, 512, 4)
    assert (shapes.image_size, config.backbone.processor) == (128, {"size": 128, "crop_size": 128})
    assert (config.dataset.kind, config.dataset.n_frames, config.dataset.stride) == ("bouncing_shapes", 64, 1)
    assert shapes.square_size == 64
    assert "square_size: dropped, 32, since dataset.shapes.square_size is already 64" in report


def test_shapes_for_visualisation_only_do_not_change_the_dataset():
    config, _ = translated(
        TRAINER
        + """
datasets:
  kinetics_400: {stride: 2, paths: {train_csv: /data/train.csv, val_csv: /data/val.csv}}
  visualisation: {name: synthetic_bouncing_shapes, synthetic_bouncing_shapes: {length: 4, square_size: 16}}
"""
    )
    assert (config.dataset.kind, config.dataset.train, config.dataset.stride) == ("kinetics_400", "/data/train.csv", 2)
    assert config.dataset.validation == "/data/val.csv" and config.dataset.shapes.visualisation_clips == 8


def test_cached_latents_and_a_null_section():
    old = "datasets: {kinetics_400_cached: {path_col: where, paths: {metadata: /data/manifest.csv}}}\nbackbone: null\n"
    config, _ = translated(TRAINER + old)
    dataset = config.dataset
    assert (dataset.kind, dataset.train, dataset.out_path_column) == (
        "kinetics_400_cached",
        "/data/manifest.csv",
        "where",
    )
    assert (config.backbone.weights, config.model.head) == (None, "cross_attention")


@pytest.mark.parametrize(
    ("written", "precision"), [("no", "fp32"), ('"no"', "fp32"), ("bf16", "bf16"), ("fp16", "bf16")]
)
def test_precisions(written, precision):
    config, report = translated(TRAINER.replace("fp16", written))
    assert config.engine.precision == precision
    assert ("'fp16' becomes 'bf16'" in report) == (written == "fp16")


def test_gradients_that_were_not_clipped_are_not_clipped():
    config, report = translated(TRAINER.replace("max_grad_norm: 1.0", "max_grad_norm: null"))
    assert config.trainer.max_grad_norm >= 1e9
    assert "max_grad_norm here, None becomes" in report


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "mixed_precision: fp16",
            "mixed_precision: fp8",
            "trainer.training.mixed_precision: 'fp8' is none of no, false, fp16, bf16",
        ),
        ("learning_rate: 1e-5", "learning_rate: slow", "trainer.training.learning_rate: could not convert"),
        ("type: deterministic_cross_attention", "type: locator", "model.type: .*flperf locator"),
        ("type: deterministic_cross_attention", "type: gan", "model.type: 'gan' is none of"),
        ("max_grad_value: null", "max_grad_value: 0.5", "training.max_grad_value: gradients are clipped by their norm"),
        ("encoder_trainable: false", "encoder_trainable: true", "encoder_trainable: the encoder is always frozen"),
        ("epochs: 12", "epochz: 12", "trainer.training.epochz: is not a known key"),
        ("encoder_trainable: false", "datasets: {train: {name: ucf}}", "datasets.train.name: 'ucf' is none of"),
    ],
)
def test_what_flperf_does_not_have_is_refused_with_its_key(old, new, message):
    with pytest.raises(UserError, match=message):
        translated(TRAINER.replace(old, new))


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("trainer.mixed_precision", "is engine.precision here"),
        ("trainer.training.loss", "is objective.loss here"),
        ("trainer.eval_every", "is evaluation.eval_every here"),
        ("trainer.training", "is a section of FutureLatents; `flperf import-config FILE`"),
        ("datasets", "is a section of FutureLatents"),
        ("model.type", "is model.head and objective.kind here"),
        ("model.num_train_timesteps", "has no counterpart here: tau is continuous"),
        ("trainer.max_grad_value", "trainer.max_grad_norm"),
    ],
)
def test_the_hint_for_an_old_key_names_the_new_one(key, hint):
    assert hint in former_key(key)


def test_any_other_key_has_no_hint():
    assert former_key("model.depht") is None
