"""Which MLflow store and which run; what a store is told, mlflow_writer.py says."""

import logging
import os
import re
import socket
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import psutil
from filelock import FileLock

from diffusion import paths
from diffusion.tracking.journal import warn
from diffusion.tracking.retry_queue import is_refusal

FILE_SECONDS = 300  # for the answer to an upload
CREATE_SECONDS = 120.0  # for another process to make the database
TRAINING_PAGES = {"mlflow.experimentKind": "custom_model_development"}  # else `make ui` opens on pages for LLMs


def connect() -> Any:
    """MLflow's client of the store; quiet, and quick to give up, unless the user's environment says otherwise."""
    wishes = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    }
    for key, value in wishes.items():  # read when mlflow is imported
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient

    _give_files_time()
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it announces every retry
    return MlflowClient(_anchored(os.environ.get("MLFLOW_TRACKING_URI", "")) or prepare_store())


def _give_files_time() -> None:
    """Let uploads and downloads take FILE_SECONDS: MLflow has one timeout for them and for the short requests."""
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT
    from mlflow.store.artifact import http_artifact_repo
    from mlflow.utils.rest_utils import http_request

    seconds = max(FILE_SECONDS, MLFLOW_HTTP_REQUEST_TIMEOUT.get())
    vars(http_artifact_repo)["http_request"] = partial(http_request, timeout=seconds)


def is_server(uri: str) -> bool:
    """Whether a tracking URI names a server, which has artifacts of its own, and no database."""
    return uri.startswith(("http:", "https:", "databricks"))


def is_embedded(uri: str) -> bool:
    """Whether a tracking URI names a file of this machine: what it is slow at comes to an end."""
    return uri.startswith("sqlite:")


def prepare_store() -> str:
    """URI of the repository's own store, its tables made if need be."""
    _create_database(paths.MLFLOW_DB.absolute())
    return _sqlite(paths.MLFLOW_DB.absolute())


def _create_database(path: Path) -> None:
    """Let MLflow make its tables aside, then move the file into place.

    Two processes that make them in one file at once, or one that is killed meanwhile, leave a database that MLflow
    (3.17) never opens again.
    """
    from mlflow import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=CREATE_SECONDS):
        if not path.exists():
            new = Path(f"{path}.new")
            new.unlink(missing_ok=True)
            MlflowClient(_sqlite(new)).search_experiments(max_results=1)
            new.replace(path)


def _anchored(uri: str) -> str:
    """A relative SQLite file, as `mlflow run` names its own, means the repository's also in DVC's temporary folders."""
    scheme, file = uri[:10], uri[10:]
    return _sqlite(paths.ROOT / file) if scheme == "sqlite:///" and file else uri


def _sqlite(path: Path) -> str:
    return f"sqlite:///{path.as_posix()}"


def enter(client: Any, experiment: str, run_id: str | None, name: str, tags: Mapping[str, str]) -> str:
    """Id of the run to write to, its status RUNNING."""
    from mlflow.entities import RunTag

    experiment_id = _experiment(client, experiment)
    close_dead_runs(client, experiment_id)
    run = _known(client, experiment_id, run_id) if run_id else None
    if run is None:
        link = {"linked_run_id": run_id} if run_id else {}
        return str(client.create_run(experiment_id, run_name=name, tags={**tags, **link}).info.run_id)
    found = run.info.run_id
    if run.info.experiment_id != experiment_id:
        close_dead_runs(client, run.info.experiment_id)
        if "mlflow.project.entryPoint" not in run.data.tags:  # `mlflow run` has said where it puts its runs
            place = client.get_experiment(run.info.experiment_id).name
            warn(f"this training's run {found} stays in experiment {place}; {experiment} is for new ones")
    client.update_run(found, status="RUNNING")
    client.log_batch(found, tags=[RunTag(key, value) for key, value in tags.items()], synchronous=True)
    if "error" in run.data.tags:
        client.delete_tag(found, "error")
    return str(found)


def has_run(client: Any, run_id: str) -> bool:
    """Whether the store has the run, and not as one that was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if not is_refusal(error):
            raise
        return False


def signature() -> dict[str, str]:
    """Tags by which this process can be told to be alive."""
    started = psutil.Process().create_time()
    return {"host": socket.gethostname(), "pid": str(os.getpid()), "pid.started": f"{started:.0f}"}


def is_alive(tags: Mapping[str, str]) -> bool:
    """Whether the process of these tags (see `signature`) runs; those of other hosts are taken to."""
    if tags.get("host") != socket.gethostname() or not tags.get("pid", "").isdigit():
        return True
    try:
        process = psutil.Process(int(tags["pid"]))
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        started = process.create_time()
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True
    return abs(started - float(tags.get("pid.started", started))) < 2  # else the number has been given anew


def close_dead_runs(client: Any, experiment_id: str) -> None:
    """End the RUNNING runs of this host whose process is gone (SIGKILL, power cut) as KILLED."""
    host = socket.gethostname().replace("'", "")
    query = f"attributes.status = 'RUNNING' and tags.host = '{host}'"
    for run in client.search_runs([experiment_id], query, max_results=1000):
        if not is_alive(run.data.tags):
            client.set_terminated(run.info.run_id, "KILLED")


def _known(client: Any, experiment_id: str, run_id: str) -> Any | None:
    """The run, or one that stands for it here; None if the store has neither."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if not is_refusal(error):
            raise
    else:
        if run.info.lifecycle_stage == "active":
            return run
    if not re.fullmatch(r"[\w-]+", run_id):  # it would not survive the quotes
        return None
    return next(iter(client.search_runs([experiment_id], f"tags.linked_run_id = '{run_id}'", max_results=1)), None)


def _experiment(client: Any, name: str) -> str:
    """Id of the experiment, created if need be; in a database of our own its files go below paths.MLFLOW_ARTIFACTS."""
    local = not is_server(client.tracking_uri)
    found = client.get_experiment_by_name(name)
    if found is None:
        if local:
            paths.MLFLOW_ARTIFACTS.mkdir(parents=True, exist_ok=True)
        try:
            location = paths.MLFLOW_ARTIFACTS.absolute().as_uri() if local else None
            return str(client.create_experiment(name, artifact_location=location, tags=TRAINING_PAGES))
        except Exception:
            found = client.get_experiment_by_name(name)  # another process may have been first
            if found is None:
                raise
    location = urlparse(found.artifact_location)
    if local and location.scheme in ("", "file"):
        folder = Path(url2pathname(location.path))
        if folder != paths.MLFLOW_ARTIFACTS.absolute() and not folder.exists():
            warn(f"experiment {name} keeps its files in {folder}, which is gone (moved?): they are written there anew")
    return str(found.experiment_id)
