"""The whole pipeline as one command: DVC with params.yaml as it is, or with other values in a folder of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from diffusion import paths
from diffusion.config import Params, flat
from diffusion.model.card import read_card
from diffusion.params_file import load
from diffusion.tracking import mlproject_run
from diffusion.tracking.mlflow_store import connect
from diffusion.tracking.tracker import warn


def reproduce(params: Params) -> int:
    """Run DVC's stages with `params`; exit status of DVC.

    Where `params` differ from params.yaml this is an experiment in a temporary folder: params.yaml and the results
    here stay, and the next call starts from the same defaults. DVC prints how to bring the experiment's results here.
    """
    file = flat(load(paths.PARAMS))
    # The search is no stage, and DVC could not read what its space is.
    changed = {key: value for key, value in flat(params).items() if value != file[key] and key.split(".")[0] != "tune"}
    source = Path(params.data.source).resolve()
    if changed and not source.is_relative_to(Path.cwd()):  # else ../photos would be looked for beside the copy
        changed["data.source"] = str(source)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # the stages' `python` is this one
    status = subprocess.run([sys.executable, "-m", "dvc", *_arguments(changed)], env={**os.environ, "PATH": path})
    if not changed and not status.returncode and params.tracking.enabled:
        _link()
    return status.returncode


def _arguments(changed: Mapping[str, object]) -> list[str]:
    if not changed:
        return ["repro"]
    texts = {key: json.dumps(value, ensure_ascii=False) for key, value in changed.items()}
    said = ", ".join(f"{key} = {text}" for key, text in texts.items())
    print(f"{paths.PARAMS} stays as it is; in a DVC experiment of its own: {said}", file=sys.stderr)
    settings = [part for key, text in texts.items() for part in ("-S", f"{key}={text}")]
    return ["exp", "run", "--temp", *settings]


def _link() -> None:
    """Let the run that `mlflow run` opened name the pipeline's, also when no stage had to run."""
    if not os.environ.get("MLFLOW_RUN_ID") or not paths.MODEL_CARD.exists():
        return
    try:
        run_id = read_card(paths.MODEL)["run_id"]
        if run_id:
            mlproject_run.link(connect(), run_id)
    except Exception as error:  # not installed, no network, unknown: the link is a service
        warn(f"the run of `mlflow run` names no pipeline's run ({type(error).__name__}: {error})")
