"""The `flperf` command line: help texts, unknown commands, and mistakes in one line."""

import contextlib
import re

import pytest

from flperf import cli
from flperf.commands.common import make_parent_folder, run_command
from flperf.errors import UserError


def printed(capsys, monkeypatch, *arguments: str) -> str:
    monkeypatch.setattr("sys.argv", ["flperf", *arguments])
    with contextlib.suppress(SystemExit):  # argparse exits after --help
        cli.main()
    captured = capsys.readouterr()
    assert not captured.err
    return captured.out


def test_help_lists_every_command(capsys, monkeypatch):
    text = printed(capsys, monkeypatch, "--help")
    assert text == printed(capsys, monkeypatch)
    assert all(re.search(rf"^  {command} +\w", text, flags=re.M) for command in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_help_of_a_command_ends_with_examples_of_its_own_options(command, capsys, monkeypatch):
    options, _, examples = printed(capsys, monkeypatch, command, "--help").partition("\nexample")
    assert f"flperf {command}" in examples or f"flperf/{command}.py" in examples
    used = set(re.findall(r"--[a-z-]+", examples))
    assert used <= set(re.findall(r"--[a-z-]+", options)), "an example uses an unknown option"
    assert max(map(len, options.splitlines())) <= 140


def test_a_mistake_is_one_line_and_a_traceback_with_debug():
    def fail(arguments: list[str]) -> None:
        raise UserError("dataset.train: there is no file nowhere.csv")

    with pytest.raises(SystemExit) as ended:
        run_command(fail, [])
    assert ended.value.code == "flperf: dataset.train: there is no file nowhere.csv"
    with pytest.raises(UserError):
        run_command(fail, ["--debug"])


def test_ctrl_c_ends_a_command_in_one_line(capsys):
    def interrupted(arguments: list[str]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_command(interrupted, [])
    assert ended.value.code == 130 and capsys.readouterr().err == "flperf: interrupted\n"


@pytest.mark.parametrize(
    ("typed", "hint"), [("evalute", "did you mean evaluate?"), ("bogus", "known: doctor, estimate")]
)
def test_an_unknown_command_is_named_in_one_line(typed, hint, monkeypatch):
    monkeypatch.setattr("sys.argv", ["flperf", typed])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code.startswith(f"flperf: unknown command {typed!r}: {hint}") and "\n" not in ended.value.code


def test_the_devices_of_an_estimate_are_listed(capsys, monkeypatch):
    from flperf.engine.devices import DEVICES

    assert set(DEVICES) <= set(re.findall(r"\w+", printed(capsys, monkeypatch, "estimate", "--help")))


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    make_parent_folder(tmp_path / "new/result.jsonl")
    assert (tmp_path / "new").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="its folder can't be made"):
        make_parent_folder(tmp_path / "file/result.jsonl")
    with pytest.raises(UserError, match="is a folder"):
        make_parent_folder(tmp_path / "new")
