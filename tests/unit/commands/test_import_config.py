"""`flperf import-config` on the files of FutureLatents: read, converted, written and reported."""

import pytest

from flperf.commands.import_config import import_config
from flperf.config import load_config
from flperf.errors import UserError

FILES = {
    "data": """
datasets:
  train:
    name: kinetics_400
    kinetics_400: {n_frame: "${TRAINER.N_FRAMES}", stride: 2, paths: {csv: /data/train.csv,
     labels_txt: /data/labels.txt}}
  val:
    name: kinetics_400
    kinetics_400: {n_frame: "${TRAINER.N_FRAMES}", stride: 2, paths: {csv: /data/val.csv, labels_txt: /data/labels.txt}}
""",
    "backbone": "BACKBONE: {BACKBONE_TYPE: vjepa2, MODEL_NAME: vjepa2_vitl_fpc64_256,\n"
    "  HF_REPO: facebook/vjepa2-vitl-fpc64-256}\n",
    "old": """
INHERITS: [data.yaml, backbone.yaml]
wandb: true
encoder_trainable: false
trainer:
  n_frames: 64
  training:
    {learning_rate: 1e-5, weight_decay: 0.01, num_workers: 8, batch_size_per_gpu: 2,
     gradient_accumulation_steps: 4, mixed_precision: fp16,
     max_grad_norm: 1.0, max_grad_value: null, epochs: 12, embedding_norm: l2, loss: l1,
     checkpoint_dir: checkpoints, save_every: 4, find_unused_parameters: true}
  evaluation: {eval_every: 4, eval_first: false, batch_size_per_gpu: 1}
model:
  type: deterministic_cross_attention
  num_context_latents: 16
  num_target_latents: 16
  dit: {input_dim: 1024, hidden_dim: 512, depth: 6, num_heads: 8, mlp_ratio: 4.0, gradient_checkpointing: true}
""",
}


@pytest.fixture
def folder(tmp_path):
    for name, text in FILES.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def test_every_key_is_translated_and_every_change_reported(folder, capsys):
    import_config([str(folder / "old.yaml"), "--out", str(folder / "configs/new.yaml"), "--processes", "8"])
    config = load_config(folder / "configs/new.yaml")
    assert (config.backbone.kind, config.backbone.weights) == ("vjepa2", "facebook/vjepa2-vitl-fpc64-256")
    data = config.dataset
    assert (data.kind, data.n_frames, data.stride, data.threads) == ("kinetics_400", 64, 2, 8)
    assert (data.train, data.validation, data.labels) == ("/data/train.csv", "/data/val.csv", "/data/labels.txt")
    model = config.model
    assert (model.head, model.num_context_latents, model.num_target_latents) == ("cross_attention", 16, 16)
    assert (model.hidden_dim, model.depth, model.num_heads, model.activation_checkpointing) == (512, 6, 8, "full")
    assert (config.objective.kind, config.objective.loss, config.latents.embedding_norm) == ("regression", "l1", "l2")
    trainer = config.trainer
    assert (trainer.learning_rate, trainer.weight_decay, trainer.max_epochs) == (1e-5, 0.01, 12)
    assert (trainer.max_grad_norm, trainer.micro_batch_size, trainer.batch_size) == (1.0, 2, 64)
    assert (trainer.schedule, trainer.warmup_steps) == ("constant", 0)
    assert (config.evaluation.eval_every, config.evaluation.batch_size) == ("4 epochs", 1)
    assert (config.checkpoint.save_every, config.engine.precision) == ("4 epochs", "bf16")
    assert config.tracking.wandb == "auto"
    printed, written = capsys.readouterr().out, (folder / "configs/new.yaml").read_text()
    for line in (
        "input_dim: dropped",
        "find_unused_parameters: dropped",
        "backbone.encode=joint",
        "2 per device x 4 accumulated x 8",
    ):
        assert line in printed and line in written


def test_mistakes_are_named_and_nothing_is_written(folder):
    with pytest.raises(UserError, match=r"none.yaml: there is no such file"):
        import_config([str(folder / "none.yaml")])
    old = folder / "old.yaml"
    for text, message in (
        (FILES["old"].replace("n_frames: 64", "frames: 64"), "trainer.n_frames' not found; add that key to the file"),
        (FILES["old"].replace("loss: l1", "loss: gan"), "objective.loss"),
    ):
        old.write_text(text)
        with pytest.raises(UserError, match=message):
            import_config([str(old)])
    assert not (folder / "old.flperf.yaml").exists()
