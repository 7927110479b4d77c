"""Which MLflow store and which run; what a store is told, mlflow_writer.py says."""

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import requests
from filelock import FileLock

from diffusion import paths
from diffusion.errors import UserError, checked_url
from diffusion.tracking.journal import JOURNAL, end_dead
from diffusion.tracking.tracker import warn

ALIVE_SECONDS = 2.0  # for the answer to a short request
CREATE_SECONDS = 120.0  # for another process to make the database
TRAINING_PAGES = {"mlflow.experimentKind": "custom_model_development"}  # else `make ui` opens on pages for LLMs


def connect() -> Any:
    """MLflow's client of the store; quiet, and quick to give up, unless the user's environment says otherwise.

    Raises:
        UserError: MLFLOW_TRACKING_URI is no address.
    """
    wishes = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    }
    for key, value in wishes.items():  # read when mlflow is imported
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient

    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it announces every retry
    return MlflowClient(tracking_uri() or prepare_store())


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, a relative SQLite file below the repository; empty if it is not set.

    Raises:
        UserError: it is no address that MLflow takes, or its password cannot be told from its host.
    """
    uri = checked_url("MLFLOW_TRACKING_URI", os.environ.get("MLFLOW_TRACKING_URI", ""))
    if uri and (uri.startswith("file:") or not (re.match(r"[\w+.-]+://", uri) or uri.startswith("databricks"))):
        raise UserError(
            f"MLFLOW_TRACKING_URI = {uri} is no store: give http://HOST:PORT of a server or sqlite:///FILE, or unset "
            f"it for this project's own {paths.MLFLOW_DB.name} (MLflow 3 keeps no runs in folders)"
        )
    file = uri.removeprefix("sqlite:///")  # as `mlflow run` names its own, also in DVC's temporary folders
    return _sqlite(paths.ROOT / file) if file not in ("", uri) else uri


def is_server(uri: str) -> bool:
    """Whether a tracking URI names a server, which has artifacts of its own, and no database."""
    return uri.startswith(("http:", "https:", "databricks"))


def answers(client: Any) -> bool:
    """Whether the store is there, however slow: what is no server is, and a server that answers a short request."""
    uri = client.tracking_uri
    if not uri.startswith(("http:", "https:")):
        return True
    try:
        requests.get(f"{uri.rstrip('/')}/health", timeout=ALIVE_SECONDS)
    except requests.exceptions.SSLError:  # it does, by a certificate that MLflow's own variables may allow
        return True
    except requests.RequestException:
        return False
    return True


class UnreadableError(Exception):
    """A file on this machine cannot be read, so that it can never be sent."""


def is_refusal(error: Exception) -> bool:
    """Whether asking again would give the same answer."""
    codes = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE")
    bugs = (UnreadableError, FileNotFoundError, TypeError, AttributeError, LookupError, UnicodeError)
    return isinstance(error, bugs) or getattr(error, "error_code", None) in codes


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


def _sqlite(path: Path) -> str:
    return f"sqlite:///{path.as_posix()}"


def enter(client: Any, experiment: str, run_id: str | None, name: str, tags: Mapping[str, str]) -> str:
    """Id of the run to write to, its status RUNNING."""
    from mlflow.entities import RunTag

    experiment_id = _experiment(client, experiment)
    close_dead_runs(client)
    run = _known(client, experiment_id, run_id) if run_id else None
    if run is None:
        link = {"linked_run_id": run_id} if run_id else {}
        return str(client.create_run(experiment_id, run_name=name, tags={**tags, **link}).info.run_id)
    found = run.info.run_id
    project = "mlflow.project.entryPoint" in run.data.tags  # `mlflow run` has said where it puts its runs
    if run.info.experiment_id != experiment_id and not project:
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


def close_dead_runs(client: Any) -> None:
    """End the runs of this folder's journals whose process is gone (SIGKILL, power cut) as KILLED."""
    for path in paths.RUNS.glob(f"*/{JOURNAL}"):
        for session in end_dead(path):
            run_id = session.run_id
            if run_id and has_run(client, run_id) and client.get_run(run_id).info.status == "RUNNING":
                client.set_terminated(run_id, "KILLED")


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
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"experiment {name} was deleted: `mlflow experiments restore --experiment-id {found.experiment_id}` brings "
            "it back; or name another in tracking.experiment"
        )
    location = urlparse(found.artifact_location)
    if local and location.scheme in ("", "file"):
        folder = Path(url2pathname(location.path))
        if folder != paths.MLFLOW_ARTIFACTS.absolute() and not folder.exists():
            warn(f"experiment {name} keeps its files in {folder}, which does not exist: it is made")
    return str(found.experiment_id)
