"""Configurations of FutureLatents, in the shapes that its history has, as ours."""

import pytest

from flperf.commands.import_config import import_config
from flperf.config import load_config
from flperf.errors import UserError

DATA = """
datasets:
  train:
    name: kinetics_400
    kinetics_400: {n_frame: "${TRAINER.N_FRAMES}", stride: 2, paths: {csv: /data/train.csv,
     labels_txt: /data/labels.txt}}
  val:
    name: kinetics_400
    kinetics_400: {n_frame: "${TRAINER.N_FRAMES}", stride: 2, paths: {csv: /data/val.csv, labels_txt: /data/labels.txt}}
"""
BACKBONE = (
    "BACKBONE: {BACKBONE_TYPE: vjepa2, MODEL_NAME: vjepa2_vitl_fpc64_256, HF_REPO: facebook/vjepa2-vitl-fpc64-256}\n"
)
TRAINER = """
inherits: [data.yaml, backbone.yaml]
wandb: true
encoder_trainable: false
trainer:
  n_frames: 64
  training:
    {learning_rate: 1e-5, weight_decay: 0.01, num_workers: 8, batch_size_per_gpu: 2,
     gradient_accumulation_steps: 4, mixed_precision: fp16,
     max_grad_norm: 1.0, max_grad_value: null, epochs: 12, embedding_norm: l2, loss: l1,
      checkpoint_dir: checkpoints, save_every: 4,
     find_unused_parameters: true}
  evaluation: {eval_every: 4, eval_first: false, batch_size_per_gpu: 1}
model:
  type: deterministic_cross_attention
  num_context_latents: 16
  num_target_latents: 16
  dit: {input_dim: 1024, hidden_dim: 512, depth: 6, num_heads: 8, mlp_ratio: 4.0, gradient_checkpointing: true}
"""


def imported(tmp_path, *arguments: str, **files: str):
    for name, text in {"data": DATA, "backbone": BACKBONE, "old": TRAINER, **files}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    import_config([str(tmp_path / "old.yaml"), "--out", str(tmp_path / "new.yaml"), *arguments])
    return load_config(tmp_path / "new.yaml")


def test_every_key_arrives_where_it_belongs(tmp_path, capsys):
    config = imported(tmp_path, "--processes", "8")
    assert (config.backbone.kind, config.backbone.weights) == ("vjepa2", "facebook/vjepa2-vitl-fpc64-256")
    data = config.dataset
    assert (data.kind, data.n_frames, data.stride, data.threads) == ("kinetics_400", 64, 2, 8)
    assert (data.train, data.validation, data.labels) == ("/data/train.csv", "/data/val.csv", "/data/labels.txt")
    model = config.model
    assert (model.head, model.num_context_latents, model.num_target_latents) == ("cross_attention", 16, 16)
    assert (model.hidden_dim, model.depth, model.num_heads, model.activation_checkpointing) == (512, 6, 8, "full")
    assert (config.objective.kind, config.objective.loss, config.latents.embedding_norm) == ("regression", "l1", "l2")
    trainer = config.trainer
    assert (trainer.learning_rate, trainer.weight_decay, trainer.max_epochs, trainer.max_grad_norm) == (
        1e-5,
        0.01,
        12,
        1.0,
    )
    assert (trainer.micro_batch_size, trainer.batch_size, trainer.schedule, trainer.warmup_steps) == (
        2,
        64,
        "constant",
        0,
    )
    assert (config.evaluation.eval_every, config.evaluation.batch_size, config.checkpoint.save_every) == (
        "4 epochs",
        1,
        "4 epochs",
    )
    assert (config.engine.precision, config.tracking.wandb) == ("bf16", "auto")
    said = capsys.readouterr().out
    for word in (
        "input_dim: left out",
        "find_unused_parameters: left out",
        "backbone.encode=joint",
        "2 a device x 4 accumulated x 8",
    ):
        assert word in said


def test_the_other_nestings(tmp_path):
    flow = """
inherits: [shapes.yaml, dino.yaml]
trainer: {training: {epochs: 1, normalize_embeddings: true, mixed_precision: "no", learning_rate: 1.0e-4}}
model:
  type: flow_matching
  num_context_latents: 4
  flow_matching: {num_train_timesteps: 1000, dit: {hidden_dim: 64, depth: 2, num_heads: 2}}
"""
    shapes = (
        "datasets: {synthetic_bouncing_shapes: {n_frame: 16, size: 256, square_size: 64, square_init: [40.0, "
        "50.0], disk_radius: 24}}\n"
    )
    dino = (
        "backbone: {backbone_type: dinov3, hf_repo: /weights/dinov3, image_size: 256, frame_stride: 2, "
        "patch_size: 16}\n"
    )
    config = imported(tmp_path, old=flow, shapes=shapes, dino=dino)
    assert (config.model.head, config.objective.kind, config.model.depth) == ("dit", "flow_matching", 2)
    assert (config.dataset.kind, config.dataset.shapes.square_size, config.dataset.shapes.square_init) == (
        "bouncing_shapes",
        64,
        [40, 50],
    )
    assert (config.backbone.kind, config.backbone.frame_stride, config.backbone.processor["size"]) == ("dinov3", 2, 256)
    assert (config.latents.embedding_norm, config.engine.precision) == ("l2", "fp32")


def test_cached_latents(tmp_path):
    cached = "datasets: {kinetics_400_cached: {path_col: where, paths: {metadata: /data/manifest.csv}}}\n"
    config = imported(tmp_path, data=cached, old=TRAINER.replace("n_frames: 64", "epochs: 12"))
    assert (config.dataset.kind, config.dataset.train, config.dataset.out_path_column) == (
        "kinetics_400_cached",
        "/data/manifest.csv",
        "where",
    )


SHAPES = """
datasets:
  train:
    name: synthetic_bouncing_shapes
    synthetic_bouncing_shapes: {length: 8192, n_frame: "${TRAINER.N_FRAMES}",
     image_size: "${BACKBONE.IMAGE_SIZE}", square_size: 64}
  val:
    name: synthetic_bouncing_shapes
    synthetic_bouncing_shapes: {length: 512, n_frame: "${TRAINER.N_FRAMES}",
     image_size: "${BACKBONE.IMAGE_SIZE}", square_size: 32}
  visualisation:
    name: synthetic_bouncing_shapes
    synthetic_bouncing_shapes: {length: 4, n_frame: "${TRAINER.N_FRAMES}",
     image_size: "${BACKBONE.IMAGE_SIZE}", square_size: 64}
"""
DINOV3 = (
    "backbone: {backbone_type: dinov3, hf_repo: facebook/dinov3, image_size: 128, frame_stride: 2, patch_size: 16}\n"
)


def test_shapes_by_split(tmp_path, capsys):
    config = imported(tmp_path, data=SHAPES, backbone=DINOV3)
    shapes = config.dataset.shapes
    assert (shapes.train_clips, shapes.validation_clips, shapes.visualisation_clips) == (8192, 512, 4)
    assert (shapes.image_size, config.backbone.processor) == (128, {"size": 128, "crop_size": 128})
    assert (config.dataset.kind, config.dataset.n_frames, config.dataset.stride) == ("bouncing_shapes", 64, 1)
    assert (
        shapes.square_size == 64
        and "square_size: left out, 32 where dataset.shapes.square_size is 64 already" in capsys.readouterr().out
    )


def test_shapes_that_are_only_looked_at_do_not_make_kinetics_shapes(tmp_path):
    looked_at = "datasets:\n  visualisation:" + SHAPES.partition("visualisation:")[2].replace(
        "${BACKBONE.IMAGE_SIZE}", "256"
    )
    config = imported(tmp_path, old=TRAINER.replace("data.yaml", "data.yaml, looked_at.yaml"), looked_at=looked_at)
    assert (config.dataset.kind, config.dataset.train, config.dataset.stride) == ("kinetics_400", "/data/train.csv", 2)
    assert config.dataset.shapes.visualisation_clips == 8


def test_csvs_side_by_side(tmp_path):
    paths = (
        "datasets: {kinetics_400: {n_frame: 64, stride: 2, paths: {train_csv: /data/train.csv, val_csv: "
        "/data/val.csv}}}"
    )
    dataset = imported(tmp_path, data=paths).dataset
    assert (dataset.kind, dataset.train, dataset.validation) == ("kinetics_400", "/data/train.csv", "/data/val.csv")


def test_null_sections_and_upper_case(tmp_path):
    old = TRAINER.replace("inherits: [data.yaml, backbone.yaml]", "INHERITS: [data.yaml]") + "backbone: null\n"
    config = imported(
        tmp_path, data="datasets: {kinetics_400_cached: {paths: {metadata: /data/manifest.csv}}}", old=old
    )
    assert (config.dataset.kind, config.backbone.weights, config.model.head) == (
        "kinetics_400_cached",
        None,
        "cross_attention",
    )


@pytest.mark.parametrize(
    ("written", "precision"), [("no", "fp32"), ('"no"', "fp32"), ("bf16", "bf16"), ("fp16", "bf16")]
)
def test_precisions(tmp_path, capsys, written, precision):
    assert imported(tmp_path, old=TRAINER.replace("fp16", written)).engine.precision == precision
    assert ("'fp16' becomes 'bf16'" in capsys.readouterr().out) == (written == "fp16")


def test_gradients_that_were_not_clipped_are_not(tmp_path, capsys):
    config = imported(tmp_path, old=TRAINER.replace("max_grad_norm: 1.0", "max_grad_norm: null"))
    assert config.trainer.max_grad_norm >= 1e9
    assert "max_grad_norm here, None becomes" in capsys.readouterr().out


def test_the_new_file_makes_its_folder_and_the_old_one_must_be_there(tmp_path):
    imported(tmp_path)
    import_config([str(tmp_path / "old.yaml"), "--out", str(tmp_path / "configs/mine/new.yaml")])
    assert load_config(tmp_path / "configs/mine/new.yaml").dataset.kind == "kinetics_400"
    with pytest.raises(UserError, match=r"none.yaml: there is no such file"):
        import_config([str(tmp_path / "none.yaml")])


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
        ("n_frames: 64", "frames: 64", "trainer.n_frames' not found; write that key into the file"),
        (
            "max_grad_value: null",
            "max_grad_value: 0.5",
            "trainer.training.max_grad_value: gradients are clipped by their norm",
        ),
        ("encoder_trainable: false", "encoder_trainable: true", "encoder_trainable: the encoder is always frozen"),
        ("epochs: 12", "epochz: 12", "trainer.training.epochz: is not a key"),
        ("type: deterministic_cross_attention", "type: gan", "model.type: 'gan' is none of"),
    ],
)
def test_what_can_not_be_had_is_refused_by_name(tmp_path, old, new, message):
    with pytest.raises(UserError, match=message):
        imported(tmp_path, old=TRAINER.replace(old, new))
    assert not (tmp_path / "new.yaml").exists()
