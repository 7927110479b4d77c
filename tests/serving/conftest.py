"""A store with registered models, for the tests of serving."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.served import described, params_of, write_model

from diffusion.serving import registry
from diffusion.tracking import mlflow_store

Register = Callable[..., str]


@pytest.fixture
def client(database: Path) -> Any:
    return mlflow_store.connect()


@pytest.fixture
def add(client: Any, tmp_path: Path) -> Register:
    """Register random weights, a seed each, with the given scores: the version's number."""
    run = client.create_run(client.create_experiment("e", artifact_location=(tmp_path / "store").as_uri()))

    def made(seed: int, of: str = "", steps: int = 4, code: str = "c", through: Any = client, **scores: float) -> str:
        params = params_of(**{"sample.steps": steps})
        weights = tmp_path / f"model {seed}/model.safetensors"
        if not weights.exists():
            write_model(weights.parent, params, seed)
        about = described(weights, params, code, **scores)
        for score in about["scores"]:
            score["of"] += of
        registry.register(through, run.info.run_id, weights, about)
        versions = client.search_model_versions("name = 'faces'")
        return next(str(v.version) for v in versions if v.tags["identity"] == about["identity"])

    return made
