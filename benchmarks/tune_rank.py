"""Does a short trial foretell the result of a whole training? Rank correlations over ten settings.

Each setting is trained twice: as a trial of `make tune` is (tune.images_per_trial), where both candidate objectives are
taken, the error on common noise levels (half-way and at the end) and fd_lite0 of tune.sample_images images; and for
the whole budget of params.yaml, where 2,000 images are scored. One thread each, two at a time. What is done is kept in
results/tune_rank.json; another recipe begins it anew. Needs the data: run `dvc repro prepare reference` once.
"""

import hashlib
import json
import multiprocessing
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from machine import RESULTS, report
from objectives import DDIM, quality
from scipy.stats import spearmanr
from solvers import Scorer

from diffusion.config import flat, load
from diffusion.data import Dataset
from diffusion.runtime import keep_freed_memory
from diffusion.training import Trainer, train
from diffusion.tuning_objective import common_error, draw, score
from diffusion.tuning_space import trial_config

CPU = torch.device("cpu")
KEYS = ("train.lr", "train.lr_schedule", "diffusion.schedule")
SETTINGS = (
    (2e-3, "linear", "cosine"),
    (2e-3, "constant", "cosine"),
    (2e-3, "cosine", "cosine"),
    (2e-3, "linear", "linear"),
    (2e-3, "linear", "sigmoid"),
    (5e-4, "linear", "cosine"),
    (5e-3, "linear", "cosine"),
    (5e-4, "constant", "linear"),
    (5e-3, "constant", "sigmoid"),
    (2e-4, "cosine", "linear"),
)
BUDGETS = ("trial", "whole")
CANDIDATES = ("common_error_half", "common_error", "fd_lite0")
FINAL = "ddim-20 trailing"


@click.command()
@click.option("--at-once", default=2, show_default=True, help="Trainings side by side, one thread each.")
def main(at_once: int) -> None:
    """Train what is missing, score, print one JSON line, write results/tune_rank.json."""
    recipe = identity()
    found = kept(recipe)
    todo = [(setting, budget) for setting in SETTINGS for budget in BUDGETS if name(setting, budget) not in found]
    with multiprocessing.get_context("spawn").Pool(at_once, maxtasksperchild=1) as pool:
        for key, result in pool.imap_unordered(_task, todo):
            found[key] = result
            click.echo(f"{key}: {result}", err=True)
            write(recipe, found)
    write(recipe, found)


def name(setting: tuple[Any, ...], budget: str) -> str:
    """Key of a result."""
    return f"{setting[0]:g} {setting[1]}, {setting[2]}: {budget}"


def identity() -> str:
    """16 hex digits that name all that the trainings share."""
    params = load("params.yaml")
    shared = {**flat(params.model, "model"), **flat(params.train, "train"), **flat(params.diffusion, "diffusion")}
    shared |= {"images": params.tune.images_per_trial, "samples": params.tune.sample_images, "seed": params.seed}
    recipe = {key: value for key, value in shared.items() if key not in KEYS}
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def _task(task: tuple[tuple[Any, ...], str]) -> tuple[str, dict[str, Any]]:
    setting, budget = task
    torch.set_num_threads(1)
    keep_freed_memory()
    values = dict(zip(KEYS, setting, strict=True))
    result = trial(values) if budget == "trial" else quality(values, load("params.yaml").seed, [DDIM])
    return name(setting, budget), result


def trial(values: Mapping[str, Any]) -> dict[str, Any]:
    """One training as long as a trial, and what it could be judged by."""
    params = load("params.yaml")
    scorer, errors = Scorer(params, CPU), {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(trial_config(params, values), Dataset.load(), Path(folder), CPU)
        steps = trainer.config.train.steps
        points = {max(1, steps // 2): "common_error_half", steps: "common_error"}
        for record in train(trainer):
            if record.step in points:
                errors[points[record.step]] = round(common_error(trainer), 5)
    images = draw(trainer, params)
    distance = score(images, params, scorer.reference, scorer.extractor, CPU)
    return {**errors, "fd_lite0": round(distance, 1), "train_seconds": round(trainer.progress.seconds)}


def correlations(found: Mapping[str, Any]) -> dict[str, Any]:
    """Spearman's rho of each candidate with the final score, over the settings that have both."""
    both = [s for s in SETTINGS if name(s, "trial") in found and name(s, "whole") in found]
    if len(both) < 3:
        return {"settings": len(both)}
    final = [found[name(s, "whole")]["fd_lite0"][FINAL] for s in both]
    table: dict[str, Any] = {"settings": len(both)}
    for candidate in CANDIDATES:
        values = [found[name(s, "trial")][candidate] for s in both]
        best = both[values.index(min(values))]
        rank = sorted(final).index(found[name(best, "whole")]["fd_lite0"][FINAL]) + 1
        rho = float(spearmanr(values, final).statistic)
        table[candidate] = {"spearman": round(rho, 3), "its_best_ends_as_number": rank}
    return table


def write(recipe: str, found: Mapping[str, Any]) -> None:
    """Report all results and the correlations."""
    report("tune_rank", {"recipe": recipe, "rank_correlation": correlations(found), "trainings": dict(found)})


def kept(recipe: str) -> dict[str, Any]:
    """The trainings in results/tune_rank.json that have the same recipe."""
    path = RESULTS / "tune_rank.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    return dict(content["trainings"]) if content.get("recipe") == recipe else {}


if __name__ == "__main__":
    main()
