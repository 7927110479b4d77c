"""Is what `make tune` found better than what params.yaml has? Both trained for the whole budget, fresh seeds each.

The best setting is read from tuning/best.yaml, so run this before `make tune-apply`. 2,000 images of each training are
scored as fd_lite0. One thread each, two at a time. What is done is kept in results/tune_gain.json; another recipe
begins it anew, another best keeps the default's trainings. Needs the data: run `dvc repro prepare reference` once.
"""

import json
import multiprocessing
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
import torch
from machine import RESULTS, report
from objectives import DDIM, quality

from diffusion import paths
from diffusion.config import flat, trained
from diffusion.params_file import load
from diffusion.runtime import keep_freed_memory
from diffusion.tuning.apply import read_best

FIRST_SEED = 1000  # none that a study has seen
FINAL = "ddim-20 trailing"


@click.command()
@click.option("--best", type=click.Path(exists=True, path_type=Path), default=paths.BEST_YAML, show_default=True)
@click.option("--seeds", default=3, show_default=True, help="Trainings of each setting.")
@click.option("--at-once", default=2, show_default=True, help="Trainings side by side, one thread each.")
def main(best: Path, seeds: int, at_once: int) -> None:
    """Train what is missing, score, print the table and one JSON line, write results/tune_gain.json."""
    settings = {"default": {}, "best": read_best(best)[0]}
    about = identity(settings["best"])
    found = kept(about)
    wanted = [(name, seed) for seed in range(FIRST_SEED, FIRST_SEED + seeds) for name in settings]
    todo = [(name, settings[name], seed) for name, seed in wanted if f"{name}, seed {seed}" not in found]
    with multiprocessing.get_context("spawn").Pool(at_once, maxtasksperchild=1) as pool:
        for key, result in pool.imap_unordered(_task, todo):
            found[key] = result
            click.echo(f"{key}: {result}", err=True)
            write(about, found)
    write(about, found)


def identity(best: Mapping[str, Any]) -> dict[str, Any]:
    """What is compared."""
    default = flat(trained(load("params.yaml")))
    return {"default": {key: default[key] for key in best}, "best": dict(best), "recipe": default}


def _task(task: tuple[str, Mapping[str, Any], int]) -> tuple[str, dict[str, Any]]:
    name, overrides, seed = task
    torch.set_num_threads(1)
    keep_freed_memory()
    return f"{name}, seed {seed}", quality(overrides, seed, [DDIM])


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """Mean, standard deviation and seeds of each; by how much the best is better, and whether that is more than chance.

    `beats_the_spread`: the difference of the means is more than the larger range (largest minus smallest) of the two.
    """
    table: dict[str, Any] = {}
    spread = 0.0
    for name in ("default", "best"):
        values = [r["fd_lite0"][FINAL] for key, r in sorted(found.items()) if key.startswith(f"{name},")]
        if not values:
            return table
        sd = round(stdev(values), 1) if len(values) > 1 else None
        table[name] = {"mean": round(mean(values), 1), "sd": sd, "values": values}
        spread = max(spread, max(values) - min(values))
    gain = table["default"]["mean"] - table["best"]["mean"]
    return table | {"gain": round(gain, 1), "spread": round(spread, 1), "beats_the_spread": gain > spread}


def write(about: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Print the table, report all results."""
    table = summary(found)
    for name in ("default", "best") if "gain" in table else ():
        row = table[name]
        click.echo(f"{name:8} fd_lite0 {row['mean']:8} sd {row['sd']}  of {row['values']}  {about[name]}", err=True)
    report("tune_gain", {"compared": dict(about), "fd_lite0": table, "trainings": dict(found)})


def kept(about: Mapping[str, Any]) -> dict[str, Any]:
    """The trainings in results/tune_gain.json that are of the same recipe, and of the same values where it has them."""
    path = RESULTS / "tune_gain.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    earlier = content.get("compared", {})
    if not earlier or earlier.get("recipe") != about.get("recipe"):
        return {}
    same = ("default,", "best,") if earlier["best"] == about["best"] else ("default,",)
    return {key: result for key, result in content["trainings"].items() if key.startswith(same)}


if __name__ == "__main__":
    main()
