"""`flperf doctor` finds what is missing and names a fix."""

import ctypes
import os
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from runs import ROOT

from flperf.commands import doctor, doctor_config, doctor_machine
from flperf.config import load_config
from flperf.engine.devices import DEVICES
from flperf.engine.process import start_process
from flperf.errors import UserError
from flperf.estimate.memory import device_memory
from flperf.estimate.workload import build_workload
from flperf.run import build_components, evaluation_share

REFERENCE = ROOT / "configs/references/vjepa2_kinetics_400.yaml"


def findings(check) -> str:
    return "\n".join(map(str, check()))


def test_a_wrong_version_or_a_missing_package_fails_the_check(monkeypatch):
    assert "FAIL" not in findings(doctor_machine.packages)
    monkeypatch.setattr(
        doctor_machine, "requires", lambda name: ["einops>=99", "no-such-package>=1", "pytest>=99; extra == 'test'"]
    )
    text = findings(doctor_machine.packages)
    assert "FAIL" in text and "einops>=99" in text and "no-such-package" in text and "pytest" not in text


def test_a_missing_compiler_fails_the_check(monkeypatch):
    assert "FAIL" not in findings(doctor_machine.compiler)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    assert "apt install g++" in findings(doctor_machine.compiler)


def test_a_full_disk_fails_the_check(monkeypatch):
    monkeypatch.setattr(doctor_machine, "NEEDED_DISK_GB", 1e9)
    assert "FAIL" in findings(doctor_machine.space)


def test_a_configuration_is_opened_as_a_run_would(tiny, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", {doctor_machine.space: ""})
    with pytest.raises(SystemExit, match="0"):
        doctor.doctor(["--config", str(tiny)])
    printed = capsys.readouterr().out
    for text in (
        "10 of 10 train clips read",
        "5 of 5 validation clips read",
        "4 = 4 x 1 accumulation",
        "GB estimated at 4 clips",
    ):
        assert text in printed
    assert printed.endswith("all checks passed\n")
    with pytest.raises(SystemExit, match="1"):
        doctor.doctor(["--config", str(tiny), "dataset.kind=kinetics_400", "dataset.train=nowhere.csv"])
    printed = capsys.readouterr().out
    assert "FAIL  config" in printed and "nowhere.csv" in printed and printed.endswith("1 failed\n")


def test_clips_of_each_source_are_read(tiny, tmp_path):
    latents = {"backbone.weights=null", "dataset.kind=kinetics_400_cached", "dataset.n_frames=8"}
    for name, clips in (("a", 12), ("b", 3)):
        for clip in range(clips):
            torch.save(torch.randn(24, 4, 2, 2), tmp_path / f"{name}{clip}.pt")
        rows = [f"{name}{clip}.pt" for clip in range(clips)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["out_path", *rows]))
    sources = f"dataset.sources=[{{train: {tmp_path}/a.csv}}, {{train: {tmp_path}/b.csv, weight: 3}}]"
    found = list(map(str, doctor_config.run_check(load_config(tiny, [*latents, sources]))))
    assert any(f"5 of 5 train clips of {tmp_path}/a.csv read" in line for line in found)
    assert any(f"3 of 3 train clips of {tmp_path}/b.csv read" in line for line in found)
    assert any(f"{tmp_path}/b.csv: 3 clips, 0.75 of the samples" in line for line in found)


def test_unreadable_clips_fail_the_check_with_examples(monkeypatch):
    unreadable = [("a.mp4", "no video stream")]
    batches = [SimpleNamespace(skipped=unreadable, short=[], valid=torch.tensor([True, False]))]
    dataset = SimpleNamespace(chosen_batches=lambda *_: batches)
    run = SimpleNamespace(dataset=dataset, process=SimpleNamespace(device="cpu"))
    file = load_config(REFERENCE).dataset.train
    finding = doctor_config.clips_check(run, "train", [0, 1], "train clips", file)
    assert finding.text == "1 of 2 train clips read (a.mp4: no video stream)"
    assert "flperf index --csv data/kinetics_400/train.csv" in finding.fix
    monkeypatch.setattr("flperf.data.index.is_index", lambda file: True)  # which --csv does not take
    assert "--csv" not in doctor_config.clips_check(run, "train", [0, 1], "train clips", file).fix


def test_short_clips_are_counted_and_are_no_failure():
    short = [("a.mp4", "23 distinct frames")]
    batches = [SimpleNamespace(skipped=[], short=short, valid=torch.tensor([True, True, True]))]
    dataset = SimpleNamespace(chosen_batches=lambda *_: batches)
    run = SimpleNamespace(dataset=dataset, process=SimpleNamespace(device="cpu"), config=load_config(REFERENCE))
    finding = doctor_config.clips_check(run, "train", [0, 1, 2], "train clips", "train.csv")
    window = "127 frames (64 at stride 2)"
    assert finding.text == f"3 of 3 train clips read, 1 of 3 are shorter than the window of {window}"
    assert not finding.fix


@pytest.mark.parametrize(
    ("module", "check", "fix"),
    [
        ("av", doctor_machine.decoding, "'av"),
        ("nvidia.dali", doctor_machine.gpu_decoding, "'nvidia-dali"),
        ("triton", doctor_machine.compiler, "'triton=="),
    ],
)
def test_a_broken_package_fails_only_its_own_check(module, check, fix, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(doctor, "CHECKS", {check: doctor.CHECKS[check], doctor_machine.space: ""})
    with pytest.raises(SystemExit, match="1"):
        doctor.doctor([])
    printed = capsys.readouterr().out
    assert re.search(r"FAIL .*Error: ", printed) and f"--no-deps {fix}" in printed and "GB free" in printed


def test_a_broken_xformers_fails_the_check_without_a_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    assert "FAIL  attention" in "\n".join(map(str, doctor.findings(doctor_machine.attention, package="xformers")))


def test_an_unknown_accelerator_is_named(monkeypatch):
    import deepspeed.accelerator

    assert re.search(r"ok  engine +DeepSpeed \S+ on cpu, gloo", findings(doctor_machine.engine))
    monkeypatch.setenv("DS_ACCELERATOR", "foo")
    monkeypatch.setattr(deepspeed.accelerator, "get_accelerator", lambda: int("foo"))
    assert "unset DS_ACCELERATOR" in "\n".join(map(str, doctor.findings(doctor_machine.engine)))


def test_a_driver_whose_gpu_torch_does_not_see_fails_the_check(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor_machine, "DRIVER", tmp_path / "none")
    assert "FAIL" not in findings(doctor_machine.gpu)
    (tmp_path / "none").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun\n")
    assert "FAIL" in findings(doctor_machine.gpu)


def test_a_gpu_is_described(monkeypatch, tmp_path):
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
    )
    monkeypatch.setattr(doctor_machine, "DRIVER", tmp_path / "version")
    properties = type("Properties", (), {"name": "H100", "total_memory": 80e9, "major": 9, "minor": 0})
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_properties": lambda index: properties,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    text = findings(doctor_machine.gpu)
    assert "driver 580.65.06, torch for CUDA" in text and "0: H100, 80 GB, sm_90" in text


def test_codecs_are_those_that_nvdec_reports(monkeypatch):
    class Library:
        @staticmethod
        def cuvidGetDecoderCaps(caps) -> int:
            codec, chroma, depth = caps[:3]
            ctypes.memset(ctypes.addressof(caps) + 24, codec in (4, 8) and (chroma, depth) == (1, 0), 1)
            return 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library)
    assert findings(doctor_machine.gpu_decoding).endswith("NVDEC: H.264, HEVC")

    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert "NVIDIA_DRIVER_CAPABILITIES" in findings(doctor_machine.gpu_decoding)


def test_the_hub_is_online_only_if_it_answers(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "no answer from http://127.0.0.1:9" in findings(doctor_machine.hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline (HF_HUB_OFFLINE)" in findings(doctor_machine.hub)


def test_gated_weights_need_a_token(monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    gated = load_config(ROOT / "configs/references/dinov3_kinetics_400_deterministic.yaml")
    assert "hf auth login" in findings(lambda: doctor_config.gated_weights(gated))
    assert not findings(lambda: doctor_config.gated_weights(load_config(REFERENCE)))


def test_a_run_that_does_not_fit_fails_the_check_with_changes_that_fit(tiny):
    def planned(*overrides: str):
        overrides = ("engine.zero_stage=0", "trainer.batch_size=8", "model.depth=3", "model.hidden_dim=96", *overrides)
        return build_workload(load_config(tiny, list(overrides)), torch.float32, 1)

    work = planned()
    held = device_memory(work, DEVICES["h100"], 0, 1)
    for mode in ("selective", "full"):
        finding = doctor_config.memory_finding(work, replace(DEVICES["h100"], memory=held.total(mode) * 1.01), 1)
        assert f"model.activation_checkpointing={mode}" in finding.fix
    small = replace(DEVICES["h100"], memory=held.total("full") * 1.01)
    failed = doctor_config.memory_finding(work, small, 1)
    assert failed.text.startswith("does not fit") and "model.activation_checkpointing=full" in failed.fix
    clips = int(re.search(r"trainer.micro_batch_size=(\d+)", failed.fix)[1])
    assert (
        1 <= clips < 8 and not doctor_config.memory_finding(planned(f"trainer.micro_batch_size={clips}"), small, 1).fix
    )
    assert "more devices" in doctor_config.memory_finding(work, replace(small, memory=1.0), 1).fix
    assert not doctor_config.memory_finding(work, DEVICES["h100"], 1).fix


def test_zero_advice_is_the_lowest_stage_that_fits(tiny):
    work = build_workload(load_config(tiny, ["engine.zero_stage=3"]), torch.float32, 4)
    assert "engine.zero_stage=1 is enough" in doctor_config.memory_finding(work, DEVICES["h100"], 4).text


def test_overrides_need_a_configuration_and_a_missing_one_is_named():
    with pytest.raises(UserError, match="name one with --config"):
        doctor.doctor(["trainer.batch_size=2"])
    (finding,) = doctor_config.configured("nowhere.yaml", [])
    assert "there is no file nowhere.yaml" in finding.text and "fix what this line names" in finding.fix


def test_debug_shows_where_a_check_failed(capsys):
    def broken():
        raise ValueError("no luck")
        yield

    assert "no luck" in findings(lambda: doctor.findings(broken, debug=True))
    assert "Traceback" in capsys.readouterr().err


@pytest.fixture
def videos_of(tiny, videos, tmp_path):
    """The components of a run on some of the test videos."""

    def build(*names: str):
        (tmp_path / "train.csv").write_text("".join(f"{videos / name} 0\n" for name in names))
        config = load_config(tiny, ["dataset.kind=kinetics_400", f"dataset.train={tmp_path / 'train.csv'}"])
        process = start_process()
        return build_components(config, process, evaluation_share(config, process))

    return build


def test_reading_is_timed_against_the_step(videos_of, monkeypatch, tmp_path):
    run = videos_of("h264.mp4", "portrait.mp4", "text.mp4")  # fewer than are timed, one of them unreadable
    text = str(doctor_config.reading_check(run))
    rate, needed = (float(number) for number in re.findall(r"([\d.]+) clips/s", text))
    assert rate > 0 and needed > 0 and "FAIL" not in text and "this CPU" in text
    assert ("hold it up" in text) == (rate < needed)
    monkeypatch.setattr("flperf.estimate.step_time.computed_clips", lambda *_: 1e9)
    assert "hold it up; write files that decode fast (flperf prepare)" in str(doctor_config.reading_check(run))
    (tmp_path / "prepared.json").write_text("{}")  # the set is prepared already
    text = str(doctor_config.reading_check(run))
    assert "flperf prepare" not in text and "flperf encode" in text
    monkeypatch.setattr("flperf.estimate.step_time.computed_clips", lambda *_: 0.0)
    assert "hold it up" not in str(doctor_config.reading_check(run))


def test_reading_is_timed_as_by_one_process_of_several(videos_of, monkeypatch):
    """Each has its share of the cores, and one device to feed."""
    monkeypatch.setattr(doctor_config, "processes_of_run", lambda: 2)
    monkeypatch.setattr("flperf.data.cores.cpu_quota", lambda: None)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(4)))
    text = str(doctor_config.reading_check(videos_of("h264.mp4")))
    assert "2 read at a time, by one of 2 processes" in text and "LOCAL_WORLD_SIZE" not in os.environ


def test_timing_ends_when_the_time_is_up(videos_of, monkeypatch):
    run = videos_of("h264.mp4")
    monkeypatch.setattr(doctor_config, "TIME_LIMIT", 0.0)
    monkeypatch.setattr(doctor_config, "TIMED_CLIPS", 10**9)
    assert "read at a time" in str(doctor_config.reading_check(run))


def test_reading_without_a_usable_clip_is_not_timed(videos_of):
    assert "not timed: 1 clips in a row can't be read" in str(doctor_config.reading_check(videos_of("text.mp4")))
