"""Does a short trial foretell the result of a whole training? Rank correlations over ten settings.

Each setting is trained as a trial of `make tune` is, where both candidate objectives are taken, the error on common
noise levels (half-way and at the end) and fd_lite0 of tune.sample_images images; if asked for, again with the learning
rate as it stands, which a trial makes larger; and for the whole budget of params.yaml, where 2,000 images are scored.
What others have done already counts too: trials of `make tune` in this folder, and whole trainings of tune_gain.py (the
final score of a setting is the mean of all of it). One thread each, two at a time. What is done is kept in
results/tune_rank.json; another recipe begins it anew. Needs the data: run `dvc repro prepare reference` once.
"""

import hashlib
import json
import multiprocessing
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import click
import optuna
import torch
from machine import RESULTS, report
from objectives import DDIM, quality
from optuna.trial import TrialState
from scipy.stats import spearmanr
from solvers import Scorer

from diffusion import paths
from diffusion.config import Params, flat, trained
from diffusion.data.dataset import Dataset
from diffusion.metrics.features import EfficientNetLite0
from diffusion.params_file import load
from diffusion.runtime import keep_freed_memory
from diffusion.training.loop import Trainer, train
from diffusion.tuning.objective import common_error, load_reference, samples, score
from diffusion.tuning.search import study_name
from diffusion.tuning.space import LR_HORIZON, read_space, trial_config
from diffusion.tuning.study import open_study, trials

CPU = torch.device("cpu")
KEYS = ("train.lr", "train.lr_schedule", "train.warmup_steps", "diffusion.schedule")
SETTINGS: tuple[tuple[Any, ...], ...] = (
    (2e-3, "linear", 100, "cosine"),
    (2e-3, "linear", 100, "sigmoid"),
    (3e-3, "cosine", 300, "sigmoid"),
    (3e-3, "linear", 100, "cosine"),
    (1e-3, "linear", 100, "cosine"),
    (2.301e-3, "constant", 500, "sigmoid"),
    (2e-3, "linear", 100, "linear"),
    (2e-3, "constant", 100, "cosine"),
    (2e-3, "cosine", 100, "cosine"),
    (5e-4, "cosine", 300, "sigmoid"),
)
KINDS = ("trial", "trial with the same rate", "whole")
CANDIDATES = ("common_error_half", "common_error", "fd_lite0")
FINAL = "ddim-20 trailing"


@click.command()
@click.option("--at-once", default=2, show_default=True, help="Trainings side by side, one thread each.")
@click.option(
    "--only", type=click.Choice(KINDS), multiple=True, default=("trial", "whole"), show_default=True, help="Kinds."
)
def main(at_once: int, only: tuple[str, ...]) -> None:
    """Train what is missing, score, print one JSON line, write results/tune_rank.json."""
    params = load("params.yaml")
    recipe = digest(flat(trained(params)))
    found = of_study(params) | of_gain(recipe) | kept(recipe)
    todo = missing(found, only)
    with multiprocessing.get_context("spawn").Pool(at_once, maxtasksperchild=1) as pool:
        for key, result in pool.imap_unordered(_task, todo):
            found[key] = result
            click.echo(f"{key}: {result}", err=True)
            write(recipe, found)
    write(recipe, found)


def name(setting: tuple[Any, ...], kind: str) -> str:
    """Key of a result."""
    return f"{setting[0]:g} {setting[1]} after {setting[2]}, {setting[3]}: {kind}"


def missing(found: Mapping[str, Any], kinds: Sequence[str]) -> list[tuple[tuple[Any, ...], str]]:
    """Each setting and kind that has no result of any seed."""
    done = {key.partition(", seed ")[0] for key in found}
    return [(setting, kind) for setting in SETTINGS for kind in kinds if name(setting, kind) not in done]


def digest(recipe: Mapping[str, Any]) -> str:
    """16 hex digits that name all that the settings share of a training."""
    shared = {key: value for key, value in recipe.items() if key not in KEYS}
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]


def conditions(params: Params, kind: str) -> dict[str, Any]:
    """What else a trial's result depends on."""
    horizon = LR_HORIZON if kind == KINDS[0] else 0.0
    return {"images": params.tune.images_per_trial, "samples": params.tune.sample_images, "lr_horizon": horizon}


def _task(task: tuple[tuple[Any, ...], str]) -> tuple[str, dict[str, Any]]:
    setting, kind = task
    torch.set_num_threads(1)
    keep_freed_memory()
    values = dict(zip(KEYS, setting, strict=True))
    if kind == "whole":
        return name(setting, kind), quality(values, load("params.yaml").seed, [DDIM])
    return name(setting, kind), trial(values, kind)


def of_study(params: Params) -> dict[str, Any]:
    """The trials of SETTINGS that `make tune` has completed in optuna/study.db with the same params and code."""
    if not paths.OPTUNA_DB.exists():
        return {}
    reference = load_reference(params, EfficientNetLite0(precision=params.evaluate.precision))
    name_of_study, url = study_name(params, Dataset.load().identity, reference), f"sqlite:///{paths.OPTUNA_DB}"
    if name_of_study not in optuna.get_all_study_names(url):
        return {}
    study, space, found = open_study(name_of_study, params, url), read_space(params), dict[str, Any]()
    budget = params.tune.images_per_trial
    for done in trials(study, TrialState.COMPLETE):
        values = {dimension.key: dimension.used(done.params[dimension.key]) for dimension in space}
        errors = {"common_error_half": done.intermediate_values[budget // 2]}
        errors["common_error"] = done.intermediate_values[budget]
        result = {key: round(value, 5) for key, value in errors.items()} | {"fd_lite0": round(done.values[0], 1)}
        setting = tuple(values.get(key) for key in KEYS)
        if setting in SETTINGS and set(values) == set(KEYS):
            found[name(setting, KINDS[0])] = result | {"conditions": conditions(params, KINDS[0])}
    return found


def trial(values: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """One training as long as a trial, and what it could be scored by."""
    params = load("params.yaml")
    scorer, errors = Scorer(params, CPU), {}
    with tempfile.TemporaryDirectory() as folder:
        config = trial_config(params, values)
        if kind != KINDS[0]:
            config = config.model_copy(update={"train": config.train.model_copy(update={"lr": values["train.lr"]})})
        trainer = Trainer(config, Dataset.load(), Path(folder), CPU)
        steps = trainer.config.train.steps
        points = {max(1, steps // 2): "common_error_half", steps: "common_error"}
        for record in train(trainer):
            if record.step in points:
                errors[points[record.step]] = round(common_error(trainer), 5)
    images = samples(trainer, params)
    distance = score(images, params, scorer.reference, scorer.extractor, CPU)
    found = {**errors, "fd_lite0": round(distance, 1), "train_seconds": round(trainer.progress.seconds)}
    return {**found, "conditions": conditions(params, kind)}


def of_gain(recipe: str) -> dict[str, Any]:
    """The whole trainings that tune_gain.py has done of the same recipe."""
    path = RESULTS / "tune_gain.json"
    gain = json.loads(path.read_text()) if path.exists() else {"compared": {"recipe": {}}}
    if digest(gain["compared"]["recipe"]) != recipe:
        return {}
    found = {}
    for key, training in gain["trainings"].items():
        which, _, seed = key.partition(", ")
        values = gain["compared"][which]
        if set(values) == set(KEYS):
            found[f"{name(tuple(values[k] for k in KEYS), 'whole')}, {seed}"] = training
    return found


def finals(found: Mapping[str, Any]) -> dict[tuple[Any, ...], list[float]]:
    """The scores of all whole trainings, whatever their seed, of each setting that has one."""
    scores: dict[tuple[Any, ...], list[float]] = {}
    for setting in SETTINGS:
        whole = name(setting, "whole")
        values = [v["fd_lite0"][FINAL] for key, v in found.items() if key.partition(", seed ")[0] == whole]
        scores |= {setting: values} if values else {}
    return scores


def correlations(found: Mapping[str, Any], wholes: Mapping[tuple[Any, ...], list[float]]) -> dict[str, Any]:
    """For each kind of trial: Spearman's rho of each candidate with the final score, over the settings that have both.

    `its_best_ends_as_number`: the place, of those settings, of the one that the candidate would choose.
    """
    table: dict[str, Any] = {}
    for kind in KINDS[:-1]:
        both = [s for s in SETTINGS if name(s, kind) in found and s in wholes]
        table[kind] = {"settings": len(both)}
        if len(both) < 3:
            continue
        final = [mean(wholes[s]) for s in both]
        for candidate in CANDIDATES:
            values = [found[name(s, kind)][candidate] for s in both]
            chosen = final[values.index(min(values))]
            rho = round(float(spearmanr(values, final).statistic), 3)
            table[kind][candidate] = {"spearman": rho, "its_best_ends_as_number": sorted(final).index(chosen) + 1}
    return table


def write(recipe: str, found: Mapping[str, Any]) -> None:
    """Report all results, the final score of each setting and the correlations."""
    wholes = finals(found)
    scores = {name(s, "whole"): {"mean": round(mean(v), 1), "trainings": len(v)} for s, v in wholes.items()}
    table = correlations(found, wholes)
    report("tune_rank", {"recipe": recipe, "rank_correlation": table, "final": scores, "trainings": dict(found)})


def kept(recipe: str) -> dict[str, Any]:
    """The trainings in results/tune_rank.json that have the same recipe; of trials, those that are like today's."""
    path, params = RESULTS / "tune_rank.json", load("params.yaml")
    content = json.loads(path.read_text()) if path.exists() else {}
    if content.get("recipe") != recipe:
        return {}
    today = {name(s, kind): conditions(params, kind) for s in SETTINGS for kind in KINDS[:-1]}
    trainings: dict[str, Any] = content["trainings"]
    return {key: found for key, found in trainings.items() if found.get("conditions") == today.get(key)}


if __name__ == "__main__":
    main()
