"""Versions and aliases of the registered model, against a real store that MLflow's own client reads."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.served import described, params_of, write_model
from helpers.stores import client_of, close_in_time, open_run, sync, warnings

from diffusion import paths
from diffusion.code_digest import LIBRARY
from diffusion.errors import UserError
from diffusion.model.card import read_card
from diffusion.model.model_file import load_denoiser
from diffusion.pipeline import evaluate
from diffusion.sampling import generation
from diffusion.serving import logged_model, registry, server
from diffusion.tracking import mlflow_store
from diffusion.tracking.tracker import Tracker

pytest.importorskip("mlflow")

Register = Callable[..., str]


class TestVersions:
    def test_another_way_to_sample_is_another_version(self, client: Any, add: Register) -> None:
        assert [add(1, fd_lite0=300.0, steps=steps) for steps in (4, 8)] == ["1", "2"]

    def test_other_code_is_another_version(self, client: Any, add: Register) -> None:
        assert [add(1, fd_lite0=300.0 - i, code=code) for i, code in enumerate("cdc")] == ["1", "2", "1"]

    def test_other_classes_are_another_version(self, tmp_path: Path) -> None:
        ways = [params_of(**{"model.num_classes": 10, "sample.labels": labels}) for labels in ("balanced", [3], [3, 4])]
        weights = write_model(tmp_path, ways[0])
        assert len({described(weights, params)["identity"] for params in ways}) == 3

    def test_an_artifact_store_that_is_away_leaves_one_logged_model(
        self, client: Any, add: Register, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def away(*_: Any, **__: Any) -> None:
            raise ConnectionError("no bucket")

        for call in ("log_model_artifacts", "finalize_logged_model", "_create_model_version"):
            with monkeypatch.context() as patch:
                patch.setattr(type(client), call, away)
                with pytest.raises(ConnectionError):
                    add(1, fd_lite0=300.0)
        assert add(1, fd_lite0=300.0) == "1"
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        (logged,) = client.search_logged_models(experiments)
        assert str(logged.status) == "READY"
        assert logged.model_id in client.get_model_version("faces", "1").source

    def test_a_model_that_is_sent_twice_is_one_version_with_the_newest_scores(self, client: Any, add: Register) -> None:
        add(1, fd_lite0=300.0)
        add(1, fd_lite0=250.0)
        (version,) = client.search_model_versions("name = 'faces'")
        assert version.tags["fd_lite0"] == "250.0"


def test_scores_that_decide_nothing_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    card = read_card(write_model(tmp_path / "models", params_of()))
    evaluate._register("faces", card, params_of().sample.model_dump(mode="json"), "c", {"about": []}, Tracker())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: evaluate.measures lacks frechet")


def test_a_version_that_the_pipeline_did_not_register_is_not_served(client: Any, tmp_path: Path) -> None:
    client.create_registered_model("faces")
    client.create_model_version("faces", tmp_path.as_uri())
    with pytest.raises(UserError, match="version 1 of model faces is not of this pipeline"):
        server.fetch("faces", 1)


def test_experiments_may_have_names_that_models_may_not(client: Any) -> None:
    for experiment in ("team/faces", "a: b", "it's", 'the "best"'):
        name = registry.model_name(experiment)
        client.create_registered_model(name)
        assert not client.search_model_versions(f"name = '{name}' and tags.identity = 'x'")


def test_the_logged_model_generates_what_the_library_does(
    client: Any, add: Register, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded by MLflow, which finds code, weights and settings in the copy that is served."""
    import mlflow.pyfunc

    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    add(1, fd_lite0=1.0)
    params = params_of()
    there, version = server.fetch("faces", None)
    assert version == 1
    model = mlflow.pyfunc.load_model(str(there))
    answer = model.predict({"num_images": 7, "seed": 3, "format": "raw"})
    denoiser = load_denoiser(tmp_path / "model 1/model.safetensors", params.sample, torch.device("cpu"))
    expected = [*generation.generate(denoiser, params.sample, 3, range(7), torch.device("cpu"))]
    np.testing.assert_array_equal(np.array(answer["images"]), torch.cat(expected).numpy())
    assert not [p for p in there.rglob("*") if p.suffix in (".pkl", ".pickle", ".pt", ".pth")]
    assert model.metadata.signature.inputs.input_names() == ["num_images", "seed", "format"]


def test_a_model_that_was_sampled_on_another_device_runs_on_what_is_here(tmp_path: Path) -> None:
    import mlflow.pyfunc

    params = params_of()
    weights = write_model(tmp_path / "models", params)
    elsewhere = {**params.sample.model_dump(mode="json"), "device": "mps"}
    contents = logged_model.packed(tmp_path / "scratch", weights, read_card(weights), elsewhere)
    mlflow.pyfunc.save_model(tmp_path / "logged", **contents)
    answer = mlflow.pyfunc.load_model(str(tmp_path / "logged")).predict({"num_images": 2, "seed": 3, "format": "raw"})
    assert np.array(answer["images"]).shape == (2, 32, 32, 3)


class TestThroughTheJournal:
    def test_what_is_sent_later_has_the_code_that_generated(self, database: Path, tmp_path: Path) -> None:
        """Not that of the day on which the server is back."""
        params = params_of()
        weights = write_model(tmp_path / "models", params, seed=1)
        library = shutil.copytree(LIBRARY, tmp_path / "kept/diffusion")
        (library / "model/unet.py").write_text("# as it was\n" + (library / "model/unet.py").read_text())
        tracker = open_run(tmp_path / "run")
        tracker.model(weights, {**described(weights, params), "library": str(library)})
        close_in_time(tracker)
        (stored,) = (tmp_path / "ml artifacts").rglob("code/diffusion/model/unet.py")
        assert stored.read_text().startswith("# as it was")

    def test_an_absent_server_gets_the_model_later(
        self, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By then the workspace holds another model."""
        params = params_of()
        weights = write_model(tmp_path / "models", params, seed=1)
        about = described(weights, params, fd_lite0=300.0)
        first = weights.read_bytes()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        tracker = open_run(tmp_path / "run")
        tracker.model(weights, about)
        tracker.artifact(weights, "model")
        close_in_time(tracker)
        write_model(tmp_path / "models", params, seed=2)
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        client = mlflow_store.connect()
        assert sync(tmp_path / "run/journal.jsonl", client).startswith("sent 3")
        version = client.get_model_version_by_alias("faces", "champion")
        assert version.tags["identity"] == about["identity"]
        stored = list((tmp_path / "ml artifacts").rglob("model.safetensors"))
        assert len(stored) == 2
        assert all(path.read_bytes() == first for path in stored)

    def test_a_file_that_changed_all_the_same_is_refused(
        self, database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        params = params_of()
        weights = write_model(tmp_path / "run", params, seed=1)  # beside the journal, where no copy is made
        about = described(weights, params)
        write_model(tmp_path / "run", params, seed=2)
        tracker = open_run(tmp_path / "run")
        tracker.model(weights, about)
        close_in_time(tracker)
        assert any("another model by now" in line for line in warnings(capsys))
        assert not client_of(database).search_registered_models()
