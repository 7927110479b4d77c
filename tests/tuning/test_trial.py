"""A trial: what it reports, and when it is pruned."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import optuna
import pytest
from helpers.studies import TUNE, name_of, states, table

from diffusion import config, errors, paths
from diffusion.errors import UserError
from diffusion.training import loop
from diffusion.training.loop import Trainer
from diffusion.training.progress import Record
from diffusion.tuning import search, trial
from diffusion.tuning.storage import storage_url
from diffusion.tuning.trial import Attempt


@pytest.mark.parametrize("kind", ["raises", "never finite", "not a number"])
def test_divergence_prunes_with_the_reason(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    made: list[Path] = []

    def diverging(trainer: Trainer) -> Iterator[Record]:
        made.append(trainer.folder)
        if len(made) == 1:
            if kind == "raises":
                raise errors.DivergedError("the loss was not finite")
            if kind == "never finite":
                return
            next(trainer.ema.net.parameters()).data.fill_(math.nan)
        yield from loop.train(trainer)

    monkeypatch.setattr(trial, "train", diverging)
    search.tune(tiny(**TUNE | {"tune.trials": 2}))
    assert states() == ["PRUNED", "COMPLETE"]
    words = {"raises": "not finite", "never finite": "never finite", "not a number": "the error is nan after 4 images"}
    assert words[kind] in table()[0]["reason"]
    assert table()[0]["value"] == ""


@pytest.mark.parametrize(
    ("error", "state"), [(9.0, "PRUNED"), (1.021, "PRUNED"), (1.019, "COMPLETE"), (0.5, "COMPLETE")]
)
def test_the_median_prunes_what_is_clearly_worse_after_a_quarter(
    place: Path, tiny: Callable[..., config.Params], error: float, state: str
) -> None:
    """Than 1, by more than 2 %: settings that are closer end in any order."""
    params = tiny(**TUNE | {"tune.trials": 4, "tune.pruner": "median"})
    search.search("0" * 16, params, storage_url(params.tune), partial(worse_after_three, error=error))
    rows = table()
    assert [row["state"] for row in rows] == ["COMPLETE"] * 3 + [state]
    reason, value = ("", "1.0") if state == "COMPLETE" else (f"median: an error of {error:g} after 8 images", "")
    assert (rows[3]["reason"], rows[3]["value"], rows[3]["error"]) == (reason, value, str(error))


def test_hyperband_prunes_what_does_worse(place: Path, tiny: Callable[..., config.Params]) -> None:
    params = tiny(**TUNE | {"tune.trials": 12, "tune.pruner": "hyperband"})
    search.search("0" * 16, params, storage_url(params.tune), worse_after_three)
    rows = table()
    assert [row["state"] for row in rows][:3] == ["COMPLETE"] * 3
    pruned = [row for row in rows if row["state"] == "PRUNED"]
    assert pruned
    assert len(rows) == 12
    assert all(row["reason"].startswith("hyperband: an error of 9 after ") for row in pruned)


def test_the_median_judges_the_present_error(place: Path, tiny: Callable[..., config.Params]) -> None:
    """Not the least so far: this one did well, and breaks down."""
    params = tiny(**TUNE | {"tune.trials": 4, "tune.pruner": "median"})
    search.search("0" * 16, params, storage_url(params.tune), breaks_down_after_three)
    assert table()[3]["reason"] == "median: an error of 5 after 16 images"


def breaks_down_after_three(params: config.Params) -> Callable[[Attempt], float]:
    def objective(attempt: Attempt) -> float:
        for images in range(4, 33, 4):
            attempt.report(images, 5.0 if attempt.number == 3 and images >= 16 else 1.0)
        return 1.0

    return objective


def worse_after_three(params: config.Params, error: float = 9.0) -> Callable[[Attempt], float]:
    def objective(attempt: Attempt) -> float:
        for images in range(4, 33, 4):
            attempt.report(images, 1.0 if attempt.number < 3 else error)
        return 1.0

    return objective


def test_what_no_trial_can_do_here_ends_the_search_and_costs_no_trial(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose message is the user's to read; afterwards the same trial is tried again."""
    params = tiny(**TUNE | {"tune.trials": 1})

    def no_classes(*_: object) -> None:
        raise UserError("the images have 10 classes: set model.num_classes: 10")

    with monkeypatch.context() as patch:
        patch.setattr(trial, "Trainer", no_classes)
        for _ in range(2):
            with pytest.raises(UserError, match=r"set model\.num_classes: 10"):
                search.tune(params)
    search.tune(params)
    assert states() == ["FAIL", "FAIL", "COMPLETE"]
    assert [row["train.lr"] for row in table()[:3]] == [str(params.train.lr)] * 3


def test_choices_that_only_some_others_allow_are_searched_in_any_order(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial.Trainings, "_train", lambda *_: None)
    monkeypatch.setattr(trial.Trainings, "_score", lambda *_: 1.0)
    for weights in (["min_snr", "simple"], ["simple", "min_snr"]):
        space = {"diffusion.zero_terminal_snr": [True, False], "train.loss_weight": weights}
        params = tiny(**TUNE | {"train.loss_weight": "simple", "tune.space": space, "tune.trials": 6})
        search.tune(params)
        assert {row["state"] for row in table()} <= {"COMPLETE", "PRUNED"}
        for row in table():
            together = (row["diffusion.zero_terminal_snr"], row["train.loss_weight"]) == ("True", "min_snr")
            assert (row["state"] == "PRUNED") == together


@pytest.mark.parametrize("kind", ["rolled back", "killed"])
def test_a_value_is_of_the_images_that_it_is_reported_at(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A step that was rolled back reports nothing; a kill between checkpoint and report loses nothing."""
    steps: list[int] = []

    def measured(trainer: Trainer) -> float:
        if kind == "killed" and trainer.progress.step == 4 and not steps.count(4):
            steps.append(4)
            raise KeyboardInterrupt  # after the checkpoint of step 4
        steps.append(trainer.progress.step)
        return float(trainer.progress.step)

    def unlucky(trainer: Trainer) -> Iterator[Record]:
        for record in loop.train(trainer):
            if kind == "rolled back" and record.step == 3:
                yield Record(4, record.loss, None)  # a step that does not count any more
            yield record

    monkeypatch.setattr(trial, "common_error", measured)
    monkeypatch.setattr(trial, "train", unlucky)
    params = tiny(**TUNE | {"tune.trials": 1, "train.checkpoint_every": 4})
    if kind == "killed":
        with pytest.raises(KeyboardInterrupt):
            search.tune(params)
    search.tune(params)
    study = optuna.load_study(study_name=name_of(params), storage=f"sqlite:///{paths.OPTUNA_DB}")
    assert study.trials[-1].intermediate_values == {4 * step: float(step) for step in range(1, 9)}


def test_reports_are_at_the_same_images_whatever_the_batch(place: Path, tiny: Callable[..., config.Params]) -> None:
    params = tiny(**TUNE | {"tune.images_per_trial": 48, "tune.space": {"train.batch_size": [2, 3, 4]}})
    search.tune(params)
    study = optuna.load_study(study_name=name_of(params), storage=f"sqlite:///{paths.OPTUNA_DB}")
    assert {tuple(trial.intermediate_values) for trial in study.trials} == {(6, 12, 18, 24, 30, 36, 42, 48)}
    assert {trial.params["train.batch_size"] for trial in study.trials} > {4}
