"""How good are the samples for how many network evaluations? Each solver on the model of `dvc repro train reference`.

fd_lite0 of the same noises drawn by each solver and spacing with 5 to 20 evaluations, by each solver's trailing steps
with 50 and 100, and by ddpm with 1,000, against the first 10,000 training images. What is done is kept in
results/solvers.json and is not done again for the same model.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from laptop_quality import REFERENCE
from machine import RESULTS, report

from diffusion import paths
from diffusion.config import Params, SampleConfig, TrainedConfig
from diffusion.metrics.extraction import moments_of
from diffusion.metrics.features import EfficientNetLite0
from diffusion.metrics.reference import Reference
from diffusion.model.card import read_card
from diffusion.model.denoiser import Denoiser
from diffusion.model.model_file import load_denoiser
from diffusion.params_file import load
from diffusion.report import diagrams, figures
from diffusion.runtime import keep_freed_memory, resolve_device
from diffusion.sampling import generation
from diffusion.sampling.samplers import evaluations

EVALUATIONS = (5, 10, 15, 20, 50, 100)
FEW = 20  # evaluations of the comparison of spacings
SOLVERS = (
    ("ddim", "trailing"),
    ("ddim", "quadratic"),
    ("heun", "trailing"),
    ("heun", "karras"),
    ("dpmpp_2m", "trailing"),
    ("dpmpp_2m", "logsnr"),
    ("dpmpp_2m", "karras"),
    ("unipc", "trailing"),
    ("unipc", "logsnr"),
    ("unipc", "karras"),
)
FULL = ("ddpm", "uniform", 1000)


@click.command()
@click.option("--samples", default=1000, show_default=True, help="Images of each score.")
@click.option(
    "--full/--no-full", default=True, show_default=True, help="ddpm with 1,000 evaluations too: half the time."
)
@click.option("--picture", type=click.Path(path_type=Path), default=None, help="Where to draw the curves.")
def main(samples: int, full: bool, picture: Path | None) -> None:
    """Measure, print one JSON line, write results/solvers.json."""
    keep_freed_memory()
    params = load("params.yaml")
    device = resolve_device(params.sample.device)
    denoiser, about = model(params, device)
    known = kept(about, samples)
    wanted = [*([configured(params.sample, *FULL)] if full else []), *runs(params.sample)]
    wanted.sort(key=lambda config: (config.steps > FEW, config.sampler != "ddpm"))  # what tells most, first
    keys = {f"{config.sampler} {config.spacing} {evaluations(config, denoiser.schedule)}": config for config in wanted}
    if missing := {key: config for key, config in keys.items() if key not in known}:
        scorer = Scorer(params, device)
        for key, config in missing.items():
            known[key] = round(scorer(denoiser, config, range(samples)), 1)
            click.echo(f"{key}: fd_lite0 {known[key]}", err=True)
            report("solvers", {"samples": samples, "model": about, "fd_lite0": known})
    report("solvers", {"samples": samples, "model": about, "fd_lite0": known})
    if picture:
        figures.save(diagrams.solvers_figure(known), picture)


def runs(sample: SampleConfig) -> Iterator[SampleConfig]:
    """Each solver with each number of evaluations; Heun's takes up to two less, never more."""
    for count in EVALUATIONS:
        for sampler, spacing in SOLVERS:
            if count > FEW and spacing != "trailing":
                continue
            yield configured(sample, sampler, spacing, (count + 1) // 2 if sampler == "heun" else count)


def configured(sample: SampleConfig, sampler: Any, spacing: Any, steps: int) -> SampleConfig:
    """`sample` with another solver, deterministic where it can be."""
    return sample.model_copy(
        update={"sampler": sampler, "spacing": spacing, "steps": steps, "eta": 0.0, "variance": "fixed_small"}
    )


def model(params: Params, device: torch.device) -> tuple[Denoiser, dict[str, Any]]:
    """The trained model as the sample stage loads it, and what it is."""
    denoiser = load_denoiser(paths.MODEL, params.sample, device)
    trained = TrainedConfig.model_validate(read_card(paths.MODEL)["config"])
    about = {
        "sha256": hashlib.sha256(paths.MODEL.read_bytes()).hexdigest()[:16],
        "schedule": trained.diffusion.schedule,
        "prediction": trained.diffusion.prediction,
        "loss_weight": trained.train.loss_weight,
        "images_seen": trained.train.steps * trained.train.batch_size,
        "clip_x0": params.sample.clip_x0,
        "precision": str(denoiser.dtype).removeprefix("torch."),
    }
    return denoiser, about


class Scorer:
    """fd_lite0 of images that a solver draws; the real images' statistics are those of the reference stage."""

    def __init__(self, params: Params, device: torch.device) -> None:
        self.params, self.device, self.extractor = params, device, EfficientNetLite0()
        file, described = paths.REFERENCE / f"{self.extractor.metric}.npz", self.extractor.describe()
        self.reference = Reference.load(file, described, split="train", images=REFERENCE)  # whatever params.yaml says

    def __call__(self, denoiser: Denoiser, config: SampleConfig, indices: range) -> float:
        drawn = generation.generate(denoiser, config, self.params.seed, indices, self.device)
        images = np.concatenate([batch.numpy() for batch in drawn])
        found = moments_of(images, self.extractor, self.params.evaluate.batch_size, self.device, "fd_lite0")
        return found.distance(self.reference)


def kept(about: dict[str, Any], samples: int) -> dict[str, float]:
    """What results/solvers.json holds of the same model and number of samples."""
    path = RESULTS / "solvers.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    same = content.get("model") == about and content.get("samples") == samples
    return dict(content["fd_lite0"]) if same else {}


if __name__ == "__main__":
    main()
