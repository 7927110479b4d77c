"""`make ui`: MLflow's pages on the store that the pipeline writes to, opened on a table that says which run is best.

MLflow keeps views of an experiment that were shared in its tags; ours is one of them: runs in the order of their score,
beside it the parameters in which they differ.
"""

import json
import os
import sys
from collections import Counter
from typing import Any

import click

from diffusion import paths
from diffusion.errors import UserError
from diffusion.params_file import load
from diffusion.tracking.mlflow_store import connect, is_server, prepare_store

VIEW = "best"
SCORES = ("fid", "fd_")  # how the names of metrics begin that runs are ordered by; lower is better
TELLING = ("train.lr", "train.lr_schedule", "diffusion.schedule", "diffusion.prediction", "train.steps", "seed")
SILENT = ("device", "precision", "compile", "processes", "micro_batch", "save_png")  # what changes no result, or hardly
PARAMS = 6  # columns at most: which is better, and why, on one screen


@click.command()
@click.option("--port", default=5000, show_default=True, help="Port on 127.0.0.1.")
def main(port: int) -> None:
    """Open MLflow's pages on the pipeline's own store, or say where they are if MLFLOW_TRACKING_URI names a server."""
    server = os.environ.get("MLFLOW_TRACKING_URI", "")
    if is_server(server):
        click.echo(f"Runs are kept on a server (MLFLOW_TRACKING_URI): open {page(server.rstrip('/'))}")
        return
    store = server or prepare_store()
    click.echo(f"Runs of {store}: open {page(f'http://127.0.0.1:{port}')}   (Ctrl-C to stop)")
    serve = ["-m", "mlflow", "server", "--backend-store-uri", store, "--host", "127.0.0.1", "--port", str(port)]
    artifacts = ["--default-artifact-root", paths.MLFLOW_ARTIFACTS.absolute().as_uri()]
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")  # one worker, which stops at once
    os.execv(sys.executable, [sys.executable, *serve, *artifacts])


def page(address: str) -> str:
    """Address of the table of runs, its view brought up to date; the bare address if there are none, or no answer."""
    try:
        client = connect()
        experiment = client.get_experiment_by_name(load(paths.PARAMS).tracking.experiment)
        runs = client.search_runs([experiment.experiment_id], max_results=1000) if experiment else []
        if not runs:
            return address
        tag, value = f"mlflow.sharedViewState.{VIEW}", json.dumps(view(runs))
        if experiment.tags.get(tag) != value:
            client.set_experiment_tag(experiment.experiment_id, tag, value)
    except UserError as error:
        click.secho(f"warning: {error}", fg="yellow", err=True)
        return address
    except Exception as error:  # no network, refused: the pages may work all the same
        click.secho(f"warning: no view of the runs ({type(error).__name__}: {error})"[:200], fg="yellow", err=True)
        return address
    query = f"workflowType=machine_learning&viewStateShareKey={VIEW}"
    return f"{address}/#/experiments/{experiment.experiment_id}/runs?{query}"


def view(runs: list[Any]) -> dict[str, Any]:
    """A table as MLflow's pages (3.17) describe it: by score, the best first; metrics, then parameters that differ."""
    metrics = scores(runs)
    columns = [f"metrics.`{key}`" for key in metrics] + [f"params.`{key}`" for key in differing(runs)]
    return {
        "orderByKey": columns[0],
        "orderByAsc": True,
        "selectedColumns": columns,
        "columnOrder": ["0", "attributes.`Run Name`", *columns, "runDateAndNestInfo", "duration"],
        "columnWidths": {column: max(70, 6 * len(column.split("`")[1]) + 30) for column in columns},
    }


def scores(runs: list[Any]) -> list[str]:
    """Metrics to show: the score that most runs have, then the validation loss."""
    found = Counter(key for run in runs for key in run.data.metrics if key.startswith("evaluate/"))
    keys = sorted(found, key=lambda key: (-found[key], key))
    ranking = [key for start in SCORES for key in keys if key.removeprefix("evaluate/").startswith(start)]
    ranking = sorted(ranking, key=lambda key: -found[key])  # stable: FID first if as many have it
    return [*ranking[:1], "best/val_loss"]


def differing(runs: list[Any]) -> list[str]:
    """Parameters to show: those in which the runs differ, the most telling first; where none does, the telling ones.

    The trials of a search are not asked: they differ in what the search tries.
    """
    values: dict[str, set[str]] = {}
    for run in [run for run in runs if "optuna.trial" not in run.data.tags]:
        for key, value in run.data.params.items():
            values.setdefault(key, set()).add(value)
    differ = [key for key in values if len(values[key]) > 1 and key.split(".")[-1] not in SILENT]
    differ.sort(key=lambda key: (TELLING.index(key) if key in TELLING else len(TELLING), key))
    return differ[:PARAMS] or list(TELLING[:4])
