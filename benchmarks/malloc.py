"""A training step of params.yaml with and without runtime.keep_freed_memory, in processes that take turns.

Needs the data: run `dvc repro prepare` once.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import report

from diffusion.config import trained
from diffusion.data.dataset import Dataset
from diffusion.params_file import load
from diffusion.runtime import keep_freed_memory, resolve_device
from diffusion.training.loop import Trainer

ROUNDS = 3
STEPS = 25


def median_step(keep: bool) -> float:
    """Median seconds of a training step in this process."""
    if keep:
        keep_freed_memory()
    params = load("params.yaml")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(trained(params), Dataset.load(), Path(folder), resolve_device("cpu"))
        times = []
        for _ in range(STEPS + 5):
            start = time.perf_counter()
            trainer.step()
            times.append(time.perf_counter() - start)
    return statistics.median(times[5:])


def main() -> None:
    """Alternate both kinds, a process each."""
    found: dict[str, list[float]] = {"keep": [], "default": []}
    for _ in range(ROUNDS):
        for kind, times in found.items():
            run = subprocess.run([sys.executable, __file__, kind], check=True, capture_output=True, text=True)
            times.append(float(run.stdout))
    keep, default = (statistics.median(found[kind]) for kind in ("keep", "default"))
    result = {"seconds_a_step": {"keep": keep, "default": default}, "all": found}
    report("malloc", {**result, "time_saved": round(1 - keep / default, 3)})


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(median_step(sys.argv[1] == "keep"))
    else:
        main()
