import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from memory import profiled
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from flperf.config import Model
from flperf.engine.optimizer import is_decayed
from flperf.errors import UserError
from flperf.models.flops import count_parameters, head_flops
from flperf.models.heads import HEADS, build_head
from flperf.models.heads.layers import rotary_table, rotate, token_coordinates
from flperf.models.latents import LatentGeometry

GEOMETRY = LatentGeometry(context_frames=3, target_frames=2, height=2, width=3, dim=20)


def small(name: str, **changes) -> Model:
    return Model(head=name, hidden_dim=32, depth=2, num_heads=2, **changes)


def inputs(name: str, geometry: LatentGeometry = GEOMETRY, batch: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(1)
    grid = (geometry.height, geometry.width, geometry.dim)
    context = torch.randn(batch, geometry.context_frames, *grid)
    return (
        [context, torch.randn(batch, geometry.target_frames, *grid), torch.rand(batch)] if name == "dit" else [context]
    )


def shaken(name: str, geometry: LatentGeometry = GEOMETRY, **changes) -> torch.nn.Module:
    """A head whose zero-initialised layers are not zero, so that every path shows in the output."""
    head = build_head(small(name, **changes), geometry, seed=0, compile=False)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return head


@pytest.mark.parametrize("name", HEADS)
def test_a_fresh_head_forecasts_zero_and_learns_in_every_layer_within_three_updates(name):
    head = build_head(small(name), GEOMETRY, seed=0, compile=False)
    output = head(*inputs(name))
    assert output.shape == (2, 2, 2, 3, 20) and torch.equal(output, torch.zeros_like(output))
    before = {key: value.clone() for key, value in head.state_dict().items()}
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    for _ in range(4):  # the zero output and gate layers open one after another
        optimizer.zero_grad()
        (head(*inputs(name)) - 1).square().mean().backward()
        optimizer.step()
    still = [key for key, value in head.state_dict().items() if torch.equal(value, before[key])]
    assert not still


@pytest.mark.parametrize(("context", "target"), [(1, 4), (4, 1), (3, 3)])
@pytest.mark.parametrize("name", HEADS)
def test_target_count_is_free(name, context, target):
    geometry = LatentGeometry(context, target, 2, 3, 20)
    assert build_head(small(name), geometry, seed=0, compile=False)(*inputs(name, geometry)).shape == (
        2,
        target,
        2,
        3,
        20,
    )


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
        head = shaken(name, positions=kind)
        context, *rest = inputs(name)
        swapped = context[:, [1, 0, 2]]
        assert torch.allclose(head(context, *rest), head(swapped, *rest), atol=1e-4) is not knows


@pytest.mark.parametrize("name", HEADS)
def test_clips_of_a_batch_do_not_mix(name):
    head = shaken(name)
    one, two = inputs(name), inputs(name)
    for x in two:
        x[1] = 0.5
    torch.testing.assert_close(head(*one)[0], head(*two)[0])


@pytest.mark.parametrize("name", HEADS)
def test_activation_checkpointing_changes_nothing(name):
    results = []
    for mode in ("none", "selective", "full"):
        head = shaken(name, activation_checkpointing=mode)
        loss = head(*inputs(name)).square().mean()
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in head.parameters())])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*results, strict=True))


@pytest.mark.parametrize(("name", "compiled"), [*((name, False) for name in HEADS), ("predictor", True)])
def test_checkpointing_saves_memory(name, compiled):
    geometry, held, products = replace(GEOMETRY, height=8, width=8), {}, {}
    for mode in ("none", "selective", "full"):
        torch._dynamo.reset()
        head = build_head(small(name, activation_checkpointing=mode), geometry, seed=0, compile=compiled)
        for parameter in head.parameters():
            parameter.grad = torch.zeros_like(parameter)  # they are there in every update but the first
        step = partial(pass_through, head, inputs(name, geometry))
        step()  # compiles
        held[mode], products[mode] = profiled(step)
    assert held["none"] > 1.1 * held["selective"] > 1.1 * held["full"], held
    if compiled:  # eager, products that are not computed again are recorded too
        assert products["none"] == products["selective"] < products["full"], products


def pass_through(head: torch.nn.Module, passed: list[torch.Tensor]) -> None:
    head(*passed).square().mean().backward()


@pytest.mark.parametrize("name", HEADS)
def test_only_full_checkpointing_multiplies_again(name):
    flops = {}
    for mode in ("none", "selective", "full"):
        with FlopCounterMode(display=False) as counter:
            pass_through(shaken(name, activation_checkpointing=mode), inputs(name))
        flops[mode] = counter.get_total_flops()
    assert flops["none"] == flops["selective"] < flops["full"]


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_checkpointing_saves_memory_on_a_gpu(compiled):
    geometry, held, gradients = replace(GEOMETRY, height=16, width=16), {}, {}
    for mode in ("none", "selective", "full"):
        torch._dynamo.reset()
        head = build_head(
            replace(small("dit", activation_checkpointing=mode), depth=8), geometry, seed=0, compile=compiled
        )
        head = head.to("cuda", torch.bfloat16)
        context, target, tau = (x.cuda() for x in inputs("dit", geometry))
        step = partial(pass_through, head, [context.bfloat16(), target.bfloat16(), tau])
        step()  # compiles
        torch.cuda.reset_peak_memory_stats()
        step()
        held[mode] = torch.cuda.max_memory_allocated()
        gradients[mode] = [parameter.grad for parameter in head.parameters()]
    assert held["none"] > held["selective"] > held["full"], held
    for mode in ("selective", "full"):
        torch.testing.assert_close(gradients[mode], gradients["none"])


@pytest.mark.parametrize("name", HEADS)
def test_blocks_compile_to_one_graph_each_and_agree_with_eager(name):
    torch._dynamo.reset()
    counters.clear()
    eager, compiled = shaken(name), build_head(small(name), GEOMETRY, seed=0, compile=True)
    compiled.load_state_dict(eager.state_dict())
    for head in (eager, compiled, compiled):
        head.zero_grad()
        head(*inputs(name)).square().mean().backward()
    graphs = counters["stats"]["unique_graphs"]
    # the block and, with a context memory, its keys and values; no second graph
    assert graphs == (1 if name == "predictor" else 2)
    assert not counters["graph_break"]
    for (key, a), b in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4, msg=key)


@pytest.mark.parametrize("name", HEADS)
def test_the_dit_sampler_path_equals_forward(name):
    if name != "dit":
        pytest.skip("only the DiT keeps a context memory")
    head = shaken(name)
    context, noised, tau = inputs(name)
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


@pytest.mark.parametrize("name", HEADS)
def test_flops_follow_from_the_sizes(name):
    d, depth, context, target = 32, 2, GEOMETRY.context_tokens, GEOMETRY.target_tokens
    linear = lambda tokens, rows, columns: 2 * tokens * rows * columns  # noqa: E731
    attend = lambda queries, keys: 4 * queries * keys * d  # noqa: E731
    own = context + target if name == "predictor" else target
    block = linear(own, d, 12 * d) + attend(own, own)
    if name != "predictor":
        block += linear(own, d, 2 * d) + linear(context, d, 2 * d) + attend(own, context)
    total = linear(context, 20, d) + depth * block + linear(target, d, 20)
    if name == "dit":
        total += (
            linear(target, 20, d)
            + linear(1, 256, d)
            + linear(1, d, d)
            + depth * linear(1, d, 9 * d)
            + linear(1, d, 2 * d)
        )
    assert head_flops(build_head(small(name), GEOMETRY, seed=0, compile=False), GEOMETRY, name == "dit") == total


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    geometry = LatentGeometry(2, 2, 3, 3, 8)
    coordinates = token_coordinates(geometry)
    assert coordinates.tolist() == [list(place) for place in itertools.product(range(4), range(3), range(3))]
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
