"""How events become an MLflow run's points, parameters, files, pictures and models, and what the system metrics are."""

import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion.errors import brief
from diffusion.tracking.mlflow_store import UnreadableError
from diffusion.tracking.tracker import Event, warn

POINTS_PER_BATCH = 1000  # MLflow's limits
PAIRS_PER_BATCH = 100
PARAM_CHARS = 6000
TAG_CHARS = 8000
DIGEST_CHARS = 36
SYSTEM_SECONDS = 10.0
THUMBNAIL = 256  # pixels

Register = Callable[[Any, str, Path, Mapping[str, Any]], None]  # client, run id, weights, what is known of the model


class RunWriter:
    """Writes events to one run; sending one twice changes nothing. Raises what MLflow's client raises."""

    def __init__(self, client: Any, run_id: str, register: Register | None = None) -> None:
        """`register` writes models; without it an event that has one is kept in the journal."""
        self.client, self.run_id, self._register = client, run_id, register

    def write(self, batch: list[Event]) -> None:
        """Write metric events, or one event of another kind."""
        from mlflow.entities import Metric, RunTag

        kind, data = batch[0].kind, batch[0].data
        if kind == "metrics":
            points = [Metric(k, v, e.time, e.data["step"]) for e in batch for k, v in e.data["values"].items()]
            self._log("metrics", points, POINTS_PER_BATCH)
        elif kind == "params":
            self._log_params({key: _text(value)[:PARAM_CHARS] for key, value in data.items()})
        elif kind == "tags":
            self._log("tags", [RunTag(key, value[:TAG_CHARS]) for key, value in data.items()], PAIRS_PER_BATCH)
        elif kind == "dataset":
            self._log_dataset(data)
        elif kind == "close":
            self._close(data, batch[0].time)
        else:
            self._upload(batch[0])

    def _close(self, data: Mapping[str, Any], time: int) -> None:
        if data["message"]:
            self.client.set_tag(self.run_id, "error", data["message"][:TAG_CHARS])
        elif data["status"] == "FINISHED" and "error" in self.client.get_run(self.run_id).data.tags:
            self.client.delete_tag(self.run_id, "error")
        self.client.set_terminated(self.run_id, data["status"], time)

    def _log(self, kind: str, entities: list[Any], most: int) -> None:
        for start in range(0, len(entities), most):
            self.client.log_batch(self.run_id, **{kind: entities[start : start + most]}, synchronous=True)

    def _log_params(self, texts: Mapping[str, str]) -> None:
        """Write parameters; those that the run has with another value, which MLflow keeps, as tags now.<key>."""
        from mlflow.entities import Param, RunTag

        run = self.client.get_run(self.run_id).data
        self._log("params", [Param(key, text) for key, text in texts.items() if key not in run.params], PAIRS_PER_BATCH)
        last = {key: run.tags.get(f"now.{key}", value) for key, value in run.params.items()}
        changed = {key: text for key, text in texts.items() if last.get(key, text) != text}
        self._log("tags", [RunTag(f"now.{key}", text) for key, text in changed.items()], PAIRS_PER_BATCH)
        if changed:
            values = ", ".join(f"{key} is {text[:40]} now, not {last[key][:40]}" for key, text in changed.items())
            warn(f"{values}: MLflow keeps a run's first parameters, so this is in its tags now.*")

    def _log_dataset(self, data: Mapping[str, str]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(data["name"], data["digest"][:DIGEST_CHARS], "local", json.dumps({"uri": data["source"]}))
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    def _upload(self, event: Event) -> None:
        path = Path(event.data["path"])
        _check_readable(path)
        if event.kind == "model":
            if self._register is None:
                raise UnreadableError("nothing registers models here")
            self._register(self.client, self.run_id, path, event.data)
        elif event.kind == "image":
            self._log_image(path, event)
        else:
            log = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
            log(self.run_id, str(path), event.data["folder"] or None)

    def _log_image(self, path: Path, event: Event) -> None:
        """As MlflowClient.log_image, whose random names would make two pictures of one that is sent twice."""
        key = event.data["key"].replace("/", "~")
        identity = uuid.uuid5(uuid.NAMESPACE_URL, f"{self.run_id} {key} {event.data['step']} {event.time}")
        name = f"{key}+step+{event.data['step']}+timestamp+{event.time}+{identity}"
        try:
            with Image.open(path) as picture:
                small = picture.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UnreadableError(f"{path} is no picture: {error}") from None
        with tempfile.TemporaryDirectory() as folder:
            shutil.copyfile(path, Path(folder) / f"{name}.png")
            small.thumbnail((THUMBNAIL, THUMBNAIL))
            small.save(Path(folder) / f"{name}+compressed.webp")
            self.client.log_artifacts(self.run_id, folder, "images")
        self.client.set_tag(self.run_id, "mlflow.loggedImages", True)


class SystemMetrics:
    """CPU, memory, disk, network and (with nvidia-ml-py) GPUs, as MLflow's own monitors read and name them.

    They are read here, and not by MLflow's thread, so that the journal has them too.
    """

    def __init__(self, *, wanted: bool) -> None:
        self._monitors: list[Any] = []
        self._next = 0.0
        if not wanted or os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "").lower() in ("false", "0"):
            return
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
            try:
                self._monitors.append(kind())
            except Exception as error:
                if kind is not GPUMonitor or not isinstance(error, ImportError | RuntimeError):  # no GPU, or no library
                    _say_blind(kind, error)
        self._collect()  # the first share of CPU time is meaningless

    def read(self) -> dict[str, float]:
        """system/... -> value, every SYSTEM_SECONDS; nothing in between."""
        if not self._monitors or time.monotonic() < self._next:
            return {}
        self._next = time.monotonic() + SYSTEM_SECONDS
        return self._collect()

    def _collect(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for monitor in list(self._monitors):
            try:
                monitor.collect_metrics()
                found |= {f"system/{key}": float(value) for key, value in monitor.aggregate_metrics().items()}
                monitor.clear_metrics()
            except Exception as error:  # a container without /proc, a driver that is gone: no reason to stop
                _say_blind(type(monitor), error)
                self._monitors.remove(monitor)
        return found


def _say_blind(kind: type, error: Exception) -> None:
    warn(f"no system metrics of {kind.__name__} ({brief(error)})")


def _check_readable(path: Path) -> None:
    """Raises UnreadableError unless the file, or every file in the folder, can be opened."""
    try:
        for file in [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]:
            file.open("rb").close()
    except OSError as error:
        raise UnreadableError(f"{error.filename}: {error.strerror}") from None


def _text(value: object) -> str:
    """A parameter as params.yaml spells it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
