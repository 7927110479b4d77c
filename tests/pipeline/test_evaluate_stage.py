"""The evaluate stage around the scores: the samples' card, and who scores at the same time."""

import json
from pathlib import Path

import pytest
from filelock import FileLock
from helpers.commands import run, write_params
from helpers.preloaded import Command

from diffusion import paths
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


def test_samples_of_another_model_are_not_scored(finished: Path) -> None:
    """Their scores would be registered as those of the model that lies here now."""
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


def test_who_scores_the_same_model_is_waited_for(finished: Path) -> None:
    """Experiments side by side: `dvc queue start --jobs 2`."""
    (run_folder,) = (path.parent for path in paths.RUNS.glob("*/journal.jsonl"))
    with FileLock(run_folder / "evaluate.lock"):
        second = Command("stages.evaluate")
        second.wait_for("waiting")
        (line,) = (line for line in second.said.splitlines() if "waiting" in line)
        assert "which is scoring samples of this model" in line
        assert second.returncode is None
    second.wait()
    assert second.returncode == 0
