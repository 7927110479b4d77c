"""What a default training spends beside its steps: loading data, tracking, validation, previews, checkpoints.

A short real training by the train stage's own functions in a folder of its own (params.yaml with fewer steps, so that
each of these things happens a few times), with MLflow's embedded store. The time of each is measured inside it and
scaled to how often a default run does it. Needs the data: run `dvc repro prepare` once.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from machine import report

from diffusion import params_file

REPO = Path(__file__).parents[1]
SHARE = 20  # of the default's steps are run: one in so many


@click.command()
@click.option("--inside", is_flag=True, hidden=True)
def main(inside: bool) -> None:
    """Measure, print one JSON line, write results/overheads.json."""
    if inside:
        report("overheads", measure())
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in ("images", "prepared"):
            shutil.copytree(REPO / "data" / name, Path(folder, "data", name))
        shutil.copy(REPO / "params.yaml", folder)
        environment = {**os.environ, "DVC_ROOT": folder, "MLFLOW_DISABLE_TELEMETRY": "true"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        subprocess.run([sys.executable, str(Path(__file__)), "--inside"], cwd=folder, env=environment, check=True)


def measure() -> dict[str, Any]:
    """Run the shortened training in the working folder with a clock on each part."""
    from diffusion.data import dataset
    from diffusion.pipeline import train
    from diffusion.training import loop

    full = params_file.load("params.yaml").train
    steps = full.steps // SHARE
    every = {f"train.{key}": max(1, getattr(full, key) // SHARE) for key in PERIODS.values()}
    params = params_file.load("params.yaml", {"train.steps": steps, **every})
    clock = Clock()
    clock.watch(loop.Trainer, "step")
    clock.watch(dataset.Batches, "__call__", "data")
    clock.watch(loop.Trainer, "validate", "validation")
    clock.watch(loop.Trainer, "save", "checkpoints")
    clock.watch(train, "write_previews", "previews")
    clock.watch(train, "_open_run", "tracking: start")
    clock.watch(train, "_show", "tracking: bar, metrics, curves")
    train.train_model(params)
    return shares(clock, steps, full)


# Part -> the key that says how often it happens; the others happen each step, or once.
PERIODS = {"validation": "validate_every", "previews": "preview_every", "checkpoints": "checkpoint_every"}


class Clock:
    """Seconds and calls of functions, by name."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()

    def watch(self, owner: Any, attribute: str, name: str | None = None) -> None:
        """Replace owner.attribute by the same with a clock on it."""
        inner: Callable[..., Any] = getattr(owner, attribute)
        name = name or attribute

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - start
                self.calls[name] += 1

        setattr(owner, attribute, timed)


def shares(clock: Clock, steps: int, full: Any) -> dict[str, Any]:
    """Seconds of each part in a full run, and what share of it the parts beside the steps are."""
    each = {name: clock.seconds[name] / clock.calls[name] for name in clock.seconds}
    times = {name: full.steps / getattr(full, PERIODS[name]) if name in PERIODS else full.steps for name in each}
    times["tracking: start"] = 1
    seconds = {name: each[name] * times[name] for name in each}
    whole = sum(value for name, value in seconds.items() if name != "data")  # loading is part of a step
    beside = {name: value for name, value in seconds.items() if name != "step"}
    return {
        "steps_run": steps,
        "steps_of_a_default_run": full.steps,
        "seconds_of_a_default_run": round(whole, 1),
        "seconds": {name: round(value, 2) for name, value in beside.items()},
        "shares": {name: round(value / whole, 4) for name, value in beside.items()},
        "share_of_all": round(sum(beside.values()) / whole, 4),
    }


if __name__ == "__main__":
    main()
