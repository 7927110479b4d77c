"""The run that `mlflow run` opens for the command it starts, and the pipeline's run: the same one wherever it can be.

`mlflow run` names its run in MLFLOW_RUN_ID. A new training makes it the pipeline's run. What goes on with an older one
(a resumed training, a later stage) leaves a link to that in it. Runs that `mlflow run` did not open are never touched.
"""

import os
import re
from typing import Any

from diffusion.tracking.mlflow_store import is_refusal
from diffusion.tracking.tracker import warn

RANDOM_NAME = re.compile(r"[a-z]+-[a-z]+-\d+")  # MLflow's own, where `mlflow run` was given no --run-name


def adopt(client: Any, experiment: str, name: str) -> str | None:
    """Id of the run that waits to be a new pipeline's, called `name` unless the user named it; None if none does."""
    run = _opened(client)
    if run is None or run.info.status != "RUNNING" or "host" in run.data.tags:  # a training has entered it already
        return None
    run_id = str(run.info.run_id)
    if RANDOM_NAME.fullmatch(run.info.run_name or ""):
        client.update_run(run_id, name=name)
    place = client.get_experiment(run.info.experiment_id).name
    if place != experiment:
        warn(f"this run is in experiment {place}: `mlflow run --experiment-name {experiment}` puts it with the others")
    return run_id


def link(client: Any, run_id: str) -> None:
    """Let the run that `mlflow run` opened say that the command wrote to `run_id`, if that is another."""
    opened = _opened(client)
    if opened is None:
        if unused := [name for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID") if os.environ.get(name)]:
            warn(f"{' and '.join(unused)} not used: a pipeline has its own run, in MLFLOW_EXPERIMENT_NAME's experiment")
        return
    if opened.info.status != "RUNNING" or opened.info.run_id == run_id:
        return
    target = client.get_run(run_id).info
    address = f"#/experiments/{target.experiment_id}/runs/{run_id}"
    client.set_tag(opened.info.run_id, "pipeline.run_id", run_id)
    client.set_tag(opened.info.run_id, "mlflow.note.content", f"Wrote to run [{target.run_name}]({address}).")


def _opened(client: Any) -> Any | None:
    """The run of MLFLOW_RUN_ID if `mlflow run` opened it in this store; RUNNING while it waits for its command."""
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if not run_id:
        return None
    try:
        run = client.get_run(run_id)
    except Exception as error:
        if not is_refusal(error):
            raise
        return None  # of another store
    return run if "mlflow.project.entryPoint" in run.data.tags else None
