"""The heads: initial weights, what their forecasts depend on, compilation, and sizes."""

import itertools

import pytest
import torch
from small_heads import GEOMETRY, forward_and_backward, inputs, perturbed, small
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from flperf.config import Model
from flperf.engine.optimizer import is_decayed
from flperf.errors import UserError
from flperf.models.flops import count_parameters
from flperf.models.heads import HEADS, build_head
from flperf.models.heads.layers import HeadProjection
from flperf.models.heads.positions import rotary_table, rotate, token_coordinates
from flperf.models.latents import LatentGeometry


@pytest.mark.parametrize("name", HEADS)
def test_a_fresh_head_forecasts_zero_and_learns_in_every_layer_within_four_updates(name):
    head = build_head(small(name), GEOMETRY, seed=0, compile=False)
    output = head(*inputs(name))
    assert output.shape == (2, 2, 2, 3, 20) and torch.equal(output, torch.zeros_like(output))
    before = {key: value.clone() for key, value in head.state_dict().items()}
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    for _ in range(4):  # the output layer and the gates leave zero one after another
        optimizer.zero_grad()
        (head(*inputs(name)) - 1).square().mean().backward()
        optimizer.step()
    unchanged = [key for key, value in head.state_dict().items() if torch.equal(value, before[key])]
    assert not unchanged


@pytest.mark.parametrize(("context", "target"), [(1, 4), (4, 1), (3, 3)])
@pytest.mark.parametrize("name", HEADS)
def test_any_number_of_context_and_target_frames(name, context, target):
    geometry = LatentGeometry(context, target, 2, 3, 20)
    head = build_head(small(name), geometry, seed=0, compile=False)
    assert head(*inputs(name, geometry)).shape == (2, target, 2, 3, 20)


@pytest.mark.parametrize("name", HEADS)
def test_weights_depend_on_the_seed_alone(name):
    torch.manual_seed(5)
    first = build_head(small(name), GEOMETRY, seed=3, compile=False).state_dict()
    torch.manual_seed(6)
    again, other = (build_head(small(name), GEOMETRY, seed=seed, compile=False).state_dict() for seed in (3, 4))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("positions", ["rope3d", "sincos"])
@pytest.mark.parametrize("name", HEADS)
def test_a_head_knows_where_context_tokens_are(name, positions):
    """Swapping two context frames changes the forecast; without positions only the set of context tokens counts."""
    for kind, knows in ((positions, True), ("none", False)):
        head = perturbed(name, positions=kind)
        context, *rest = inputs(name)
        swapped = context[:, [1, 0, 2]]
        assert torch.allclose(head(context, *rest), head(swapped, *rest), atol=1e-4) is not knows


@pytest.mark.parametrize("name", HEADS)
def test_clips_of_a_batch_do_not_mix(name):
    head = perturbed(name)
    one, two = inputs(name), inputs(name)
    for x in two:
        x[1] = 0.5
    torch.testing.assert_close(head(*one)[0], head(*two)[0])


@pytest.mark.parametrize("name", HEADS)
def test_blocks_compile_to_one_graph_each_and_agree_with_eager(name, graphs_only):
    counters.clear()
    eager, compiled = perturbed(name), build_head(small(name), GEOMETRY, seed=0, compile=True)
    compiled.load_state_dict(eager.state_dict())
    for head in (eager, compiled, compiled):
        head.zero_grad()
        forward_and_backward(head, inputs(name))
    # All blocks share one graph, and so do the context projections of heads that have them.
    assert counters["stats"]["unique_graphs"] == (1 if name == "predictor" else 2)
    assert not counters["graph_break"]
    for (key, a), b in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4, msg=key)


class Clones(TorchDispatchMode):
    """Counts the tensors that are copied to another layout."""

    count = 0

    def __torch_dispatch__(self, operator, types, arguments=(), named=None):
        self.count += operator is torch.ops.aten.clone.default
        return operator(*arguments, **(named or {}))


@pytest.mark.parametrize("parts", [2, 3])
def test_the_parts_of_a_projection_are_not_copied_to_another_layout(parts):
    layer, tokens = HeadProjection(32, 2, parts=parts, rotated=1), torch.randn(2, 5, 32, requires_grad=True)
    with Clones() as clones:
        outputs = layer(tokens, rotary_table(torch.arange(15).view(5, 3), 16))
        sum(output.square().sum() for output in outputs).backward()
    assert clones.count == 0


def test_a_dit_gives_a_sampler_the_velocity_of_its_forward_pass():
    head = perturbed("dit")
    context, noised, tau = inputs("dit")
    assert torch.equal(head(context, noised, tau), head.velocity(noised, tau, head.encode_context(context)))


def test_reference_sizes():
    """ViT-L latents of 64 frames of 256 x 256: 16 context and 16 target frames of 16 x 16 x 1024, width 1024, depth
    12."""
    geometry, d = LatentGeometry(16, 16, 16, 16, 1024), 1024
    attention, mlp = 4 * d * d + 4 * d, 8 * d * d + 5 * d
    context = d * d + d + 2 * d  # projection, norm
    norms, output = 2 * d, d * d + d
    key_value, cross = 2 * d * d + 2 * d, 2 * d * d + 2 * d
    expected = {
        "predictor": context + d + 12 * (attention + mlp + 2 * norms) + norms + output,
        "cross_attention": context + 4096 * d + 12 * (attention + mlp + cross + key_value + 3 * norms) + norms + output,
        "dit": context
        + (d * d + d)  # noised latents
        + (256 * d + d + d * d + d)  # tau
        + 12 * (attention + mlp + cross + key_value + 9 * (d * d + d))
        + (2 * d * d + 2 * d)
        + output,
    }
    with torch.device("meta"):
        counts = {name: count_parameters(HEADS[name](Model(head=name), geometry)) for name in HEADS}
    assert counts == expected
    assert {name: round(count / 1e6) for name, count in counts.items()} == {
        "predictor": 153,
        "cross_attention": 208,
        "dit": 321,
    }


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    geometry = LatentGeometry(2, 2, 3, 3, 8)
    coordinates = token_coordinates(geometry)
    assert coordinates.tolist() == [list(position) for position in itertools.product(range(4), range(3), range(3))]
    query, key = torch.randn(2, 1, 1, 1, 10, generator=torch.Generator().manual_seed(0))
    product = lambda a, b: (  # noqa: E731
        rotate(query, rotary_table(torch.tensor([a]), 10)) * rotate(key, rotary_table(torch.tensor([b]), 10))
    ).sum()
    torch.testing.assert_close(product([1, 2, 3], [4, 1, 1]), product([5, 3, 7], [8, 2, 5]), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(product([1, 2, 3], [4, 1, 1]), product([1, 2, 3], [4, 1, 2]))
    rotated = rotate(query.expand(1, len(coordinates), 1, 10), rotary_table(coordinates, 10))
    torch.testing.assert_close(rotated.norm(dim=-1), query.norm().expand(1, len(coordinates), 1))


def test_weights_decay_but_norms_biases_and_tokens_do_not():
    head = build_head(small("cross_attention"), GEOMETRY, seed=0, compile=False)
    decayed = {name for name, parameter in head.named_parameters() if is_decayed(name, parameter)}
    assert decayed == {name for name in dict(head.named_parameters()) if name.endswith("weight") and "norm" not in name}


def test_unknown_head_is_named():
    with pytest.raises(UserError, match="model.head: 'lstm' is unknown; known: predictor, cross_attention, dit"):
        build_head(Model(head="lstm"), GEOMETRY, seed=0, compile=False)
