"""The folder of a run: it is resumed by the same run only, and survives damaged files."""

from dataclasses import replace
from pathlib import Path

import pytest

from flperf.config import Config, Source, dump_config
from flperf.config import Dataset as ConfigDataset
from flperf.data import Dataset
from flperf.data.annotations import Annotations, SourceClips
from flperf.engine.process import start_process
from flperf.errors import UserError
from flperf.training.run_folder import RunFolder, describe_run, training_clips


def test_a_run_keeps_its_id_and_a_new_run_gets_another(tmp_path):
    def run_id(name: str) -> str:
        folder = RunFolder(Config(name=name, experiment=str(tmp_path)), debug=False)
        folder.path.mkdir(exist_ok=True)
        return folder.run_id()

    assert run_id("first") == run_id("first") != run_id("second")


def test_a_run_needs_no_git(tmp_path, monkeypatch):
    """Many containers have none."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_run(start_process())["commit"] is None


def opened(experiment: Path, *clips: str, overwrite: bool = False, sources: tuple[SourceClips, ...] = ()) -> RunFolder:
    """Open the folder of a run with these training clips."""
    config = Config(name="run", experiment=str(experiment))
    folder = RunFolder(config, debug=False)
    folder.open(
        config,
        start_process(),
        Dataset({"train": Annotations(list(clips), [0] * len(clips), sources)}, None, 0),
        overwrite=overwrite,
    )
    return folder


def test_other_training_clips_are_another_run(tmp_path):
    """Added or reordered clips would change the order of samples."""
    opened(tmp_path, "a.mp4", "b.mp4")
    opened(tmp_path, "a.mp4", "b.mp4")
    for clips in (["b.mp4", "a.mp4"], ["a.mp4", "b.mp4", "c.mp4"]):
        with pytest.raises(UserError, match=r"dataset\.train: names other clips .* --overwrite"):
            opened(tmp_path, *clips)
    opened(tmp_path, "b.mp4", "a.mp4", overwrite=True)
    opened(tmp_path, "b.mp4", "a.mp4")


def test_a_clip_that_moved_to_another_source_is_another_run(tmp_path):
    """The list of all clips is the same, but their order of samples is not."""

    def sources(first: int, second: int) -> tuple[SourceClips, ...]:
        return SourceClips("a.csv", first, 1.0), SourceClips("b.csv", second, 1.0)

    clips = ("a.mp4", "b.mp4", "c.mp4")
    opened(tmp_path, *clips, sources=sources(1, 2))
    opened(tmp_path, *clips, sources=sources(1, 2))
    with pytest.raises(UserError, match=r"dataset\.sources: names other clips .* --overwrite"):
        opened(tmp_path, *clips, sources=sources(2, 1))


def test_other_weights_or_sources_are_another_run(tmp_path):
    def config(*sources: Source) -> Config:
        return Config(name="run", experiment=str(tmp_path), dataset=ConfigDataset(sources=list(sources) or None))

    folder = RunFolder(config(), debug=False)
    folder.path.mkdir()
    earlier = dump_config(config()).replace("  sources: null\n", "")  # as written before there were sources
    (folder.path / "config.yaml").write_text(earlier)
    folder.check(config())
    (folder.path / "config.yaml").write_text(dump_config(config(Source("a.csv"), Source("b.csv", 2.0))))
    folder.check(config(Source("a.csv"), Source("b.csv", 2.0)))
    with pytest.raises(UserError, match=r"\(dataset\.sources\[1\]\.weight: 2\.0 -> 3\.0\)"):
        folder.check(config(Source("a.csv"), Source("b.csv", 3.0)))
    with pytest.raises(UserError, match=r"dataset\.sources: \[.*\] -> None"):
        folder.check(config())


@pytest.mark.parametrize("share", [0, 0.5], ids=["empty", "halved"])
def test_a_damaged_configuration_is_named_and_damaged_facts_are_replaced(tmp_path, share):
    folder = opened(tmp_path, "a.mp4")
    for name in ("config.yaml", "run.json"):
        path = folder.path / name
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=f"{folder.path}/config.yaml: is damaged; remove it"):
        folder.check(Config(name="run", experiment=str(tmp_path)))
    assert opened(tmp_path, "a.mp4").run_id()
    folder.check(Config(name="run", experiment=str(tmp_path)))


def test_a_configuration_cut_after_any_line_is_damaged(tmp_path):
    folder, config = opened(tmp_path, "a.mp4"), Config(name="run", experiment=str(tmp_path))
    path = folder.path / "config.yaml"
    lines = path.read_text().splitlines(keepends=True)
    last = max(number for number, line in enumerate(lines) if not line.startswith((" ", "-")))
    for length in range(last + 1):
        path.write_text("".join(lines[:length]))
        with pytest.raises(UserError, match="config.yaml: is damaged; remove it"):
            folder.check(config)
    path.write_text("".join(lines))
    folder.check(config)


def test_a_key_that_is_newer_than_a_run_has_its_default_there(tmp_path):
    folder, config = opened(tmp_path, "a.mp4"), Config(name="run", experiment=str(tmp_path))
    path = folder.path / "config.yaml"
    newer = [line for line in path.read_text().splitlines() if "short_clips" not in line and "  fps:" not in line]
    path.write_text("\n".join(newer))
    folder.check(config)
    for key, value, change in (("short_clips", "skip", "pad -> skip"), ("fps", 12.5, "None -> 12.5")):
        other = replace(config, dataset=replace(config.dataset, **{key: value}))
        with pytest.raises(UserError, match=rf"another configuration \(dataset.{key}: {change}\)"):
            folder.check(other)


def test_an_experiment_that_cannot_be_a_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"{tmp_path}/file/experiment.*: cannot be written: Not a directory"):
        opened(tmp_path / "file/experiment", "a.mp4")


def test_names_that_are_not_utf8_have_a_digest_and_others_keep_theirs():
    def digest(*paths: str) -> str:
        splits = {"train": Annotations(list(paths), [0] * len(paths))}
        return training_clips(Dataset(splits, lambda *_: None, seed=0))["order"]

    assert digest("é.mp4", "b.mp4") == "3ddaadbea1760637a8b99f1e9cc1c752653285a0dad6c03b8e24744f86d8bd0d"
    assert digest("caf\udce9.mp4") != digest("café.mp4")
