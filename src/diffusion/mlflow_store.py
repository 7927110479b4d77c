"""MLflow's client: the only module that imports it. Which store, which run, and how events are written to it."""

import json
import logging
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import psutil
from filelock import FileLock

from diffusion import paths
from diffusion.journal import Event, warn
from diffusion.outbox import POINTS_PER_BATCH, is_refusal

CREATE_SECONDS = 120.0  # for another process to make the database
TRAINING_PAGES = {"mlflow.experimentKind": "custom_model_development"}  # else `make ui` opens on pages for LLMs
PAIRS_PER_BATCH = 100  # MLflow's limits
PARAM_CHARS = 6000
TAG_CHARS = 8000


class RunWriter:
    """Writes events to one run; sending one twice changes nothing. Raises what MLflow's client raises."""

    def __init__(self, client: Any, run_id: str) -> None:
        self._client, self.run_id = client, run_id

    def send(self, batch: list[Event]) -> None:
        """Write metric events, or one event of another kind."""
        from mlflow.entities import Metric, Param, RunTag

        kind, data = batch[0].kind, batch[0].data
        if kind == "metrics":
            points = [Metric(k, v, e.time, e.data["step"]) for e in batch for k, v in e.data["values"].items()]
            self._log("metrics", points, POINTS_PER_BATCH)
        elif kind == "params":
            known = self._client.get_run(self.run_id).data.params  # a second, different value would be refused
            new = [Param(key, _text(value)[:PARAM_CHARS]) for key, value in data.items() if key not in known]
            self._log("params", new, PAIRS_PER_BATCH)
        elif kind == "tags":
            self._log("tags", [RunTag(key, value[:TAG_CHARS]) for key, value in data.items()], PAIRS_PER_BATCH)
        elif kind == "close":
            if data["message"]:
                self._client.set_tag(self.run_id, "error", data["message"][:TAG_CHARS])
            self._client.set_terminated(self.run_id, data["status"], batch[0].time)

    def _log(self, kind: str, entities: list[Any], most: int) -> None:
        for start in range(0, len(entities), most):
            self._client.log_batch(self.run_id, **{kind: entities[start : start + most]}, synchronous=True)

    def upload(self, batch: list[Event]) -> None:
        path, folder = Path(batch[0].data["path"]), batch[0].data["folder"] or None
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        log(self.run_id, str(path), folder)


def connect() -> Any:
    """MLflow's client of the store; quiet, and quick to give up, unless the user's environment says otherwise."""
    wishes = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    }
    for key, value in wishes.items():  # read when mlflow is imported
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient

    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it announces every retry
    return MlflowClient(_anchored(os.environ.get("MLFLOW_TRACKING_URI", "")) or prepare_store())


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
    client.update_run(found, status="RUNNING")
    client.log_batch(found, tags=[RunTag(key, value) for key, value in tags.items()], synchronous=True)
    if "error" in run.data.tags:
        client.delete_tag(found, "error")
    return str(found)


def signature() -> dict[str, str]:
    """Tags by which this process can be told to be alive."""
    started = psutil.Process().create_time()
    return {"host": socket.gethostname(), "pid": str(os.getpid()), "pid.started": f"{started:.0f}"}


def is_alive(tags: Mapping[str, str]) -> bool:
    """Whether the process of these tags (see `signature`) runs; those of other hosts are taken to."""
    if tags.get("host") != socket.gethostname() or not tags.get("pid", "").isdigit():
        return True
    try:
        started = psutil.Process(int(tags["pid"])).create_time()
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
    local = not client.tracking_uri.startswith(("http:", "https:", "databricks"))
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


def _text(value: object) -> str:
    """A parameter as params.yaml spells it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
