"""The search in several processes, killed, stopped, on several machines; trials are simulated, all else is real."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fast_trials
import optuna
import psutil
import pytest
from conftest import REPO
from postgres import needs_postgres
from postgres import server as postgres_server

pytestmark = pytest.mark.slow
SECONDS = 240.0  # a test that waits longer has failed


class Sitting:
    """A search in a process group of its own, as a terminal would start it."""

    def __init__(self, folder: Path, storage: str = "", **overrides: Any) -> None:
        folder.mkdir(exist_ok=True)
        environment = {**os.environ, "PYTHONPATH": f"{REPO}/src:{REPO}/tests", "DVC_ROOT": str(folder)}
        environment |= {"OPTUNA_STORAGE": storage, "OMP_NUM_THREADS": "1"}
        self.log = folder / "log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, f"{REPO}/tests/fast_trials.py", json.dumps(overrides)],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    def workers(self) -> list[psutil.Process]:
        """Its worker processes."""
        return [p for p in psutil.Process(self.process.pid).children() if "spawn_main" in " ".join(p.cmdline())]

    def wait(self) -> int:
        """Exit status."""
        return self.process.wait(SECONDS)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "tuning/trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def trials(url: str) -> list[optuna.trial.FrozenTrial]:
    """What the store holds; none while nobody has made the study."""
    try:
        return optuna.load_study(study_name=fast_trials.STUDY, storage=url).trials
    except Exception:  # no file, no table, no study
        return []


def until(true: Callable[[], Any]) -> Any:
    """Wait for it; what it returned."""
    end = time.monotonic() + SECONDS
    while not (found := true()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


def at_work(url: str, count: int) -> Callable[[], list[optuna.trial.FrozenTrial]]:
    """The trials that `count` workers are in the middle of."""

    def found() -> list[optuna.trial.FrozenTrial]:
        running = [t for t in trials(url) if t.state.name == "RUNNING" and t.intermediate_values]
        return running if len(running) == count else []

    return found


def test_a_killed_workers_trial_goes_on_in_another_and_ctrl_c_ends_all_of_them(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/optuna/study.db"
    first = Sitting(tmp_path, **{"tune.trials": 5, "tune.workers": 2})
    victim = until(at_work(url, 2))[0]
    os.kill(int(victim.user_attrs["pid"]), signal.SIGKILL)
    until(
        lambda: any(t.system_attrs.get("failed_trial") == victim.number and t.intermediate_values for t in trials(url))
    )
    workers = first.workers()
    os.killpg(first.process.pid, signal.SIGINT)  # as a terminal does
    assert first.wait() == 130
    assert not any(worker.is_running() for worker in workers)
    said = first.log.read_text()
    assert "was killed (signal 9); another takes its place" in said
    assert "of 5 trials; `make tune` goes on from there" in said
    assert "Traceback" not in said
    assert "\r" not in said
    assert not [row for row in rows(tmp_path) if row["state"] in ("RUNNING", "WAITING")]

    assert Sitting(tmp_path, **{"tune.trials": 5, "tune.workers": 2}).wait() == 0
    table = rows(tmp_path)
    begun = {row["retry_of"] or row["number"] for row in table}
    assert [row["state"] for row in table].count("COMPLETE") == len(begun) == 5
    assert {row["reason"] for row in table} == {"", "stopped", "its worker was killed"}
    again = [row for row in table if row["retry_of"] == str(victim.number)]
    assert {row["train.lr"] for row in again} == {table[victim.number]["train.lr"]}
    for record in (tmp_path / "runs").glob("*/steps.txt"):  # each step was done once, over all tries
        steps = [int(line.split()[1]) for line in record.read_text().splitlines()]
        assert steps == list(range(fast_trials.STEPS))


def test_workers_do_not_outlive_their_parent(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/optuna/study.db"
    sitting = Sitting(tmp_path, **{"tune.trials": 40, "tune.workers": 2})
    until(at_work(url, 2))
    workers = sitting.workers()
    sitting.process.kill()
    _, alive = psutil.wait_procs(workers, SECONDS)
    assert not alive
    left = [t for t in trials(url) if t.state.name != "COMPLETE"]
    assert left, "they went on"
    assert {(t.state.name, t.user_attrs["stopped"]) for t in left} == {("FAIL", True)}, "trials were not handed back"


@pytest.mark.postgres
@needs_postgres
def test_two_machines_with_three_workers_each_share_one_study(tmp_path: Path) -> None:
    """In Postgres; a worker is killed on the way, and its own machine takes over."""
    with postgres_server(tmp_path / "postgres") as url:
        view = url.replace("postgresql:", "postgresql+psycopg2:")
        overrides = {"tune.trials": 9, "tune.workers": 3}
        machines = [Sitting(tmp_path / name, url, **overrides) for name in ("one", "two")]
        running = until(lambda: [t for t in trials(view) if t.state.name == "RUNNING" and t.intermediate_values])
        os.kill(int(running[0].user_attrs["pid"]), signal.SIGKILL)
        assert [machine.wait() for machine in machines] == [0, 0], [m.log.read_text() for m in machines]
        found = trials(view)
    states = [trial.state.name for trial in found]
    assert (states.count("COMPLETE"), states.count("FAIL"), len(states)) == (9, 1, 10)
    assert len({trial.params["train.lr"] for trial in found}) == 9
    processes = {trial.user_attrs["pid"] for trial in found}
    assert len(processes) >= 4, "one machine did it all"
    tables = [rows(tmp_path / name) for name in ("one", "two")]
    assert [len(table) for table in tables] == [10, 10]
