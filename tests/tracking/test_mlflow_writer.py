"""What an MLflow store holds after events were written to it, once or twice; against a real store."""

from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from helpers.stores import client_of, close_in_time, open_run, sync, warnings
from PIL import Image

from diffusion.tracking import mlflow_store, mlflow_writer
from diffusion.tracking.journal import Journal, read_journal, remembered
from diffusion.tracking.mlflow_writer import RunWriter, SystemMetrics

pytest.importorskip("mlflow")


def artifact_repository(place: str) -> Any:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    return get_artifact_repository(place)


def picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (300, 600, 3), dtype=np.uint8)).save(path)
    return path


def send_again(journal: Path, run_id: str) -> None:
    """As a replay does whose mark was lost."""
    writer = RunWriter(mlflow_store.connect(), run_id)
    for event in read_journal(journal):
        if event.kind not in ("open", "close", "sent"):
            writer.write([event])


def stored(database: Path, run_id: str, folder: str) -> list[str]:
    return [file.path for file in client_of(database).list_artifacts(run_id, folder)]


def test_pictures_of_a_key_are_what_mlflow_itself_would_log(database: Path, tmp_path: Path) -> None:
    """Names and sizes against MlflowClient.log_image's; a picture that is sent twice is one picture."""
    tracker = open_run(tmp_path / "run")
    path = picture(tmp_path / "run/a.png")
    tracker.image(path, "samples/first", 600)
    close_in_time(tracker)
    assert tracker.run_id
    send_again(tmp_path / "run/journal.jsonl", tracker.run_id)
    mine = stored(database, tracker.run_id, "images")
    client = client_of(database)
    theirs = client.create_run(client.get_run(tracker.run_id).info.experiment_id).info.run_id
    (event,) = [event for event in read_journal(tmp_path / "run/journal.jsonl") if event.kind == "image"]
    client.log_image(theirs, Image.open(path), key="samples/first", step=600, timestamp=event.time)
    expected = stored(database, theirs, "images")
    assert len(mine) == len(expected) == 2  # the picture and its thumbnail

    def without_random_part(names: list[str]) -> list[list[str]]:
        return sorted([*name.split("+")[:5], Path(name).suffix] for name in names)

    assert without_random_part(mine) == without_random_part(expected)
    files = tmp_path / "ml artifacts" / tracker.run_id / "artifacts"
    (full,) = files.rglob("*.png")
    (small,) = files.rglob("*.webp")
    assert full.read_bytes() == path.read_bytes()
    assert Image.open(small).size == (256, 128)
    tags = [client.get_run(run).data.tags["mlflow.loggedImages"] for run in (tracker.run_id, theirs)]
    assert tags[0] == tags[1]


def test_the_dataset_is_an_input_of_the_run_once(database: Path, tmp_path: Path) -> None:
    tracker = open_run(tmp_path / "run")
    tracker.dataset("cifar10", "0123456789abcdef" * 4, "data/cifar10")
    close_in_time(tracker)
    assert tracker.run_id
    send_again(tmp_path / "run/journal.jsonl", tracker.run_id)
    (found,) = client_of(database).get_run(tracker.run_id).inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest) == ("cifar10", ("0123456789abcdef" * 4)[:36])
    assert [(tag.key, tag.value) for tag in found.tags] == [("mlflow.data.context", "training")]


def test_a_file_is_kept_as_it_was(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is away; when it is back, a later stage has written another file in the same place."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    (tmp_path / "plots").mkdir()
    curve = tmp_path / "plots/loss.csv"
    curve.write_text("of this run")
    figures = tmp_path / "figures"
    picture(figures / "a.png")
    tracker = open_run(tmp_path / "run")
    tracker.artifact(curve, "curves")
    tracker.artifact(figures, "drawn")
    close_in_time(tracker)
    curve.write_text("of another")
    (figures / "a.png").unlink()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    sync(tmp_path / "run/journal.jsonl")
    run_id = remembered(tmp_path / "run/journal.jsonl")
    assert run_id
    files = tmp_path / "ml artifacts" / run_id / "artifacts"
    assert (files / "curves/loss.csv").read_text() == "of this run"
    assert (files / "drawn/a.png").exists()


def test_what_lies_beside_the_journal_is_not_copied(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run/journal.jsonl")
    mine = picture(tmp_path / "run/previews/step.png")
    assert journal.keep(mine, "previews") == mine
    assert journal.keep(tmp_path / "missing.png", "previews") == tmp_path / "missing.png"
    assert not (tmp_path / "run/artifacts").exists()


def test_system_metrics_have_mlflows_names_and_psutils_values(monkeypatch: pytest.MonkeyPatch) -> None:
    system = SystemMetrics(wanted=True)
    read = system.read()
    assert {"system/cpu_utilization_percentage", "system/disk_usage_megabytes"} <= set(read)
    used = psutil.virtual_memory().used / 1e6
    assert read["system/system_memory_usage_megabytes"] == pytest.approx(used, rel=0.2)
    assert system.read() == {}  # not again within seconds
    assert SystemMetrics(wanted=False).read() == {}
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    assert SystemMetrics(wanted=True).read() == {}


def test_a_monitor_that_fails_is_dropped_and_named_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "/proc/stat")

    monkeypatch.setattr(mlflow_writer, "SYSTEM_SECONDS", 0.0)
    monkeypatch.setattr(psutil, "net_io_counters", lambda *_, **__: None)  # as where there is no network
    system = SystemMetrics(wanted=True)
    assert "system/cpu_utilization_percentage" in system.read()
    monkeypatch.setattr(psutil, "cpu_percent", refuse)
    for _ in range(2):
        read = system.read()
        assert "system/disk_usage_megabytes" in read
        assert "system/cpu_utilization_percentage" not in read
    said = [line.split("(")[0] for line in warnings(capsys)]
    assert said == [f"tracking: no system metrics of {name} " for name in ("NetworkMonitor", "CPUMonitor")]
