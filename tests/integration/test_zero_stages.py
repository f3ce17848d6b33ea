"""ZeRO by the numbers: what each stage sends and holds, counted in real runs, against the formulas."""

import itertools
import json

import pytest
import torch
from launch.zero import measure
from runs import ROOT, free_port, launch

from flperf.config import load_config
from flperf.engine.devices import DEVICES
from flperf.engine.process import start_process
from flperf.estimate.plan import memory, plan
from flperf.estimate.zero import Collective, collectives, model_states

BYTES = {"bf16": 2, "fp32": 4}
WIDE = ["model.hidden_dim=320"]  # its matrices are above the 1e5 elements below which ZeRO 3 leaves a parameter whole
# What makes DeepSpeed 0.19 send what the paper says. ZeRO 3: release and gather whatever is not in use.
TEXTBOOK = {
    1: {"use_multi_rank_bucket_allreduce": False},
    2: {"use_multi_rank_bucket_allreduce": False},
    3: {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0, "stage3_param_persistence_threshold": 0},
}
# Psi a process and update, for many processes (Rajbhandari et al., arXiv:1910.02054, section 7).
TEXTBOOK_VOLUME = {1: 2, 2: 2, 3: 3}


def request(stage: int, precision: str, *overrides: str, zero: dict | None = None) -> tuple[list[str], dict]:
    return [*WIDE, f"engine.zero_stage={stage}", f"engine.precision={precision}", *overrides], zero or {}


def run_worker(config, requests: dict, processes: int) -> dict[str, list[dict]]:
    folder = config.parent
    request_file, result_file = folder / f"zero_{free_port()}.json", folder / f"zero_{free_port()}_result.json"
    request_file.write_text(json.dumps([str(config), requests]))
    finished = launch(processes, str(ROOT / "tests/launch/zero.py"), str(request_file), str(result_file))
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    return json.loads(result_file.read_text())


@pytest.fixture(scope="module")
def measured(tiny) -> dict[int, dict[str, list[dict]]]:
    """By number of processes and name: what each rank sent and held."""
    plain = {f"{precision}-{stage}": request(stage, precision) for precision in BYTES for stage in range(4)}
    accumulated = {f"accumulated-{stage}": request(stage, "bf16", "trainer.micro_batch_size=1") for stage in (1, 2, 3)}
    textbook = {f"textbook-{stage}": request(stage, "bf16", zero=zero) for stage, zero in TEXTBOOK.items()}
    two = run_worker(tiny, plain | accumulated | textbook, 2)
    four = run_worker(tiny, {f"bf16-{stage}": request(stage, "bf16") for stage in (1, 2, 3)}, 4)
    process = start_process()
    one = {f"bf16-{stage}": [measure(str(tiny), *request(stage, "bf16"), process)] for stage in (1, 2, 3)}
    return {1: one, 2: two, 4: four}


def sent_bytes(rank: dict, processes: int) -> float:
    """Of everything but scalars, in bytes."""
    sizes = {"bfloat16": 2, "float32": 4, "int64": 8}
    messages = (name.split() + [elements] for name, elements in rank["sent"].items() if name != "scalars")
    return sum(
        Collective(kind, elements * sizes[dtype], hidden=False).sent(processes) for kind, dtype, elements in messages
    )


def padding(rank: dict, processes: int) -> float:
    """Elements by which what is sent or held may exceed the parameters. ZeRO 1 and 2 pad each of the two groups of
    parameters to a multiple of 2 * processes, ZeRO 3 each parameter to a multiple of `processes`, so fewer than
    processes * (tensors + 4)."""
    return processes * (rank["tensors"] + 4)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("precision", BYTES)
def test_bytes_sent_an_update(measured, stage, precision):
    """Every collective of an update, two processes: gradients and weights travel in the compute dtype. At most eight
    scalars (norms, overflow) besides; stage 3 also compares its order of parameters, an integer each, until it knows
    it."""
    (rank, other), size = measured[2][f"{precision}-{stage}"], BYTES[precision]
    expected = sum(collective.sent(2) for collective in collectives(rank["parameters"], stage, size))
    assert 0 <= sent_bytes(rank, 2) - expected <= 2 * size * padding(rank, 2)
    assert rank["sent"] == other["sent"] and rank["sent"].get("scalars", 0) <= 8
    assert expected == (2, 3, 3, 2)[stage] * rank["parameters"] * size / 2  # half of it stays at home


@pytest.mark.parametrize("stage", TEXTBOOK)
def test_bytes_sent_can_be_the_textbooks(measured, stage):
    """With DeepSpeed's options for it: reduce to the owner (or scatter), and gather twice. (N - 1) / N of the paper's
    volume."""
    rank = measured[2][f"textbook-{stage}"][0]
    expected = TEXTBOOK_VOLUME[stage] * rank["parameters"] * 2 / 2
    assert 0 <= sent_bytes(rank, 2) - expected <= 3 * 2 * padding(rank, 2)


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_bytes_sent_with_two_micro_batches(measured, stage):
    """Stages 2 and 3 reduce the gradients of every micro-batch. What ZeRO 3 leaves whole it gathers once an update."""
    rank = measured[2][f"accumulated-{stage}"][0]
    expected = sum(collective.sent(2) for collective in collectives(rank["parameters"], stage, 2, accumulation_steps=2))
    if stage == 3:
        expected -= rank["small"] * 2 / 2
    assert 0 <= sent_bytes(rank, 2) - expected <= 4 * 2 * padding(rank, 2)


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_the_optimizer_is_shared_out_evenly(measured, stage):
    """Master weights, moments and moving average on each rank at 1, 2 and 4 processes: 16 bytes a parameter /
    processes, to padding."""
    for processes, runs in measured.items():
        for rank in runs[f"bf16-{stage}"]:
            held = sum(rank["held"][name] for name in ("master", "moments", "average"))
            expected = model_states(rank["parameters"], stage, processes, 2, average=True).optimizer
            assert expected == 16 * rank["parameters"] / processes
            assert 0 <= held - expected <= 16 * padding(rank, processes) / processes


@pytest.mark.parametrize(
    ("kind", "stage"), [*itertools.product(BYTES, range(4)), ("accumulated", 1), ("accumulated", 2), ("accumulated", 3)]
)
def test_bytes_held(measured, kind, stage):
    """Every state on every rank. ZeRO 3 holds small parameters whole, and their shards besides. The optimizer steps
    matrices first, the small rest (biases, norms) after them, so up to the latter's gradients may be missing where
    they are most."""
    size = BYTES.get(kind, 2)
    for rank in measured[2][f"{kind}-{stage}"]:
        expected = model_states(
            rank["parameters"], stage, 2, size, average=True, accumulates=kind == "accumulated", overlaps=False
        )
        assert rank["held"]["buckets"] == expected.buckets
        slack = 16 * padding(rank, 2) / 2
        for name in ("master", "moments", "average"):
            assert 0 <= rank["held"][name] - getattr(expected, name) <= slack, name
        whole = size * rank["small"] if stage == 3 else 0
        assert 0 <= rank["held"]["weights"] - expected.weights - whole <= slack
        assert rank["held"]["gradients"] == pytest.approx(expected.gradients, abs=slack + 8 * rank["small"])


@pytest.mark.parametrize("stage", range(4))
def test_an_estimate_says_what_two_processes_hold(measured, tiny, stage):
    """Of a configuration, without a process; to the padding, and what ZeRO 3 holds whole."""
    work = plan(load_config(tiny, WIDE), torch.bfloat16, 2)
    expected = memory(work, DEVICES["h100"], stage, 2).states
    for rank in measured[2][f"bf16-{stage}"]:
        held, whole = rank["held"], 2 * rank["small"] if stage == 3 else 0
        assert rank["parameters"] == work.head_parameters
        assert held["weights"] == pytest.approx(expected.weights + whole, rel=0.01)
        assert held["master"] + held["moments"] + held["average"] == pytest.approx(expected.optimizer, rel=0.01)
        assert held["gradients"] == pytest.approx(expected.gradients, rel=0.01, abs=8 * rank["small"])
