import pytest
import torch

from flperf.config import Backbone
from flperf.data.preprocessing import Preprocessing
from flperf.errors import UserError
from flperf.models.encoder import Encoder, build_encoder, encode_clip
from flperf.models.latents import LatentGeometry

CPU = torch.device("cpu")
ARCHITECTURES = {
    "vjepa2": {"crop_size": 32, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    "dinov3": {
        "image_size": 32,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 96,
        "num_register_tokens": 4,
    },
    "4ds": {  # 2 of the 3 blocks run
        "image_size": 32,
        "readout": 1.0,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "intermediate_size": 96,
        "num_attention_heads": 2,
    },
}


def build(kind: str, compile: bool = False, **changes) -> Encoder:
    backbone = Backbone(kind=kind, architecture=ARCHITECTURES[kind], frame_stride=2, **changes)
    return build_encoder(backbone, Preprocessing.of(backbone), dtype=torch.float32, device=CPU, compile=compile)


def save(model, folder) -> str:
    model.save_pretrained(folder)
    processor = '{"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}'
    (folder / "video_preprocessor_config.json").write_text(processor)
    return str(folder)


def random_video(frames: int = 12, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (batch, frames, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


GEOMETRY = LatentGeometry(2, 4, 2, 2, 48)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_latents_have_the_documented_shape(kind):
    encoder = build(kind)
    latents = encoder(random_video())
    assert latents.shape == (2, *encoder.latent_shape(12)) == (2, 6, 2, 2, 48)
    assert latents.is_contiguous() and not latents.requires_grad
    assert not encoder.training and not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("geometry", [GEOMETRY, LatentGeometry(3, 3, 2, 2, 48)], ids=["two batches", "one batch"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_split_encoding_keeps_the_target_out_of_the_context(kind, geometry):
    """Bitwise, also where both have the same length and are encoded as one batch."""
    encoder, video, changed, known = build(kind), random_video(), random_video(), 2 * geometry.context_frames
    changed[:, known:] = random_video(seed=1)[:, known:]
    context, target = encode_clip(encoder, video, geometry, "split")
    context_changed, target_changed = encode_clip(encoder, changed, geometry, "split")
    assert torch.equal(context, context_changed)
    assert not torch.allclose(target, target_changed)
    torch.testing.assert_close(context, encoder(video[:, :known]))
    torch.testing.assert_close(target, encoder(video[:, known:]))


def test_joint_encoding_leaks_the_future_into_the_context():
    """With clips that differ in the future only, and with sharper attention than random weights have."""
    encoder = build("vjepa2")
    with torch.no_grad():
        for block in encoder.backbone.blocks:
            block.query_key_value.weight[: 2 * 48].mul_(20)
    video, spliced = random_video(), random_video()
    spliced[:, 4:] = random_video(seed=1)[:, 4:]
    context, _ = encode_clip(encoder, video, GEOMETRY, "joint")
    context_spliced, _ = encode_clip(encoder, spliced, GEOMETRY, "joint")
    assert (context - context_spliced).abs().max() > 1e-2 * context.std()
    split, _ = encode_clip(encoder, video, GEOMETRY, "split")
    split_spliced, _ = encode_clip(encoder, spliced, GEOMETRY, "split")
    assert torch.equal(split, split_spliced)


def test_dinov3_is_the_same_split_or_joint_and_encodes_every_stride_th_frame():
    encoder, video = build("dinov3"), random_video()
    split = torch.cat(encode_clip(encoder, video, GEOMETRY, "split"), dim=1)
    joint = torch.cat(encode_clip(encoder, video, GEOMETRY, "joint"), dim=1)
    torch.testing.assert_close(split, joint)
    unread = video.clone()
    unread[:, 1::2] = 0
    assert torch.equal(encoder(unread), encoder(video))


def test_dinov3_drops_class_and_register_tokens():
    encoder, video = build("dinov3"), random_video(frames=2, batch=1)
    tokens = encoder.backbone.encoder(encoder.normalise(video)[:, 0]).last_hidden_state
    assert tokens.shape[1] == 1 + 4 + 4
    torch.testing.assert_close(encoder(video)[0, 0].flatten(0, 1), tokens[0, 5:])


def test_vjepa2_equals_the_features_of_transformers(tmp_path):
    """Attention with random weights is nearly uniform and would hide a wrong position, so queries and keys are scaled
    up; biases are not zero."""
    from transformers import VJEPA2Config, VJEPA2Model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VJEPA2Model(VJEPA2Config(**ARCHITECTURES["vjepa2"])).eval()
        for layer in model.encoder.layer:
            for projection in (layer.attention.query, layer.attention.key):
                projection.weight.data.mul_(20)
                projection.bias.data.normal_()
    encoder, video = build("vjepa2", weights=save(model, tmp_path)), random_video()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((video.float() / 255 - mean) / std).permute(0, 1, 4, 2, 3)
    with torch.no_grad():
        expected = model.get_vision_features(pixels).view(2, 6, 2, 2, 48)
    torch.testing.assert_close(encoder(video), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_compiled_blocks_have_no_graph_break_and_agree_with_eager(kind, graphs_only):
    eager, compiled = build(kind), build(kind, compile=True)
    torch.testing.assert_close(compiled(random_video()), eager(random_video()), atol=1e-5, rtol=1e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(random_video(seed=3))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_whole_encoder_traces_as_one_graph(kind):
    torch._dynamo.reset()
    encoder = build(kind)
    whole = torch.compile(encoder, fullgraph=True, backend="eager")
    assert torch.equal(whole(random_video()), encoder(random_video()))


def test_weights_come_from_a_local_folder(tmp_path):
    from transformers import VJEPA2Config, VJEPA2Model

    torch.manual_seed(7)
    model = VJEPA2Model(VJEPA2Config(**ARCHITECTURES["vjepa2"]))
    encoder = build("vjepa2", weights=save(model, tmp_path))
    assert torch.equal(encoder.backbone.norm.weight, model.encoder.layernorm.weight)
    assert torch.equal(encoder.backbone.blocks[1].mlp.fc1.weight, model.encoder.layer[1].mlp.fc1.weight)


def test_mistakes_are_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no request for weights that do not exist
    with pytest.raises(UserError, match="backbone.kind: 'vit' is unknown; known: vjepa2, dinov3, 4ds"):
        Encoder(Backbone(kind="vit"), Preprocessing.of(Backbone()), torch.float32)
    with pytest.raises(UserError, match="backbone.architecture"):
        bad = Backbone(architecture={"hidden_size": 50, "num_attention_heads": 3, "crop_size": 32})
        Encoder(bad, Preprocessing.of(bad), torch.float32)
    with pytest.raises(UserError, match="backbone.architecture.hiden_size: VJEPA2Config has no such argument"):
        Encoder(Backbone(architecture={"hiden_size": 48}), Preprocessing.of(Backbone()), torch.float32)
    with pytest.raises(UserError, match="backbone.weights: 'nowhere/at-all'"):
        Encoder(Backbone(weights="nowhere/at-all"), Preprocessing.of(Backbone()), torch.float32)
