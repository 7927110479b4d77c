"""MLflow's model registry: versions of the experiment's model, and which of them is the champion.

A version is a set of weights together with a way to sample from them. `candidate` is the newest; `champion` moves when
another version is scored better in the same metric, of as many samples, against the same reference.
"""

import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import click

from diffusion import paths
from diffusion.code_digest import LIBRARY
from diffusion.errors import UserError, brief
from diffusion.params_file import load
from diffusion.tracking.journal import warn
from diffusion.tracking.mlflow_store import connect, is_server

WAY = ("sampler", "steps", "spacing", "eta", "variance", "clip_x0", "guidance", "labels")  # how a model is sampled
PACKAGES = ("mlflow", "numpy", "pillow", "pydantic", "safetensors", "torch", "tqdm")


def model_name(experiment: str) -> str:
    """Of the experiment's registered model: the experiment's name without what MLflow refuses."""
    return re.sub(r"[/:%'\"]", "-", experiment)


def described(
    experiment: str,
    weights: Path,
    card: Mapping[str, Any],
    sample: Mapping[str, Any],  # the section that the images were drawn with
    scores: list[dict[str, Any]],  # {"metric": its name, "value": lower is better, "of": what equal conditions share}
    code: str | None,  # digest of the code that drew them; None in cards of older samples
) -> dict[str, Any]:
    """What `register` has to know, in JSON types."""
    digest = _digest(weights)
    way = {key: sample[key] for key in WAY}
    identity = hashlib.sha256(json.dumps([digest, way, code], sort_keys=True).encode()).hexdigest()[:16]
    about = {
        "name": model_name(experiment),
        "identity": identity,
        "sha256": digest,
        "card": dict(card),
        "sample": dict(sample),
    }
    return {**about, "scores": scores}


def register(client: Any, run_id: str, weights: Path, about: Mapping[str, Any]) -> None:
    """Log and register the model unless the registry has it; note its scores; set the aliases. Twice changes nothing.

    Raises:
        LookupError: `weights` is another file by now.
        Exception: what MLflow's client raises.
    """
    if _digest(weights) != about["sha256"]:
        raise LookupError(f"{weights} is another model by now")
    name = about["name"]
    version = _known(client, name, about["identity"]) or _create(client, run_id, weights, about)
    for score in about["scores"]:
        client.set_model_version_tag(name, version.version, score["metric"], f"{score['value']!r}")
        client.set_model_version_tag(name, version.version, f"{score['metric']}.of", score["of"])
    newest = _bearer(client, name, "candidate")
    if newest is None or int(newest.version) < int(version.version):
        client.set_registered_model_alias(name, "candidate", version.version)
    _challenge(client, name, client.get_model_version(name, version.version), [s["metric"] for s in about["scores"]])


def champion(client: Any, name: str) -> Any | None:
    """The version that bears the alias; None if there is none."""
    return _bearer(client, name, "champion")


def _bearer(client: Any, name: str, alias: str) -> Any | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _challenge(client: Any, name: str, candidate: Any, metrics: list[str]) -> None:
    """Make `candidate` the champion if it is better in the first of `metrics`, its new scores, that both have."""
    holder = champion(client, name)
    if holder is None:
        client.set_registered_model_alias(name, "champion", candidate.version)
        warn(f"version {candidate.version} of model {name} is its first champion")
    elif holder.version != candidate.version:
        metric = next((m for m in _deciding(metrics) if _comparable(m, holder.tags, candidate.tags)), None)
        if metric is None:
            hint = f"if you prefer it: make promote VERSION={candidate.version}"
            warn(
                f"version {candidate.version} of model {name} cannot be compared with champion {holder.version}; {hint}"
            )
            return
        mine, theirs = float(candidate.tags[metric]), float(holder.tags[metric])
        result = f"{metric} {mine:.2f} against {theirs:.2f}"
        if mine < theirs:
            client.set_registered_model_alias(name, "champion", candidate.version)
            warn(f"version {candidate.version} of model {name} is its champion now ({result})")
        else:
            warn(f"version {holder.version} stays the champion of model {name} ({result})")


def _scores(tags: Mapping[str, str]) -> list[str]:
    """The metrics that a version was ever scored by."""
    return _deciding([tag.removesuffix(".of") for tag in tags if tag.endswith(".of")])


def _deciding(metrics: list[str]) -> list[str]:
    """In the order in which they decide: FID before distances in other features."""
    return sorted(metrics, key=lambda name: (not name.startswith("fid"), name))


def _comparable(metric: str, ours: Mapping[str, str], theirs: Mapping[str, str]) -> bool:
    return metric in ours and metric in theirs and ours[f"{metric}.of"] == theirs[f"{metric}.of"]


def _known(client: Any, name: str, identity: str) -> Any | None:
    found = client.search_model_versions(f"name = '{name}' and tags.identity = '{identity}'")
    return found[0] if found else None


def _begun(client: Any, experiment: str, run_id: str, identity: str) -> Any | None:
    """The run's logged model of this identity, which an outage left without a version."""
    query = f"source_run_id = '{run_id}' AND tags.identity = '{identity}'"
    return next(iter(client.search_logged_models([experiment], query, max_results=1)), None)


def _create(client: Any, run_id: str, weights: Path, about: Mapping[str, Any]) -> Any:
    """A logged model of the run, and a version of the registered model made of it."""
    from mlflow.exceptions import MlflowException

    run = client.get_run(run_id)
    try:
        client.create_registered_model(about["name"])
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    origin = {key: value for key, value in about["card"].get("origin", {}).items() if key.startswith("git.")}
    tags = {"identity": about["identity"], **origin}
    way = {key: str(about["sample"][key]) for key in ("sampler", "steps", "spacing", "guidance")}
    experiment = run.info.experiment_id
    logged = _begun(client, experiment, run_id, about["identity"]) or client.create_logged_model(
        experiment, "model", run_id, tags, way, "diffusion"
    )
    with tempfile.TemporaryDirectory() as folder:
        library = Path(about.get("library", LIBRARY))  # journals of older code lack it
        ids = {"model_id": logged.model_id, "run_id": run_id}
        save(Path(folder) / "model", weights, about["card"], about["sample"], library, **ids)
        client.log_model_artifacts(logged.model_id, str(Path(folder) / "model"))
    client.finalize_logged_model(logged.model_id, "READY")
    server = is_server(client.tracking_uri)  # it takes no places of files; a database would look up ids elsewhere
    source = f"models:/{logged.model_id}" if server else logged.artifact_location
    text = f"{run.info.run_name}: {', '.join(f'{key} {value}' for key, value in way.items())}"
    return client.create_model_version(about["name"], source, run_id, tags, None, text, model_id=logged.model_id)


def save(
    folder: Path,
    weights: Path,
    card: Mapping[str, Any],
    sample: Mapping[str, Any],
    library: Path = LIBRARY,  # or a copy of it, as it was when the images were scored
    model_id: str | None = None,
    run_id: str | None = None,
) -> None:
    """Write an MLflow model: the library's code, the weights in safetensors, a signature, an example; no pickle."""
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    integer, number, text = DataType.long, DataType.double, DataType.string
    inputs: list[Any] = [ColSpec(integer, "num_images")]
    inputs += [ColSpec(kind, key, required=False) for kind, key in ((integer, "seed"), (text, "format"))]
    if card["config"]["model"]["num_classes"]:
        inputs += [ColSpec(Array(integer), "labels", required=False), ColSpec(number, "guidance", required=False)]
    outputs: list[Any] = [ColSpec(Array(text), "images"), ColSpec(text, "format"), ColSpec(integer, "seed")]
    with tempfile.TemporaryDirectory() as scratch:
        code = shutil.copytree(library, Path(scratch) / "diffusion", ignore=shutil.ignore_patterns("__pycache__"))
        files = {"weights": Path(scratch) / "model.safetensors", "card": Path(scratch) / "model.json"}
        shutil.copyfile(weights, files["weights"])
        files["card"].write_text(json.dumps(card, indent=2) + "\n")
        logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)
        mlflow.pyfunc.save_model(
            path=str(folder),
            python_model=str(code / "serving/pyfunc_model.py"),
            artifacts={key: str(path) for key, path in files.items()},
            code_paths=[str(code)],
            model_config={"sample": dict(sample)},
            signature=ModelSignature(Schema(inputs), Schema(outputs)),
            input_example={"num_images": 4, "seed": 0},
            pip_requirements=[f"{name}=={installed(name)}" for name in PACKAGES],
            mlflow_model=Model(run_id=run_id, model_id=model_id),
        )


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
        scores = ", ".join(f"{name} {float(tags[name]):.2f} ({tags[f'{name}.of']})" for name in _scores(tags))
        click.echo(f"{v.version:>3}  {aliases:<20}  {found.description}  {scores}")
