"""How events become an MLflow run's points, parameters, files, pictures and models, and what the system metrics are."""

import json
import shutil
import tempfile
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion import registry
from diffusion.journal import Event
from diffusion.outbox import POINTS_PER_BATCH

PAIRS_PER_BATCH = 100  # MLflow's limits
PARAM_CHARS = 6000
TAG_CHARS = 8000
DIGEST_CHARS = 36
SYSTEM_SECONDS = 10.0
THUMBNAIL = 256  # pixels


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
        elif kind == "dataset":
            self._log_dataset(data)
        elif kind == "close":
            if data["message"]:
                self._client.set_tag(self.run_id, "error", data["message"][:TAG_CHARS])
            self._client.set_terminated(self.run_id, data["status"], batch[0].time)

    def _log(self, kind: str, entities: list[Any], most: int) -> None:
        for start in range(0, len(entities), most):
            self._client.log_batch(self.run_id, **{kind: entities[start : start + most]}, synchronous=True)

    def _log_dataset(self, data: Mapping[str, str]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(data["name"], data["digest"][:DIGEST_CHARS], "local", json.dumps({"uri": data["source"]}))
        self._client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    def upload(self, batch: list[Event]) -> None:
        """Write one event that has a file."""
        event, path = batch[0], Path(batch[0].data["path"])
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        if event.kind == "model":
            registry.register(self._client, self.run_id, path, event.data)
        elif event.kind == "image":
            self._log_image(path, event)
        else:
            log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
            log(self.run_id, str(path), event.data["folder"] or None)

    def _log_image(self, path: Path, event: Event) -> None:
        """As MlflowClient.log_image, whose random names would make two pictures of one that is sent twice."""
        key = event.data["key"].replace("/", "~")
        identity = uuid.uuid5(uuid.NAMESPACE_URL, f"{self.run_id} {key} {event.data['step']} {event.time}")
        name = f"{key}+step+{event.data['step']}+timestamp+{event.time}+{identity}"
        with tempfile.TemporaryDirectory() as folder:
            shutil.copyfile(path, Path(folder) / f"{name}.png")
            with Image.open(path) as picture:
                small = picture.convert("RGB")
            small.thumbnail((THUMBNAIL, THUMBNAIL))
            small.save(Path(folder) / f"{name}+compressed.webp")
            self._client.log_artifacts(self.run_id, folder, "images")
        self._client.set_tag(self.run_id, "mlflow.loggedImages", True)


class SystemMetrics:
    """CPU, memory, disk, network and (with nvidia-ml-py) GPUs, as MLflow's own monitors read and name them.

    They are read here, and not by MLflow's thread, so that the journal has them too.
    """

    def __init__(self, *, wanted: bool) -> None:
        self._monitors: list[Any] = []
        self._next = 0.0
        if not wanted:
            return
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
            with suppress(ImportError, RuntimeError):  # a GPU's alone: no GPU here, or not the library to ask it
                self._monitors.append(kind())
        self._collect()  # the first share of CPU time is meaningless

    def read(self) -> dict[str, float]:
        """system/... -> value, every SYSTEM_SECONDS; nothing in between."""
        if not self._monitors or time.monotonic() < self._next:
            return {}
        self._next = time.monotonic() + SYSTEM_SECONDS
        return {f"system/{key}": float(value) for key, value in self._collect().items()}

    def _collect(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            found |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return found


def _text(value: object) -> str:
    """A parameter as params.yaml spells it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
