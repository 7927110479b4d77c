"""What Optuna and tracking cost a trial of the default search, as a share of its time.

Three real trials by the worker's own code, in a folder of its own with SQLite and MLflow's embedded store; the first
one warms up. They have one step in SHARE of a default trial, and all of its log lines, validations and reports, so
that what is beside the steps is as much as in a whole trial; the time of the steps is scaled. Counted are the calls of
store and tracker, all processor time of the threads that write in the background, and the looks at the study that
`make tune` takes meanwhile, as if one trial alone had to bear them. Needs the data and the reference: run
`dvc repro prepare reference` once.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import optuna
from machine import report
from overheads import Clock

from diffusion import params_file

REPO = Path(__file__).parents[1]
SHARE = 10
TRIALS = 3
LOOKS = 50
COUNTED = ("stale", "ask", "suggest", "report", "tell", "tracking: open", "tracking: events", "tracking: close")


@click.command()
@click.option("--inside", is_flag=True, hidden=True)
def main(inside: bool) -> None:
    """Measure, print one JSON line, write results/tune_overhead.json."""
    if inside:
        report("tune_overhead", measure())
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in ("data/images", "data/prepared", "reference"):
            shutil.copytree(REPO / name, Path(folder, name))
        shutil.copy(REPO / "params.yaml", folder)
        environment = {**os.environ, "DVC_ROOT": folder, "MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1"}
        for variable in ("MLFLOW_TRACKING_URI", "OPTUNA_STORAGE"):
            environment.pop(variable, None)
        subprocess.run([sys.executable, str(Path(__file__)), "--inside"], cwd=folder, env=environment, check=True)


def measure() -> dict[str, Any]:
    """Run the trials in the working folder with a clock on each part."""
    from diffusion.tracking import mlflow_copy, runs, tracker
    from diffusion.training import loop
    from diffusion.tuning import report, search, storage, study, trial, worker

    full = params_file.load("params.yaml")
    images, log_every = full.tune.images_per_trial // SHARE, max(1, full.train.log_every // SHARE)
    overrides = {"tune.images_per_trial": images, "train.log_every": log_every, "tune.trials": TRIALS}
    params = params_file.load("params.yaml", overrides)
    clock = Clock()
    clock.watch(optuna.storages, "fail_stale_trials", "stale")
    clock.watch(optuna.Study, "ask")
    clock.watch(storage.Storage, "set_trial_state_values", "tell")
    clock.watch(worker.Worker, "_attempt", "suggest")
    clock.watch(trial.Attempt, "report")
    clock.watch(runs, "open_run", "tracking: open")
    clock.watch(tracker.Tracker, "_emit", "tracking: events")
    clock.watch(mlflow_copy.CopiedJournal, "finish", "tracking: close")
    clock.watch(loop.Trainer, "step")
    clock.watch(trial, "common_error")
    marks = [mark(clock)]
    job = worker.Job("0" * 16, params, storage.storage_url(params.tune), run_id=None, prepare=trial.Trainings)
    worker.Worker(job, 0, lambda: False).work(after=lambda: marks.append(mark(clock)))
    ledger = report.Ledger(study.open_study(job.study, params, job.url), params, tracker.Tracker())
    start = time.perf_counter()
    for _ in range(LOOKS):
        search.look(ledger)
    look = (time.perf_counter() - start) / LOOKS
    return shares(marks[1], marks[-1], TRIALS - 1, look / search.LEDGER_SECONDS)


def mark(clock: Clock) -> dict[str, float]:
    """Seconds of each part so far, of all, and of the processor outside this thread."""
    background = time.process_time() - time.thread_time()  # there is one thread for arithmetic: this one
    return {**clock.seconds, "all": time.perf_counter(), "background": background}


def shares(first: dict[str, float], last: dict[str, float], trials: int, looks: float) -> dict[str, Any]:
    """Seconds of a default trial's parts, from what `trials` shortened ones took between two marks.

    `looks`: seconds that looks at the study take in one second.
    """
    each = {name: (value - first.get(name, 0.0)) / trials for name, value in last.items()}
    whole = each["all"] + (SHARE - 1) * each["step"]
    beside = {name: each[name] for name in (*COUNTED, "background") if name in each} | {"looks": looks * whole}
    return {
        "seconds_of_a_default_trial": round(whole, 1),
        "seconds": {name: round(value, 3) for name, value in beside.items()},
        "share_of_optuna_and_tracking": round(sum(beside.values()) / whole, 4),
        "share_of_the_common_error": round(each["common_error"] / whole, 4),
    }


if __name__ == "__main__":
    main()
