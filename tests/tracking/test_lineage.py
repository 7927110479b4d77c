"""Lineage of a model that the real stages made, with a real MLflow store and without one."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from helpers.commands import run_all, write_params

from diffusion import params_file, paths
from diffusion.pipeline import commands
from diffusion.tracking import provenance

pytest.importorskip("mlflow")


def explain(*arguments: str) -> Result:
    return CliRunner().invoke(commands.lineage, arguments, catch_exceptions=False)


def rows(result: Result) -> dict[str, str]:
    assert result.exit_code == 0, result.output
    return dict(line.split(maxsplit=1) for line in result.output.splitlines() if " " in line.strip())


def test_a_model_says_what_made_it_and_what_came_of_it(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_params(**{"tracking.enabled": True})
    run_all("prepare", "reference", "train", "sample", "evaluate")
    card = json.loads(paths.MODEL_CARD.read_text())
    found = rows(explain())
    assert found["run_id"] == card["run_id"]
    assert found["data_digest"] == json.loads(paths.DATA_CARD.read_text())["digest"]
    assert found["train.lr"] == str(params_file.load("params.yaml").train.lr)
    assert found["params.digest"] == card["origin"]["params.digest"]
    assert found["versions"].startswith("python 3")
    assert float(found["evaluate/fd_lite0_12"]) == json.loads(paths.EVALUATE_METRICS.read_text())["fd_lite0_12"]
    of_run = explain(card["run_id"])
    assert of_run.exit_code == 0, of_run.output
    for path in ("model/model.safetensors", "samples/grid.png", "curves/loss.csv"):
        assert path in of_run.output
    for folder in (card["fingerprint"], "samples"):
        assert folder in of_run.output
    tags = rows_of_tags(card["run_id"])
    assert {f"seconds.{stage}" for stage in ("train", "sample", "evaluate")} <= set(tags)
    assert tags["params.digest"] == card["origin"]["params.digest"]


def rows_of_tags(run_id: str) -> dict[str, str]:
    from diffusion.tracking.mlflow_store import connect

    tags: dict[str, str] = connect().get_run(run_id).data.tags
    return tags


def test_without_a_server_the_card_is_enough(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert rows(explain("models/model.safetensors"))["step"] in ("4", "8")
    wrong = explain("0123abcd")
    assert wrong.exit_code == 2
    assert "no run 0123abcd" in wrong.output


def test_a_missing_model_is_one_line(workspace: Path) -> None:
    result = explain("models/none.safetensors")
    assert result.exit_code == 2
    assert result.output.count("\n") == 1


def test_samples_of_another_model_are_not_its_own(finished: Path) -> None:
    assert "samples" in rows(explain())
    card = json.loads(paths.SAMPLES_CARD.read_text())
    paths.SAMPLES_CARD.write_text(json.dumps(card | {"fingerprint": "of another"}))
    assert "samples" not in rows(explain())


def test_the_params_digest_is_of_the_params_alone(tiny) -> None:
    cpu = torch.device("cpu")
    one, same, other = (provenance.origin(tiny(**{"train.lr": lr}), cpu) for lr in (1e-3, 1e-3, 2e-3))
    assert one["params.digest"] == same["params.digest"] != other["params.digest"]
