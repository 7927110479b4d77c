"""Passwords in the addresses of MLflow's and Optuna's stores are nowhere: not on the terminal, not in what is kept."""

import importlib
import subprocess
import traceback
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers.commands import run_all, write_params

from diffusion import paths
from diffusion.model.card import card_path

SECRETS = ("S3cretPw", "t0psecret")
COMMANDS = [  # module, arguments
    ("stages.train", []),
    ("stages.sample", []),
    ("stages.evaluate", []),
    ("stages.tune", []),
    ("diffusion.__main__", ["sync"]),
    ("diffusion.__main__", ["promote"]),
    ("diffusion.__main__", ["promote", "1"]),
    ("diffusion.__main__", ["serve"]),
    ("diffusion.__main__", ["ui"]),
    ("diffusion.__main__", ["runs"]),
    ("diffusion.__main__", ["lineage"]),
    ("diffusion.__main__", ["lineage", "0" * 32]),
    ("diffusion.__main__", ["tune-apply"]),
]


@pytest.fixture
def away(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A workspace whose stores are named with passwords, and are not there."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://alice:{SECRETS[0]}@127.0.0.1:9")
    monkeypatch.setenv("OPTUNA_STORAGE", f"postgresql://u:{SECRETS[0]}@127.0.0.1:9/db")
    storage = f"postgresql://u:{SECRETS[1]}@127.0.0.1:9/db?password={SECRETS[1]}"
    write_params(**{"tracking.enabled": True, "train.steps": 4, "tune.storage": storage})
    run_all("prepare", "weights", "reference")


def test_no_password_is_said_or_kept(away: None, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []  # arguments of processes, which all users of a machine can read
    monkeypatch.setattr("os.execv", lambda _, arguments: started.extend(arguments))
    start = subprocess.Popen.__init__

    def noted(self: Any, arguments: Any, **options: Any) -> None:
        started.extend(map(str, arguments))
        start(self, arguments, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", noted)
    said = ""
    for module, arguments in COMMANDS:
        result = CliRunner().invoke(importlib.import_module(module).main, arguments)
        error = result.exception
        shown = "" if error is None or isinstance(error, SystemExit) else "".join(traceback.format_exception(error))
        found = result.output + shown
        assert not [secret for secret in SECRETS if secret in found], f"{module} {arguments}: {found}"
        said += found
    assert not [secret for secret in SECRETS if secret in " ".join(started)], started
    assert "***@127.0.0.1" in said  # so that it was asked for what it hides
    assert card_path(paths.MODEL).exists()
    kept = [path for path in Path().rglob("*") if path.is_file() and path.name != "params.yaml"]
    assert any(path.name == "journal.jsonl" for path in kept)
    for path in [*kept, *paths.RUNS.rglob("params.yaml")]:
        assert not [secret for secret in SECRETS if secret.encode() in path.read_bytes()], path
