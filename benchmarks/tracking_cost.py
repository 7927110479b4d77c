"""What tracking costs a default training, with the embedded store and with a server, and how fast points reach SQLite.

A short real training by the train stage's own functions (params.yaml with fewer steps, as in overheads.py), once with
each store. Counted are the seconds that the training waits (opening the run, metrics and curves, previews, closing)
and the processor's seconds of the thread that writes to MLflow, as if a step could use none of them meanwhile. They
are scaled to how often a default run does each. Needs the data: run `dvc repro prepare` once.
"""

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import click
import requests
from machine import report
from overheads import PERIODS, SHARE, Clock

from diffusion import params_file

REPO = Path(__file__).parents[1]
POINTS, KEYS = 10_000, 5
START_SECONDS = 120
STEPS = ("step", "validation", "checkpoints")  # the training itself
ONCE = ("start", "close")


@click.command()
@click.option(
    "--steps", default=0, help="Steps of each training; 0 = one in so many of the default's, see overheads.py"
)
@click.option("--inside", is_flag=True, hidden=True)
def main(steps: int, inside: bool) -> None:
    """Measure, print one JSON line, write results/tracking_cost.json."""
    if inside:
        print(json.dumps({"points": seconds_of_points(), **measure(steps)}))
        return
    with tempfile.TemporaryDirectory() as folder:
        embedded = run_inside(Path(folder, "embedded"), steps)
        with server(Path(folder, "server")) as uri:
            http = run_inside(Path(folder, "http"), steps, MLFLOW_TRACKING_URI=uri)
    seconds = {"embedded": embedded.pop("points"), "http": http.pop("points")}
    report("tracking_cost", {"embedded": embedded, "http": http, f"seconds_of_{POINTS}_points": seconds})


def run_inside(folder: Path, steps: int, **environment: str) -> dict[str, Any]:
    """Measure in a process and a folder of its own, whose repository is that folder."""
    for name in ("images", "prepared"):
        shutil.copytree(REPO / "data" / name, folder / "data" / name)
    shutil.copy(REPO / "params.yaml", folder)
    variables = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    variables |= {"DVC_ROOT": str(folder), "MLFLOW_DISABLE_TELEMETRY": "true", **environment}
    command = [sys.executable, str(Path(__file__)), "--inside", "--steps", str(steps)]
    done = subprocess.run(command, cwd=folder, env=variables, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """A real `mlflow server` on this machine, which keeps the files too."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", folder.as_uri()]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), *store]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--workers", "1"], env=environment, stdout=log, stderr=log)
        try:
            wait_for(f"http://127.0.0.1:{port}")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def wait_for(address: str) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        try:
            requests.get(f"{address}/health", timeout=5).raise_for_status()
        except requests.RequestException:
            time.sleep(0.2)
        else:
            return
    raise TimeoutError(f"{address} does not answer")


def measure(steps: int) -> dict[str, Any]:
    """Run the shortened training in the working folder with a clock on each part."""
    from diffusion.pipeline import train
    from diffusion.tracking import mlflow_copy
    from diffusion.training import loop

    full = params_file.load("params.yaml").train
    steps = steps or full.steps // SHARE
    every = {f"train.{key}": max(1, getattr(full, key) * steps // full.steps) for key in PERIODS.values()}
    params = params_file.load("params.yaml", {"train.steps": steps, **every})
    clock = Clock()
    clock.watch(loop.Trainer, "step")
    clock.watch(loop.Trainer, "validate", "validation")
    clock.watch(loop.Trainer, "save", "checkpoints")
    clock.watch(train, "write_previews", "previews")
    clock.watch(train, "_open_run", "start")
    clock.watch(train, "_show", "metrics and curves")
    clock.watch(mlflow_copy.CopiedJournal, "finish", "close")
    background = watch_thread(mlflow_copy.CopiedJournal)
    train.train_model(params)
    return shares(clock, background[0], steps, full)


def watch_thread(tracker: Any) -> list[float]:
    """Processor's seconds of the trackers' threads so far, in a list of one."""
    inner, seconds = tracker._work, [0.0]

    def work(self: Any) -> None:
        start = time.thread_time()
        inner(self)
        seconds[0] += time.thread_time() - start

    tracker._work = work
    return seconds


def shares(clock: Clock, background: float, steps: int, full: Any) -> dict[str, Any]:
    """Seconds of each part in a full run, and what share of it tracking is."""
    each = {name: clock.seconds[name] / clock.calls[name] for name in clock.seconds}
    times = {name: full.steps / getattr(full, PERIODS[name]) if name in PERIODS else full.steps for name in each}
    times |= dict.fromkeys(ONCE, 1)
    seconds = {name: each[name] * times[name] for name in each}
    seconds["thread"] = background * full.steps / steps
    tracked = {name: value for name, value in seconds.items() if name not in STEPS}
    whole = sum(seconds.values())
    return {
        "steps_run": steps,
        "steps_of_a_default_run": full.steps,
        "seconds_of_a_default_run": round(whole, 1),
        "seconds": {name: round(value, 2) for name, value in tracked.items()},
        "share": round(sum(tracked.values()) / whole, 4),
    }


def seconds_of_points() -> float:
    """From the first of POINTS points until the store has all of them, which is proved."""
    from diffusion import paths
    from diffusion.config import TrackingConfig
    from diffusion.tracking import runs

    folder = paths.RUNS / "points"
    tracker = runs.open_run(TrackingConfig(enabled=True, experiment="points"), name="points", run_folder=folder)
    start = time.perf_counter()
    for step in range(POINTS // KEYS):
        tracker.metrics({f"key {i}": step + i / KEYS for i in range(KEYS)}, step)
    tracker.close("FINISHED")
    seconds = time.perf_counter() - start
    database = paths.MLFLOW_DB
    if not database.exists():  # the server's, beside this folder
        database = Path("../server/mlflow.db")
    with closing(sqlite3.connect(database)) as connection:
        query = "SELECT COUNT(*) FROM metrics WHERE run_uuid = ?"
        (stored,) = connection.execute(query, [tracker.run_id]).fetchone()
    if stored != POINTS:
        raise RuntimeError(f"{stored} of {POINTS} points are in {database}")
    return round(seconds, 2)


if __name__ == "__main__":
    main()
