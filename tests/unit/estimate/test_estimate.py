"""`flperf estimate`: activations, bounds of a step, the report and its errors. Its FLOPs are those of
tests/unit/models/test_flops.py; model states are measured in tests/integration/test_zero_stages.py, and the step of a
CPU in tests/integration/test_estimate.py."""

from dataclasses import replace

import pytest
import torch
from memory import profiled
from runs import ROOT
from transformers import VJEPA2Config

from flperf.commands.estimate import estimate
from flperf.config import load_config
from flperf.engine.devices import DEVICES
from flperf.errors import UserError
from flperf.estimate.memory import device_memory
from flperf.estimate.pass_cost import training_cost
from flperf.estimate.report import report
from flperf.estimate.step_time import step_time
from flperf.estimate.workload import Workload, build_workload
from flperf.models.heads import build_head
from flperf.models.latents import LatentGeometry

CPU = torch.device("cpu")
REFERENCE = str(ROOT / "configs/references/vjepa2_kinetics_400_deterministic.yaml")


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_activations_are_what_a_pass_holds(tiny, mode):
    """Compared with PyTorch's record of every allocation in a real pass."""
    sizes = ["model.hidden_dim=256", "model.num_heads=4", f"model.activation_checkpointing={mode}"]
    config, geometry = load_config(tiny, sizes), LatentGeometry(2, 2, 4, 4, 64)
    head = build_head(config.model, geometry, seed=0, compile=False)
    context = torch.randn(4, geometry.context_frames, geometry.height, geometry.width, geometry.dim)
    head(context).square().mean().backward()  # allocates the gradients
    measured, _ = profiled(lambda: head(context).square().mean().backward())
    assert training_cost(head, geometry, 4, torch.float32, flow_matching=False).peak == pytest.approx(
        measured, rel=0.01
    )


def test_a_local_folder_needs_no_weights(tiny, tmp_path):
    """Its configuration determines the sizes."""
    architecture = {"crop_size": 32, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    VJEPA2Config(**architecture).save_pretrained(tmp_path)
    (tmp_path / "video_preprocessor_config.json").write_text('{"crop_size": {"height": 32, "width": 32}}')
    from_folder = build_workload(load_config(tiny, [f"backbone.weights={tmp_path}"]), torch.float32, 1)
    keys = [f"backbone.architecture.{key}={value}" for key, value in architecture.items()]
    written = build_workload(load_config(tiny, keys), torch.float32, 1)
    assert from_folder.geometry.dim == 48
    assert (from_folder.encoder_parameters, from_folder.flops) == (written.encoder_parameters, written.flops)


@pytest.mark.parametrize(
    "name", ["4ds_kinetics_400_deterministic", "dinov3_kinetics_400_deterministic", "vjepa2_kinetics_400_cached"]
)
def test_reference_configurations_can_be_estimated_without_weights(name):
    workload = build_workload(load_config(ROOT / f"configs/references/{name}.yaml"), torch.bfloat16, 8)
    assert (workload.encoder_flops == 0) == name.endswith("cached")
    assert step_time(workload, DEVICES["b200"], 1, 4, 8).seconds > 0


@pytest.fixture(scope="module")
def workload() -> Workload:
    return build_workload(load_config(REFERENCE), torch.bfloat16, 8)


def test_the_slowest_part_of_a_step_is_its_bound(workload):
    h100 = DEVICES["h100"]
    slow = {"arithmetic": h100, "memory": replace(h100, bandwidth=1e10), "collectives": replace(h100, network=1e6)}
    for bound, device in slow.items():
        one, many = (step_time(workload, device, 1, nodes, 8) for nodes in (1, 16))
        assert many.bound == bound
        assert many.clips == 16 * one.clips
        assert (many.efficiency < 0.5) == (bound == "collectives")
        assert many.seconds >= max(many.arithmetic, many.memory)


def test_zero_divides_the_optimizer_among_processes(workload):
    totals = {
        stage: [device_memory(workload, DEVICES["h100"], stage, n).states.optimizer for n in (8, 512)]
        for stage in range(4)
    }
    assert totals[0][0] == totals[0][1]
    assert all(totals[stage][0] == pytest.approx(64 * totals[stage][1]) for stage in (1, 2, 3))


def test_the_report_states_that_it_is_an_estimate_and_its_assumptions(workload):
    text = report(workload, DEVICES["h100"], [1, 4], 8)
    assert text.startswith("An ESTIMATE of vjepa2_kinetics_400_deterministic on H100 SXM 80 GB")
    assert "head      153.3 M parameters, predictor" in text
    assert text.count("Estimated") == 2
    assert all(part in text for part in ("cores to decode them", "50% of the peak of 989 TFLOP/s", "data sheet"))
    rows = [line.split() for line in text.splitlines() if line.strip()[:1].isdigit()]
    assert [row[:2] for row in rows] == 2 * [[nodes, stage] for nodes in "14" for stage in ("0", "1*", "2", "3")]


def test_the_command_takes_overrides(tiny, capsys):
    cluster = ["--device", "a100", "--nodes", "1,2", "--devices-per-node", "2"]
    estimate(["--config", str(tiny), *cluster, "engine.precision=bf16"])
    text = capsys.readouterr().out
    assert "A100 SXM 80 GB" in text and "batch     4 = 2 x 1 accumulation x 2 processes, bfloat16" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "v100"], "--device: 'v100' is unknown; known: a100, h100, h200, b200, cpu"),
        (["--nodes", "1,two"], "--nodes: 'two' is not a whole number above 0"),
        (["--nodes", "0"], "--nodes: '0' is not a whole number above 0"),
        (["--devices-per-node", "-1"], "--devices-per-node: '-1' is not a whole number above 0"),
        (["--device", "cpu", "--nodes", "2"], "--device cpu: is this machine as one device"),
        (["--nodes", "9"], "trainer.batch_size: 64 clips cannot be divided evenly among 72 processes"),
        (["engine.precision=fp32"], "engine.precision: the table of devices holds bf16 peaks only"),
        (["backbone.weights=someone/else"], "backbone.weights: the sizes of 'someone/else' are not known here"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError, match="^[^\n]*$") as error:
        estimate(["--config", REFERENCE, *arguments])
    assert str(error.value).startswith(message)
