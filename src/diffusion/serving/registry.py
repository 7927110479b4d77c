"""MLflow's model registry: versions of the experiment's model, and which of them is the champion.

A version is a set of weights together with a way to sample from them. `candidate` is the newest; `champion` moves to a
version that is scored better in the same metric, of as many samples, against the same reference. A score is compared
once: who then promotes another version by hand is not overruled when the score is sent again.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from diffusion import paths
from diffusion.errors import UserError, brief
from diffusion.params_file import load
from diffusion.serving.logged_model import log_version
from diffusion.tracking.mlflow_store import connect
from diffusion.tracking.tracker import warn

WAY = ("sampler", "steps", "spacing", "eta", "variance", "clip_x0", "guidance", "labels")  # how a model is sampled


def model_name(experiment: str) -> str:
    """Of the experiment's registered model: the experiment's name without what MLflow refuses."""
    return re.sub(r"[/:%'\"]", "-", experiment)


def described(
    experiment: str,
    weights: Path,
    card: Mapping[str, Any],
    sample: Mapping[str, Any],  # the section that the images were generated with
    scores: list[dict[str, Any]],  # {"metric": its name, "value": lower is better, "of": what equal conditions share}
    code: str | None,  # digest of the code that generated them; None in cards of older samples
) -> dict[str, Any]:
    """What `register` has to know, in JSON types."""
    digest = _digest(weights)
    way = {key: sample[key] for key in WAY}
    identity = hashlib.sha256(json.dumps([digest, way, code], sort_keys=True).encode()).hexdigest()[:16]
    return {
        "name": model_name(experiment),
        "identity": identity,
        "sha256": digest,
        "card": dict(card),
        "sample": dict(sample),
        "scores": scores,
    }


def register(client: Any, run_id: str, weights: Path, about: Mapping[str, Any]) -> None:
    """Log and register the model unless the registry has it; note its scores; set the aliases. Twice changes nothing.

    Raises:
        LookupError: `weights` is another file by now.
        Exception: what MLflow's client raises.
    """
    if _digest(weights) != about["sha256"]:
        raise LookupError(f"{weights} is another model by now")
    name, identity = about["name"], about["identity"]
    if not _of_identity(client, name, identity):
        log_version(client, run_id, weights, about)
    number = _of_identity(client, name, identity)[0].version
    scores = sorted(about["scores"], key=lambda score: not score["metric"].startswith("fid"))  # FID decides first
    for score in scores:
        client.set_model_version_tag(name, number, score["metric"], f"{score['value']!r}")
        client.set_model_version_tag(name, number, f"{score['metric']}.of", score["of"])
    scored = json.dumps([[*score.values()] for score in scores])
    client.set_model_version_tag(name, number, "scored", scored)
    _move(client, name, "candidate", lambda _, versions: versions[-1])
    _elect(client, name, number, scored)


def holder_of(client: Any, name: str, alias: str) -> Any | None:
    """The version that bears the alias; None if there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _versions(client: Any, name: str) -> list[Any]:
    """Those of this pipeline, the newest last."""
    found = client.search_model_versions(f"name = '{name}'")
    return sorted((v for v in found if "identity" in v.tags), key=lambda v: int(v.version))


def _of_identity(client: Any, name: str, identity: str) -> list[Any]:
    return [version for version in _versions(client, name) if version.tags["identity"] == identity]


def _move(client: Any, name: str, alias: str, choose: Callable[[Any, list[Any]], Any]) -> Any:
    """Give the alias to the version that `choose` finds, of the one that has it and of all.

    It is asked again after each change: of two processes at once the later one to write sees what the other has
    written. So this is safe on each store that reads what was written last: a database, or a server.
    """
    while True:
        holder = holder_of(client, name, alias)
        best = choose(holder, _versions(client, name))
        if holder is not None and best.version == holder.version:
            return best
        client.set_registered_model_alias(name, alias, best.version)


def _elect(client: Any, name: str, number: str, scored: str) -> None:
    """Make the best of the champion and of the versions whose scores were not compared yet the champion."""
    versions = _versions(client, name)
    compared = {(v.version, v.tags["compared"]) for v in versions if "compared" in v.tags}

    def best(holder: Any | None, versions: list[Any]) -> Any:  # also of those that other processes score meanwhile
        for rival in versions:
            known = (rival.version, rival.tags.get("scored")) in compared
            if holder is None or (not known and _is_better(rival, holder)):
                holder = rival
        return holder

    winner = _move(client, name, "champion", best)
    client.set_model_version_tag(name, number, "compared", scored)
    if (number, scored) not in compared:
        hint = "" if winner.version == number else f"; if you prefer version {number}: make promote VERSION={number}"
        warn(f"version {winner.version} is the champion of model {name}{hint}")


def _is_better(rival: Any, holder: Any) -> bool:
    """By the first of the rival's newest scores that both have, of equal conditions."""
    for metric, value, of in json.loads(rival.tags.get("scored", "[]")):
        if holder.tags.get(f"{metric}.of") == of:
            return bool(value < float(holder.tags[metric]))
    return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@click.command()
@click.argument("version", required=False, type=click.IntRange(1))
def main(version: int | None) -> None:
    """List the versions of the registered model; with VERSION, make that one the champion."""
    try:
        name, client = model_name(load(paths.PARAMS).tracking.experiment), connect()
        if version is not None:
            promote(client, name, version)
        _list(client, name)
    except UserError:
        raise
    except Exception as error:  # not installed, no network, refused
        raise UserError(f"no MLflow ({brief(error)})") from None


def promote(client: Any, name: str, version: int) -> None:
    """Give the alias `champion` to a version.

    Raises:
        UserError: there is no such version.
    """
    if str(version) not in {str(v.version) for v in client.search_model_versions(f"name = '{name}'")}:
        raise UserError(f"model {name} has no version {version}: `make promote` lists what there is")
    client.set_registered_model_alias(name, "champion", str(version))


def _list(client: Any, name: str) -> None:
    versions = sorted(client.search_model_versions(f"name = '{name}'"), key=lambda v: int(v.version))
    if not versions:
        raise UserError(f"no model {name} is registered yet: run `dvc repro`")
    for v in versions:
        found = client.get_model_version(name, v.version)  # the search leaves aliases out
        tags, aliases = found.tags, "/".join(sorted(found.aliases)) or "-"
        metrics = sorted(tag.removesuffix(".of") for tag in tags if tag.endswith(".of"))
        scores = ", ".join(f"{metric} {float(tags[metric]):.2f} ({tags[f'{metric}.of']})" for metric in metrics)
        click.echo(f"{v.version:>3}  {aliases:<20}  {found.description}  {scores}")
