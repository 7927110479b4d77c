"""How long until the samples are as good? Ours after a part of the time against diffusers after all of it.

Both start from nothing, on the same images: ours by params.yaml with its number of steps fitted to the time, diffusers'
UNet2DModel (2.74M parameters) as its example trains it, at a learning rate that suits so short a run better than the
example's. 2,000 samples each (ours as params.yaml says, diffusers' by DDIM with as many evaluations), scored as
fd_lite0 against the first 10,000 training images. Needs the data: run `dvc repro prepare` once.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import click
import matched
import numpy as np
import peers
import torch
from laptop_quality import SAMPLES, draw, score, train_for
from machine import report

from diffusion.data.dataset import Dataset
from diffusion.data.pixels import to_uint8
from diffusion.params_file import load
from diffusion.runtime import keep_freed_memory, resolve_device

CPU = torch.device("cpu")


@click.command()
@click.option("--seconds", default=480.0, show_default=True, help="Training time of diffusers.")
@click.option("--part", default=0.25, show_default=True, help="Ours trains for this part of it.")
@click.option("--lr", default=1e-3, show_default=True, help="Learning rate of diffusers (its example: 1e-4).")
@click.option("--batch-size", default=64, show_default=True, help="Of diffusers.")
def main(seconds: float, part: float, lr: float, batch_size: int) -> None:
    """Train both, sample, score; write results/time_to_quality.json."""
    params, data = load("params.yaml"), Dataset.load()
    theirs = diffusers(seconds, lr, batch_size, data)
    keep_freed_memory()  # only now: diffusers does not do it
    with tempfile.TemporaryDirectory() as folder:
        trainer, trained_for = train_for(seconds * part, params, data, Path(folder), resolve_device("cpu"))
    ours = {
        "fd_lite0": round(score(draw(trainer, params), params), 1),
        "train_seconds": round(trained_for, 1),
        "images_seen": trainer.progress.step * params.train.batch_size,
    }
    report("time_to_quality", {"samples": SAMPLES, "ours": ours, "diffusers": theirs}, peers=("diffusers",))


def diffusers(seconds: float, lr: float, batch_size: int, data: Dataset) -> dict[str, Any]:
    """Train diffusers for `seconds`, sample and score."""
    params = load("params.yaml")
    config = matched.params(batch_size).train.model_copy(update={"lr": lr})
    step = peers.DiffusersTraining(matched.diffusers_model(batch_size), config, data, CPU, torch.float32)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        step()
        if step.steps % 100 == 0:
            click.echo(f"diffusers: step {step.steps}, {time.perf_counter() - start:.0f} of {seconds:.0f} s", err=True)
    taken = time.perf_counter() - start
    net = step.averaged()
    batches = [
        peers.diffusers_sampling(net, count, params.sample.steps, CPU, torch.float32, "DDIMScheduler")()
        for count in (100,) * (SAMPLES // 100)
    ]
    images: np.ndarray = to_uint8(torch.cat(batches) * 2 - 1).numpy()
    return {
        "fd_lite0": round(score(images, params), 1),
        "train_seconds": round(taken, 1),
        "images_seen": step.steps * batch_size,
        "lr": lr,
        "batch_size": batch_size,
    }


if __name__ == "__main__":
    main()
