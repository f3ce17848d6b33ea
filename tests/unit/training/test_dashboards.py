"""Which dashboards a run opens: the user's own settings of wandb apply, and training goes on without a server."""

import importlib.util
import socket

import pytest
import wandb
from wandb.sdk.lib import wbauth

from flperf.config import Config, Tracking
from flperf.errors import UserError
from flperf.train import train
from flperf.training.dashboards import WandB, wandb_mode_and_project

KEY = "x" * 40


@pytest.fixture(autouse=True)
def no_login(monkeypatch, tmp_path):
    """No files of wandb in the home folder, and wandb as if it had just been imported."""
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
    """Write the file that `wandb login` writes."""
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


def test_a_login_to_another_server_does_not_count(monkeypatch, tmp_path):
    log_in(tmp_path, "http://wandb.my-company.com:8080")
    assert mode() == "offline"


@pytest.mark.parametrize("setting", ["offline", "disabled"])
def test_the_mode_that_wandb_is_set_to_replaces_auto(setting, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert mode() == "online"
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", setting)
    assert mode() == setting


def test_the_project_that_wandb_is_set_to_replaces_the_default_one(monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "set")
    projects = [wandb_mode_and_project(Tracking(project=project))[1] for project in (Tracking.project, "configured")]
    assert projects == ["set", "configured"]


def test_a_disabled_dashboard_writes_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    dashboard = WandB(Config(name="run"), tmp_path, "identity")
    dashboard.numbers({"train/loss": 1.0}, 1)
    assert dashboard.close() is None and not list(tmp_path.iterdir())


def test_an_unreachable_server_is_reported_in_a_line_and_the_run_goes_on_offline(monkeypatch, tmp_path, capsys):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        monkeypatch.setenv(
            "WANDB_BASE_URL", f"http://127.0.0.1:{listener.getsockname()[1]}"
        )  # bound, but not listening
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
        dashboard = WandB(Config(name="run"), tmp_path, "identity")
    output = capsys.readouterr().out
    assert output.startswith("W&B can't be reached") and output.count("\n") == 1
    dashboard.numbers({"train/loss": 1.0}, 1)
    assert dashboard.close() == f"wandb sync --id identity {tmp_path}/wandb/offline-run-*"
    assert list(tmp_path.glob("wandb/offline-run-*-identity/*.wandb"))


def test_a_missing_tensorboard_is_reported_before_the_run_starts(tiny, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        train(["--config", str(tiny), "name=board", "tracking.tensorboard=true"])
    assert not (tiny.parent / "experiment/board").exists()
