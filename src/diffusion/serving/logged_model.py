"""The model as it is logged: the library's code, weights in safetensors, a signature; no pickle."""

import shutil
import tempfile
import warnings
from collections.abc import Mapping
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from diffusion.atomic import write_json
from diffusion.code_digest import LIBRARY

PACKAGES = ("mlflow", "numpy", "pillow", "pydantic", "safetensors", "torch", "tqdm")


def log_version(client: Any, run_id: str, weights: Path, about: Mapping[str, Any]) -> None:
    """A new version of the registered model, made of a logged model of the run."""
    import mlflow.pyfunc

    run = client.get_run(run_id)
    experiment, identity = run.info.experiment_id, about["identity"]
    origin = {key: value for key, value in about["card"].get("origin", {}).items() if key.startswith("git.")}
    way = {key: str(about["sample"][key]) for key in ("sampler", "steps", "spacing", "guidance")}
    tags = {"identity": identity, **origin}
    query = f"source_run_id = '{run_id}' AND tags.identity = '{identity}'"  # one that an outage left without a version
    begun = client.search_logged_models([experiment], query, max_results=1)
    logged = begun[0] if begun else client.create_logged_model(experiment, "model", run_id, tags, way, "diffusion")
    mlflow.set_tracking_uri(client.tracking_uri)  # log_model takes no client
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it wants an example, to sample from the model as a test
        library = Path(about.get("library", LIBRARY))  # journals of older code lack it
        contents = packed(Path(scratch), weights, about["card"], about["sample"], library)
        name, model_id = about["name"], logged.model_id
        found = mlflow.pyfunc.log_model(**contents, model_id=model_id, registered_model_name=name, tags=tags)
    text = f"{run.info.run_name}: {', '.join(f'{key} {value}' for key, value in way.items())}"
    client.update_model_version(name, found.registered_model_version, text)


def packed(
    scratch: Path,
    weights: Path,
    card: Mapping[str, Any],
    sample: Mapping[str, Any],
    library: Path = LIBRARY,  # or a copy of it, as it was when the images were scored
) -> dict[str, Any]:
    """What mlflow.pyfunc's log_model and save_model take: code, weights in safetensors, a signature; no pickle."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    integer, number, text = DataType.long, DataType.double, DataType.string
    inputs: list[Any] = [ColSpec(integer, "num_images")]
    inputs += [ColSpec(kind, key, required=False) for kind, key in ((integer, "seed"), (text, "format"))]
    if card["config"]["model"]["num_classes"]:
        inputs += [ColSpec(Array(integer), "labels", required=False), ColSpec(number, "guidance", required=False)]
    outputs: list[Any] = [ColSpec(Array(text), "images"), ColSpec(text, "format"), ColSpec(integer, "seed")]
    code = shutil.copytree(library, scratch / "diffusion", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(weights, scratch / "model.safetensors")
    write_json(scratch / "model.json", card)
    return {
        "python_model": str(code / "serving/pyfunc_model.py"),
        "artifacts": {"weights": str(scratch / "model.safetensors"), "card": str(scratch / "model.json")},
        "code_paths": [str(code)],
        "model_config": {"sample": dict(sample)},
        "signature": ModelSignature(Schema(inputs), Schema(outputs)),
        "pip_requirements": [f"{name}=={installed(name)}" for name in PACKAGES],
    }
