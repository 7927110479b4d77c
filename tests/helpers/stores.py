"""MLflow stores for tests: what lies in them read without MLflow, and a real `mlflow server` that can be killed."""

import json
import math
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.preloaded import Command

from diffusion.config import TrackingConfig
from diffusion.serving.registry import register
from diffusion.tracking import mlflow_copy, mlflow_store, runs
from diffusion.tracking.tracker import Status, Tracker

CONFIG = TrackingConfig(enabled=True, experiment="test experiment")
SECONDS = 120.0  # a join that takes longer has hung


def client_of(database: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{database}")


def stored_points(database: Path, run_id: str) -> list[tuple[str, int, int, float]]:
    """(key, step, time, value) of every point, read without MLflow."""
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute(
            "SELECT key, step, timestamp, value, is_nan FROM metrics WHERE run_uuid = ?", [run_id]
        )
        return sorted((k, s, t, math.nan if is_nan else v) for k, s, t, v, is_nan in rows)


def journal_points(journal: Path) -> list[tuple[str, int, int, float]]:
    """The same, from the lines as they lie on the disk."""
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    return sorted(
        (key, line["data"]["step"], line["time"], value)
        for line in lines
        if line["kind"] == "metrics"
        for key, value in line["data"]["values"].items()
    )


def open_run(folder: Path, **kwargs: Any) -> Tracker:
    return runs.open_run(CONFIG, name="lr1-test", run_folder=folder, register=register, **kwargs)


def sync(journal: Path, client: Any = None) -> str:
    """As `make sync` does with each journal."""
    return mlflow_copy.sync(journal, client or mlflow_store.connect(), register)


def warnings(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("tracking:")]


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def close_in_time(tracker: Tracker, status: Status = "FINISHED") -> None:
    thread = threading.Thread(target=tracker.close, args=(status,), daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert not thread.is_alive(), "close() hangs"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextmanager
def server(
    store: Path | str, artifacts: Path, port: int = 0, *, command: bool = False
) -> Iterator[tuple[str, Callable[..., None]]]:
    """A real MLflow server on a SQLite file or a database's URI, in a process group of its own.

    It is what `mlflow server` starts; with `command` that command itself, which takes seconds. Yields its address, and
    a function that sends the group a signal: SIGKILL, unless it is given another.
    """
    port = port or free_port()
    backend = f"sqlite:///{store}" if isinstance(store, Path) else store
    process = (_command if command else _uvicorn)(backend, artifacts, str(port))

    def kill(number: int = signal.SIGKILL) -> None:
        if process.poll() is None:
            os.killpg(process.pid, number)
            if number == signal.SIGKILL:
                process.wait()

    def healthy() -> bool:
        assert process.poll() is None, process
        try:
            return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read() == b"OK")
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    try:
        wait_for(healthy)
        yield f"http://127.0.0.1:{port}", kill
    finally:
        kill()


def _command(backend: str, artifacts: Path, port: str) -> "subprocess.Popen[bytes]":
    options = {"backend-store-uri": backend, "artifacts-destination": artifacts.as_uri(), "port": port, "workers": "1"}
    command = [sys.executable, "-m", "mlflow", "server", *(f"--{key}={value}" for key, value in options.items())]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (artifacts.parent / "server.log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def _uvicorn(backend: str, artifacts: Path, port: str) -> Command:
    """The process that `mlflow server` leaves the work to, with what it tells that one by the environment."""
    settings = {
        "FILE_STORE": backend,
        "ARTIFACT_ROOT": "mlflow-artifacts:/",
        "ARTIFACT_DESTINATION": artifacts.as_uri(),
        "SERVE_ARTIFACTS": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for key, value in settings.items():
            patch.setenv(f"_MLFLOW_SERVER_{key}", value)
        return Command("uvicorn", "--port", port, "mlflow.server.fastapi_app:app")
