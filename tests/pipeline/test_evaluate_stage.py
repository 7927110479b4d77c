"""The evaluate stage around the scores: the samples' card, and processes that share the features."""

import json
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from helpers.commands import run, run_all, write_params
from helpers.preloaded import Command

from diffusion import paths
from diffusion.metrics.reference import Reference
from diffusion.pipeline import evaluate


@pytest.mark.parametrize("lost", ["config", "fingerprint", "run_id", "step"])
def test_a_card_that_lacks_something_is_one_line(workspace: Path, lost: str) -> None:
    write_params()
    paths.SAMPLES.mkdir()
    card = {"config": {}, "fingerprint": "abc", "run_id": None, "step": 8}
    paths.SAMPLES_CARD.write_text(json.dumps({key: value for key, value in card.items() if key != lost}))
    result = run("evaluate")
    assert result.exit_code == 2
    expected = f"samples/card.json is no card of samples (it lacks {lost}): run `dvc repro -sf sample`"
    assert result.output == f"error: {expected}\n"


@pytest.mark.parametrize("content", ["", "{torn", "[]", "3"], ids=repr)
def test_a_damaged_card_is_one_line(workspace: Path, content: str) -> None:
    write_params()
    paths.SAMPLES.mkdir()
    paths.SAMPLES_CARD.write_text(content)
    result = run("evaluate")
    assert result.exit_code == 2
    assert result.output.startswith("error: samples/card.json is no card of samples (")
    assert len(result.output.splitlines()) == 1


def test_samples_of_another_model_are_not_scored(workspace: Path) -> None:
    """Their scores would be registered as those of the model that lies here now."""
    write_params()
    run_all("prepare", "reference", "train", "sample", "evaluate")
    before = paths.EVALUATE_METRICS.read_text()
    assert run("train", "--seed", "1").exit_code == 0
    result = run("evaluate")
    assert result.exit_code == 2
    assert result.output.endswith(
        "samples/ is of another model than models/model.safetensors is now: run `dvc repro sample`\n"
    )
    assert paths.EVALUATE_METRICS.read_text() == before


def test_what_stays_in_memory_is_no_condition_of_a_distance() -> None:
    about = {"samples": 12, "reference": {"split": "train", "images": 20, "sha256": "f", "kept": 10_000}}
    other, less = {**about["reference"], "sha256": "e"}, {**about["reference"], "kept": 0}
    same = [evaluate._conditions({**about, "reference": key}) for key in (about["reference"], less, other)]
    assert same[0] == same[1] != same[2]


def test_who_scores_the_same_model_is_waited_for(workspace: Path) -> None:
    """Experiments side by side: `dvc queue start --jobs 2`."""
    write_params()
    run_all("prepare", "reference", "train", "sample")
    (run_folder,) = (path.parent for path in paths.RUNS.glob("*/journal.jsonl"))
    with FileLock(run_folder / "evaluate.lock"):
        second = Command("stages.evaluate")
        second.wait_for("waiting")
        (line,) = (line for line in second.said.splitlines() if "waiting" in line)
        assert "which is scoring samples of this model" in line
        assert second.returncode is None
    second.wait()
    assert second.returncode == 0


@pytest.mark.slow
def test_two_processes_score_as_one(workspace: Path) -> None:
    """The stages as users start them, with `evaluate.processes: 2`: the same features, summed in another order."""
    write_params()
    run_all("prepare", "train", "sample", "reference", "evaluate")
    alone, expected = json.loads(paths.EVALUATE_METRICS.read_text()), reference()
    paths.EVALUATE_METRICS.unlink()
    (paths.REFERENCE / "fd_lite0.npz").unlink()
    write_params(**{"evaluate.processes": 2})
    for stage in ("reference", "evaluate"):
        process = Command(f"stages.{stage}")
        said = process.wait()
        assert process.returncode == 0, said
        assert "1 of 2 processes" in said
    found = reference()
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-10, atol=1e-12)
    assert np.abs(found.cov - expected.cov).max() <= 1e-10 * np.abs(expected.cov).max()
    assert found.key == expected.key
    shared = json.loads(paths.EVALUATE_METRICS.read_text())
    assert list(shared) == list(alone)
    for name in alone.keys() - {"about"}:
        assert shared[name] == pytest.approx(alone[name], rel=1e-6), name


def reference() -> Reference:
    return Reference.load(paths.REFERENCE / "fd_lite0.npz", {})
