"""Which objective makes the best samples of equal images seen? params.yaml trained with each, several seeds.

Every training sees as many images as params.yaml says, with one thread, two at a time. Then 2,000 images by two
samplers, scored as fd_lite0 against the first 10,000 training images. What is done is kept in results/objectives.json;
another recipe begins it anew. Needs the data: run `dvc repro prepare reference` once.
"""

import hashlib
import json
import multiprocessing
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
import torch
from machine import RESULTS, report
from solvers import Scorer, configured

from diffusion.config import flat, trained
from diffusion.data.dataset import Dataset
from diffusion.params_file import load
from diffusion.runtime import keep_freed_memory
from diffusion.training.loop import Trainer, train

CPU = torch.device("cpu")
SAMPLES = 2000
COMMON = {"diffusion.schedule": "cosine", "train.timesteps": "stratified", "train.loss_weight": "simple"}
OBJECTIVES: dict[str, dict[str, str]] = {
    "eps": {**COMMON, "diffusion.prediction": "eps"},
    "v": {**COMMON, "diffusion.prediction": "v"},
    "edm": {
        "diffusion.prediction": "edm",
        "diffusion.schedule": "edm",
        "train.timesteps": "lognormal",
        "train.loss_weight": "own",
    },
    "x0, own weight": {**COMMON, "diffusion.prediction": "x0", "train.loss_weight": "own"},
    "eps, min-SNR weight": {**COMMON, "diffusion.prediction": "eps", "train.loss_weight": "min_snr"},
    "v, min-SNR weight": {**COMMON, "diffusion.prediction": "v", "train.loss_weight": "min_snr"},
    "x0, min-SNR weight": {**COMMON, "diffusion.prediction": "x0", "train.loss_weight": "min_snr"},
}
DDIM = ("ddim", "trailing", 20)
SAMPLERS = (DDIM, ("dpmpp_2m", "karras", 20))


@click.command()
@click.option("--seeds", default=3, show_default=True, help="Trainings of each objective.")
@click.option("--only", multiple=True, type=click.Choice(list(OBJECTIVES)), help="Objectives to train; all if none.")
@click.option("--at-once", default=2, show_default=True, help="Trainings side by side, one thread each.")
def main(seeds: int, only: tuple[str, ...], at_once: int) -> None:
    """Train what is missing, score, print one JSON line, write results/objectives.json."""
    name_of_recipe = identity()
    found = kept(name_of_recipe)
    todo = [(name, seed) for seed in range(seeds) for name in only or OBJECTIVES if f"{name}, seed {seed}" not in found]
    context = multiprocessing.get_context("spawn")
    with context.Pool(at_once, maxtasksperchild=1) as pool:
        for name, seed, result in pool.imap_unordered(_task, todo):
            found[f"{name}, seed {seed}"] = result
            click.echo(f"{name}, seed {seed}: {result}", err=True)
            write(name_of_recipe, found)
    write(name_of_recipe, found)


def identity() -> str:
    """16 hex digits that name all of the recipe that objectives share."""
    recipe = flat(trained(load("params.yaml", OBJECTIVES["v"])))
    shared = {key: value for key, value in recipe.items() if key not in OBJECTIVES["edm"]}
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]


def _task(task: tuple[str, int]) -> tuple[str, int, dict[str, Any]]:
    name, seed = task
    torch.set_num_threads(1)
    keep_freed_memory()
    return name, seed, quality(OBJECTIVES[name], seed, SAMPLERS)


def quality(overrides: Mapping[str, Any], seed: int, samplers: Sequence[tuple[str, str, int]]) -> dict[str, Any]:
    """One training and its score by each of `samplers`."""
    params = load("params.yaml", {**overrides, "seed": seed})
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(trained(params), Dataset.load(), Path(folder), CPU)
        for record in train(trainer):
            if record.step % 1000 == 0:
                click.echo(f"{dict(overrides)}, seed {seed}: step {record.step}", err=True)
    scorer = Scorer(params, CPU)
    trainer.ema.net.load_state_dict(trainer.best)
    scores = {
        f"{sampler}-{steps} {spacing}": round(
            scorer(trainer.denoiser(), configured(params.sample, sampler, spacing, steps), range(SAMPLES)), 1
        )
        for sampler, spacing, steps in samplers
    }
    return {
        "fd_lite0": scores,
        "best_val_loss": round(trainer.progress.best_val_loss, 5),
        "images_seen": trainer.progress.step * params.train.batch_size,
        "train_seconds": round(trainer.progress.seconds),
        "precision": str(trainer.dtype).removeprefix("torch."),
    }


def write(identity: str, found: Mapping[str, Any]) -> None:
    """Report all results and, for each objective and sampler, mean and standard deviation over the seeds."""
    table: dict[str, Any] = {}
    for name in OBJECTIVES:
        runs = [result["fd_lite0"] for key, result in found.items() if key.rpartition(", seed ")[0] == name]
        for sampler in runs[0] if runs else ():
            values = [run[sampler] for run in runs]
            spread = round(stdev(values), 1) if len(values) > 1 else None
            table.setdefault(name, {})[sampler] = {"mean": round(mean(values), 1), "sd": spread, "seeds": len(values)}
    report("objectives", {"recipe": identity, "samples": SAMPLES, "fd_lite0": table, "trainings": dict(found)})


def kept(identity: str) -> dict[str, Any]:
    """The trainings in results/objectives.json that have the same recipe."""
    path = RESULTS / "objectives.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    return dict(content["trainings"]) if content.get("recipe") == identity else {}


if __name__ == "__main__":
    main()
