"""Does a short trial foretell the result of a whole training? Rank correlations over ten settings.

Each setting is trained as a trial of `make tune` is (tune.images_per_trial), where both candidate objectives are taken,
the error on common noise levels (half-way and at the end) and fd_lite0 of tune.sample_images images; again with the
learning rate as it stands, which a trial makes larger; and for the whole budget of params.yaml, where 2,000 images are
scored. One thread each, two at a time. What is done is kept in
results/tune_rank.json; another recipe begins it anew. Needs the data: run `dvc repro prepare reference` once.
"""

import hashlib
import json
import multiprocessing
import tempfile
from collections.abc import Mapping
from dataclasses import replace
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
from diffusion.tuning_space import LR_HORIZON, trial_config

CPU = torch.device("cpu")
KEYS = ("train.lr", "train.lr_schedule", "train.warmup_steps", "diffusion.schedule")
SETTINGS = (
    (2e-3, "linear", 100, "cosine"),
    (2e-3, "linear", 100, "sigmoid"),
    (3e-3, "cosine", 300, "sigmoid"),
    (3e-3, "linear", 100, "cosine"),
    (1e-3, "linear", 100, "cosine"),
    (5e-3, "cosine", 300, "sigmoid"),
    (2e-3, "constant", 100, "cosine"),
    (2e-3, "linear", 100, "linear"),
    (5e-4, "cosine", 300, "sigmoid"),
    (5e-4, "constant", 0, "linear"),
)
KINDS = (f"trial, rate by length to -{LR_HORIZON}", "trial with the same rate", "whole")
CANDIDATES = ("common_error_half", "common_error", "fd_lite0")
FINAL = "ddim-20 trailing"


@click.command()
@click.option("--at-once", default=2, show_default=True, help="Trainings side by side, one thread each.")
@click.option("--only", type=click.Choice(KINDS), default=None, help="Trainings of this kind alone.")
def main(at_once: int, only: str | None) -> None:
    """Train what is missing, score, print one JSON line, write results/tune_rank.json."""
    recipe = identity()
    found = kept(recipe)
    wanted = [(setting, kind) for setting in SETTINGS for kind in ([only] if only else KINDS)]
    todo = [(setting, kind) for setting, kind in wanted if name(setting, kind) not in found]
    with multiprocessing.get_context("spawn").Pool(at_once, maxtasksperchild=1) as pool:
        for key, result in pool.imap_unordered(_task, todo):
            found[key] = result
            click.echo(f"{key}: {result}", err=True)
            write(recipe, found)
    write(recipe, found)


def name(setting: tuple[Any, ...], kind: str) -> str:
    """Key of a result."""
    return f"{setting[0]:g} {setting[1]} after {setting[2]}, {setting[3]}: {kind}"


def identity() -> str:
    """16 hex digits that name all that the trainings share."""
    params = load("params.yaml")
    shared = {**flat(params.model, "model"), **flat(params.train, "train"), **flat(params.diffusion, "diffusion")}
    shared |= {"images": params.tune.images_per_trial, "samples": params.tune.sample_images, "seed": params.seed}
    recipe = {key: value for key, value in shared.items() if key not in KEYS}
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def _task(task: tuple[tuple[Any, ...], str]) -> tuple[str, dict[str, Any]]:
    setting, kind = task
    torch.set_num_threads(1)
    keep_freed_memory()
    values = dict(zip(KEYS, setting, strict=True))
    if kind == "whole":
        return name(setting, kind), quality(values, load("params.yaml").seed, [DDIM])
    return name(setting, kind), trial(values, same_rate=kind != KINDS[0])


def trial(values: Mapping[str, Any], *, same_rate: bool) -> dict[str, Any]:
    """One training as long as a trial, and what it could be judged by."""
    params = load("params.yaml")
    scorer, errors = Scorer(params, CPU), {}
    with tempfile.TemporaryDirectory() as folder:
        config = trial_config(params, values)
        if same_rate:
            config = replace(config, train=replace(config.train, lr=values["train.lr"]))
        trainer = Trainer(config, Dataset.load(), Path(folder), CPU)
        steps = trainer.config.train.steps
        points = {max(1, steps // 2): "common_error_half", steps: "common_error"}
        for record in train(trainer):
            if record.step in points:
                errors[points[record.step]] = round(common_error(trainer), 5)
    images = draw(trainer, params)
    distance = score(images, params, scorer.reference, scorer.extractor, CPU)
    return {**errors, "fd_lite0": round(distance, 1), "train_seconds": round(trainer.progress.seconds)}


def correlations(found: Mapping[str, Any]) -> dict[str, Any]:
    """For each kind of trial: Spearman's rho of each candidate with the final score, over the settings that have both.

    `its_best_ends_as_number`: the place, of those settings, of the one that the candidate would choose.
    """
    table: dict[str, Any] = {}
    for kind in KINDS[:-1]:
        both = [s for s in SETTINGS if name(s, kind) in found and name(s, "whole") in found]
        table[kind] = {"settings": len(both)}
        if len(both) < 3:
            continue
        final = [found[name(s, "whole")]["fd_lite0"][FINAL] for s in both]
        for candidate in CANDIDATES:
            values = [found[name(s, kind)][candidate] for s in both]
            chosen = final[values.index(min(values))]
            rho = round(float(spearmanr(values, final).statistic), 3)
            table[kind][candidate] = {"spearman": rho, "its_best_ends_as_number": sorted(final).index(chosen) + 1}
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
