"""bf16 or fp32: training steps of params.yaml with each, in turns, and which of the two `precision: auto` takes here.

Needs the data: run `dvc repro prepare` once.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import torch
from machine import report
from turns import compete

from diffusion.config import trained
from diffusion.data.dataset import Dataset
from diffusion.params_file import load
from diffusion.runtime import keep_freed_memory, resolve_precision
from diffusion.training.loop import Trainer

CPU = torch.device("cpu")


def training(precision: str) -> Callable[[], object]:
    """A step of the default recipe."""
    keep_freed_memory()
    config = trained(load("params.yaml", {"train.precision": precision}))
    return Trainer(config, Dataset.load(), Path(tempfile.mkdtemp()), CPU).step


@click.command()
@click.option("--turns", default=5, show_default=True, help="Turns of each.")
@click.option("--seconds", default=8.0, show_default=True, help="Length of a turn.")
def main(turns: int, seconds: float) -> None:
    """Measure, print one JSON line, write results/precision.json."""
    batch_size = load("params.yaml").train.batch_size
    contestants = {precision: partial(training, precision) for precision in ("bf16", "fp32")}
    found = compete(contestants, batch_size, turns=turns, seconds=seconds)
    auto = {torch.bfloat16: "bf16", torch.float32: "fp32"}[resolve_precision("auto", CPU)]
    faster = max(found, key=lambda precision: found[precision]["median"])
    report("precision", {"unit": "images a second", "training": found, "auto": auto, "auto_is_faster": auto == faster})


if __name__ == "__main__":
    main()
