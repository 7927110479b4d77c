"""Which store and experiment: MLflow's own variables are honoured, and what cannot be used is said in one line."""

import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.project import REPO
from helpers.stores import CONFIG, client_of, close_in_time, open_run, warnings

from diffusion import params_file, paths
from diffusion.tracking import ui
from diffusion.tracking.mlflow_store import tracking_uri

pytest.importorskip("mlflow")


def test_the_experiment_of_mlflows_own_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert params_file.load(REPO / "params.yaml").tracking.experiment == "cifar10-diffusion"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    assert params_file.load(REPO / "params.yaml").tracking.experiment == "mine"
    told = params_file.load(REPO / "params.yaml", {"tracking.experiment": "told"})
    assert told.tracking.experiment == "told"


@pytest.mark.parametrize("uri", ["./mlruns", "mlruns", "file:///tmp/mlruns", "127.0.0.1:5000", "localhost:5000"])
def test_what_is_no_address(
    database: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], uri: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    close_in_time(open_run(Path("run")))
    (line,) = warnings(capsys)
    assert f"MLFLOW_TRACKING_URI = {uri} is no store: give http://HOST:PORT of a server or sqlite:///FILE" in line
    assert "only run/journal.jsonl records this" in line


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("", ""),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("sqlite:////absolute/mlflow.db", "sqlite:////absolute/mlflow.db"),
        ("sqlite:///mlflow.db", "sqlite:///ROOT/mlflow.db"),
        ("postgresql+psycopg2://u:p@db/mlflow", "postgresql+psycopg2://u:p@db/mlflow"),
        ("databricks", "databricks"),
    ],
)
def test_addresses(monkeypatch: pytest.MonkeyPatch, uri: str, expected: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert tracking_uri() == expected.replace("ROOT", str(paths.ROOT))


def test_no_password_is_said(
    database: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither MLflow's words nor ours have it, and no process's arguments."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://alice:S3cretPw@127.0.0.1:9")
    close_in_time(open_run(Path("run")))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://alice:S3cret/Pw@127.0.0.1:9")
    close_in_time(open_run(Path("run")))
    said = capsys.readouterr()
    assert "S3cret" not in said.out + said.err + Path("run/journal.jsonl").read_text()
    assert "write @ as %40" in said.err


def test_a_deleted_experiment(database: Path, capsys: pytest.CaptureFixture[str]) -> None:
    client = client_of(database)
    number = client.create_experiment(CONFIG.experiment)
    client.delete_experiment(number)
    tracker = open_run(Path("run"))
    close_in_time(tracker)
    assert tracker.run_id is None
    (line,) = warnings(capsys)
    assert f"`mlflow experiments restore --experiment-id {number}` brings it back" in line
    client.restore_experiment(number)
    again = open_run(Path("run"))
    close_in_time(again)
    assert again.run_id


def test_the_pages_command_hides_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda _, arguments: started.append(arguments))
    for name in ("MLFLOW_BACKEND_STORE_URI", "MLFLOW_DEFAULT_ARTIFACT_ROOT", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION"):
        monkeypatch.setenv(name, "")
    store = "postgresql+psycopg2://u:S3cretPw@db/mlflow"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    said = CliRunner().invoke(ui.main, [], catch_exceptions=False).output
    assert "Runs of postgresql+psycopg2://***@db/mlflow" in said
    assert os.environ["MLFLOW_BACKEND_STORE_URI"] == store
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://alice:S3cretPw@mlflow.example.org/")
    said += CliRunner().invoke(ui.main, [], catch_exceptions=False).output
    assert "open https://***@mlflow.example.org" in said
    (arguments,) = started
    assert "S3cretPw" not in said + " ".join(arguments)
