"""How good are the samples after a fixed time of training with params.yaml?

The number of steps is what this machine does in the time, measured first; the learning-rate schedule ends with them.
Then 2,000 images are sampled as params.yaml says and scored as fd_lite0 against the first 10,000 training images.
Needs the data: run `dvc repro prepare` once.
"""

import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch
from machine import report

from diffusion.config import Params, trained
from diffusion.data import grids
from diffusion.data.dataset import Dataset, real_images
from diffusion.metrics.extraction import moments_of
from diffusion.metrics.features import EfficientNetLite0
from diffusion.metrics.reference import make_reference
from diffusion.params_file import load
from diffusion.runtime import keep_freed_memory, resolve_device
from diffusion.sampling import generation
from diffusion.training.loop import Trainer, train

SAMPLES = 2000
REFERENCE = 10_000
CALIBRATION_STEPS = 90


@click.command()
@click.option("--seconds", default=480.0, show_default=True, help="Training time, validation and checkpoints included.")
@click.option("--params", "path", default="params.yaml", show_default=True, help="Params file.")
@click.option("--grid", type=click.Path(path_type=Path), default=None, help="Where to write a picture of 64 samples.")
def main(seconds: float, path: str, grid: Path | None) -> None:
    """Train for a fixed time, sample, score."""
    keep_freed_memory()
    params, data = load(path), Dataset.load()
    device = resolve_device(params.train.device)
    with tempfile.TemporaryDirectory() as folder:
        trainer, train_seconds = train_for(seconds, params, data, Path(folder), device)
    start = time.perf_counter()
    samples = draw(trainer, params)
    sample_seconds = time.perf_counter() - start
    if grid:
        grids.save_png(grids.grid(samples[:64], columns=8, scale=3), grid)
    result = {
        "fd_lite0": round(score(samples, params), 1),
        "samples": SAMPLES,
        "reference": f"train[:{REFERENCE}]",
        "sampler": f"{params.sample.sampler}-{params.sample.steps}",
        "train_seconds": round(train_seconds, 1),
        "images_seen": trainer.progress.step * params.train.batch_size,
        "images_per_second": round(trainer.progress.step * params.train.batch_size / train_seconds, 1),
        "parameters": sum(p.numel() for p in trainer.net.parameters()),
        "best_val_loss": trainer.progress.best_val_loss,
        "sample_seconds": round(sample_seconds, 1),
        "precision": str(trainer.dtype).removeprefix("torch."),
    }
    report("laptop_quality", result)


def train_for(
    seconds: float, params: Params, data: Dataset, folder: Path, device: torch.device
) -> tuple[Trainer, float]:
    """Train as `params` say, but for as many steps as `seconds` allow here; (trainer, seconds that it took)."""
    rate = steps_per_second(Trainer(trained(params), data, folder / "calibration", device))
    steps = int(seconds * rate * 0.92)  # validation and checkpoints take some, and a long run slows a little
    params = params.model_copy(update={"train": params.train.model_copy(update={"steps": steps})})
    start = time.perf_counter()
    trainer = Trainer(trained(params), data, folder / "run", device)
    for record in train(trainer):
        if record.step % 200 == 0:
            click.echo(f"step {record.step} of {steps}, {time.perf_counter() - start:.0f} s", err=True)
    return trainer, time.perf_counter() - start


def steps_per_second(trainer: Trainer) -> float:
    """Rate of the training step after a warm-up."""
    for _ in range(CALIBRATION_STEPS // 3):
        trainer.step()
    start = time.perf_counter()
    for _ in range(CALIBRATION_STEPS):
        trainer.step()
    return CALIBRATION_STEPS / (time.perf_counter() - start)


def draw(trainer: Trainer, params: Params) -> np.ndarray:
    """uint8 (SAMPLES, 32, 32, 3) from the EMA weights, as the sample stage makes them."""
    batches = generation.generate(trainer.denoiser(), params.sample, params.seed, range(SAMPLES), trainer.device)
    return np.concatenate([batch.numpy() for batch in batches])


def score(samples: np.ndarray, params: Params) -> float:
    """fd_lite0 against the first REFERENCE training images."""
    extractor, batch_size = EfficientNetLite0(), params.evaluate.batch_size
    device = resolve_device(params.evaluate.device)
    reference = make_reference(real_images("train")[:REFERENCE], "train", extractor, batch_size, device)
    found = moments_of(samples, extractor, batch_size, device, "fd_lite0")
    return found.distance(reference)


if __name__ == "__main__":
    main()
