"""Which code, data, parameters and run made a model, and what came of it.

A model file is explained by the cards beside it, without a server; a run id by MLflow's store and the local folders.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from diffusion import paths
from diffusion.config import flat, trained_from_dict
from diffusion.errors import UserError, brief
from diffusion.tracking.journal import JOURNAL, remembered

Row = tuple[str, object]


def of_model(path: Path, card: Mapping[str, Any]) -> list[Row]:
    """What the model's card says, and the samples and scores in the working folder that were made from it."""
    rows: list[Row] = [("model", path)]
    rows += [(key, card.get(key)) for key in ("weights", "step", "val_loss", "data_digest", "fingerprint", "run_id")]
    rows += sorted(card.get("origin", {}).items())
    rows += sorted(flat(trained_from_dict(card["config"])).items())
    samples = _json(paths.SAMPLES_CARD)
    if samples.get("fingerprint") == card["fingerprint"] and samples.get("run_id") == card["run_id"]:
        keys = ("sampler", "steps", "spacing", "network_evaluations")
        rows.append(("samples", f"{paths.SAMPLES}: {', '.join(f'{key} {samples.get(key)}' for key in keys)}"))
        scores = {key: value for key, value in _json(paths.EVALUATE_METRICS).items() if key != "about"}
        rows += [(f"evaluate/{key}", value) for key, value in scores.items()]
    return rows


def of_run(run_id: str) -> list[Row]:
    """The files of a run: in MLflow's store, and in this checkout.

    Raises:
        UserError: the store does not answer, or has no such run.
    """
    from diffusion.tracking.mlflow_store import connect

    try:
        client = connect()
        run = client.get_run(run_id)
        kept = _files(client, run_id, "")
    except Exception as error:  # not installed, no network, unknown
        raise UserError(f"no run {run_id} ({brief(error, 160)}): give a run id, or a .safetensors file") from None
    rows: list[Row] = [("run", run.info.run_name), ("status", run.info.status), ("store", run.info.artifact_uri)]
    rows += [("artifact", path) for path in kept]
    rows += [("journal", memory.parent) for memory in _remembered(run_id)]
    here = {paths.MODEL: _json(paths.MODEL_CARD), paths.SAMPLES: _json(paths.SAMPLES_CARD)}
    return rows + [("here", path) for path, card in here.items() if card.get("run_id") == run_id]


def _files(client: Any, run_id: str, folder: str) -> list[str]:
    found: list[str] = []
    for item in client.list_artifacts(run_id, folder or None):
        found += _files(client, run_id, item.path) if item.is_dir else [item.path]
    return found


def _remembered(run_id: str) -> list[Path]:
    return [path for path in sorted(paths.RUNS.glob(f"*/{JOURNAL}")) if remembered(path) == run_id]


def _json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        click.secho(f"warning: {path} is left out: {' '.join(str(error).split())}", fg="yellow", err=True)
        return {}
    return content
