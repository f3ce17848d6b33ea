"""Where W&B's data goes: what the user has told wandb itself is obeyed, and a server out of reach ends no training."""

import socket

import pytest
import wandb
from wandb.sdk.lib import wbauth

from flperf.config import Config, Tracking
from flperf.training.dashboards import WandB, wandb_mode_and_project

KEY = "x" * 40


@pytest.fixture(autouse=True)
def nobody_logged_in(monkeypatch, tmp_path):
    """A home without any of wandb's files, and wandb as if it had just been imported."""
    for variable in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    wandb.teardown()
    wbauth.unauthenticate_session(update_settings=False)
    yield
    wandb.teardown()
    wbauth.unauthenticate_session(update_settings=False)


def log_in(tmp_path, server: str) -> None:
    """What `wandb login` leaves."""
    (tmp_path / "netrc").write_text(f"machine {server.split('//')[1]} login user password {KEY}\n")
    (tmp_path / "netrc").chmod(0o600)


def mode() -> str:
    return wandb_mode_and_project(Tracking())[0]


def test_without_a_login_a_run_logs_offline():
    assert mode() == "offline"


@pytest.mark.parametrize("server", [None, "http://wandb.my-company.com:8080"])
def test_a_login_is_found_for_the_server_in_use(server, monkeypatch, tmp_path):
    if server:
        monkeypatch.setenv("WANDB_BASE_URL", server)
    log_in(tmp_path, server or wandb.Settings().base_url)
    assert mode() == "online"


def test_a_login_to_another_server_is_none(monkeypatch, tmp_path):
    log_in(tmp_path, "http://wandb.my-company.com:8080")
    assert mode() == "offline"


@pytest.mark.parametrize("told", ["offline", "disabled"])
def test_what_wandb_is_told_wins_over_auto(told, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert mode() == "online"
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", told)
    assert mode() == told


def test_the_project_that_wandb_is_told_wins_over_the_default_one(monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "told")
    assert [wandb_mode_and_project(Tracking(project=project))[1] for project in (Tracking.project, "chosen")] == [
        "told",
        "chosen",
    ]


def test_a_disabled_run_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    dashboard = WandB(Config(name="run"), tmp_path, "identity")
    dashboard.numbers({"train/loss": 1.0}, 1)
    assert dashboard.close() is None and not list(tmp_path.iterdir())


def test_a_server_out_of_reach_is_said_in_a_line_and_the_run_goes_on_offline(monkeypatch, tmp_path, capsys):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")  # nothing listens there
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
        dashboard = WandB(Config(name="run"), tmp_path, "identity")
    said = capsys.readouterr().out
    assert said.startswith("W&B can't be reached") and said.count("\n") == 1
    dashboard.numbers({"train/loss": 1.0}, 1)
    assert dashboard.close() == f"wandb sync --id identity {tmp_path}/wandb/offline-run-*"
    assert list(tmp_path.glob("wandb/offline-run-*-identity/*.wandb"))
