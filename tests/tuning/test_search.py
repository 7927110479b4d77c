"""The search in one process: how many trials it has, which study it is, how it ends."""

import errno
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import fast_trials
from helpers.studies import (
    SPACE,
    TUNE,
    fast_trials_at_once,
    name_of,
    states,
    stop_after,
    studies,
    table,
    write_reference,
)
from optuna.exceptions import StorageInternalError

from diffusion import config, paths
from diffusion.errors import UserError
from diffusion.metrics.reference import Reference
from diffusion.training import loop
from diffusion.training.loop import Trainer
from diffusion.training.progress import Record
from diffusion.tuning import search, trial
from diffusion.tuning.storage import storage_url
from diffusion.tuning.trial import Attempt


def test_trials_are_counted_over_all_runs_and_a_stopped_one_goes_on(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = tiny(**TUNE | {"tune.trials": 3})
    stop_after(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt, match=r"stopped after 1 of 3 trials; `make tune` goes on"):
        search.tune(params)
    assert states() == ["COMPLETE", "FAIL", *["WAITING"] * (len(states()) - 2)]
    assert [path.parent.name.split("-")[1] for path in paths.RUNS.glob("*/step_00000005-*.pt")] == ["0001"]
    begun: list[int] = []

    def watched(trainer: Trainer) -> Iterator[Record]:
        begun.append(trainer.progress.step)
        return loop.train(trainer)

    monkeypatch.setattr(trial, "train", watched)
    search.tune(params)
    rows = table()
    assert [row["state"] for row in rows] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert begun == [5, 0], "the stopped training was not resumed"
    assert (rows[1]["reason"], rows[2]["retry_of"]) == ("stopped", "1")
    assert [rows[2][key] for key in SPACE] == [rows[1][key] for key in SPACE]
    search.tune(params)  # nothing left
    assert len(table()) == 4
    search.tune(tiny(**TUNE | {"tune.trials": 4, "tune.sampler": "random"}))  # the same study goes on
    assert states().count("COMPLETE") == 4
    assert len(studies()) == 1
    assert not [*paths.RUNS.glob("*/step_*.pt")], "checkpoints of finished trials stay"


def test_the_same_study_in_another_store_begins_its_own_trials(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their numbers are those of the first store's, whose checkpoints lie here; their values are not."""
    stop_after(0, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        search.tune(tiny(**TUNE))
    begun: list[int] = []

    def watched(trainer: Trainer) -> Iterator[Record]:
        begun.append(trainer.progress.step)
        return loop.train(trainer)

    monkeypatch.setattr(trial, "train", watched)
    search.tune(tiny(**TUNE | {"tune.trials": 1, "tune.storage": f"sqlite:///{place}/elsewhere.db", "tune.seed": 4}))
    assert begun == [0]


def test_other_seeds_propose_other_points(place: Path, tiny: Callable[..., config.Params]) -> None:
    proposed = []
    for seed in (None, 1, 1):
        params = tiny(**TUNE | {"tune.trials": 2, "tune.seed": seed})
        search.search("0" * 16, params, storage_url(params.tune), fast_trials_at_once)
        proposed.append(table()[1]["train.lr"])
        paths.OPTUNA_DB.unlink()
    assert proposed[0] != proposed[1] == proposed[2]


@pytest.mark.parametrize(
    "change",
    [
        {"tune.space": SPACE | {"train.lr": {"low": 1e-4, "high": 1e-3}}},
        {"tune.space": SPACE | {"diffusion.schedule": ["cosine"]}},
        {"train.ema_decay": 0.5},
        {"tune.images_per_trial": 64},
        {"train.steps": 9, "train.validate_every": 9},  # of which a trial's warm-up is a share
        {"seed": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_changed_setting_is_another_study(
    place: Path, tiny: Callable[..., config.Params], change: dict[str, Any]
) -> None:
    assert name_of(tiny(**TUNE)) != name_of(tiny(**TUNE | change))


def test_applying_the_best_values_or_searching_otherwise_keeps_the_study(
    place: Path, tiny: Callable[..., config.Params]
) -> None:
    searched = {"train.lr": 1e-5, "train.lr_schedule": "constant", "diffusion.schedule": "sigmoid"}
    how = {"tune.trials": 9, "tune.workers": 3, "tune.sampler": "gp", "tune.pruner": "median", "tune.storage": "x"}
    no_settings = {"train.log_every": 3, "train.checkpoint_every": 3, "train.processes": 2}
    names = {name_of(tiny(**TUNE | values)) for values in ({}, searched, how, {"tune.seed": 4}, no_settings)}
    assert len(names) == 1
    reference = Reference.load(paths.REFERENCE / "fd_lite0.npz", {"name": "stub"})
    assert search.study_name(tiny(**TUNE), "other data", reference) not in names


def test_applying_a_batch_size_keeps_the_study(place: Path, tiny: Callable[..., config.Params]) -> None:
    """Of which a whole training's steps see 192,024 images in place of 192,000; twice as many are another."""
    searched = TUNE | {"tune.space": {"train.batch_size": [32, 56]}}
    sizes = [(6000, 32), (3429, 56), (6000, 64)]
    first, applied, longer = (
        name_of(tiny(**searched | {"train.steps": steps, "train.batch_size": size})) for steps, size in sizes
    )
    assert first == applied != longer


@pytest.mark.parametrize("sampler", ["tpe", "random", "gp"])
def test_each_sampler_finishes_a_study(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    """More trials than begin at random; numbers on each kind of scale."""
    spans = {"train.warmup_steps": {"low": 0, "high": 8, "step": 2}, "train.weight_decay": {"low": 0.0, "high": 0.1}}
    params = tiny(**TUNE | {"tune.trials": 6, "tune.sampler": sampler, "tune.space": SPACE | spans})
    monkeypatch.setattr(fast_trials, "SECONDS", 0.0)
    search.search("0" * 16, params, storage_url(params.tune), fast_trials.prepare)
    rows = table()
    assert [row["state"] for row in rows] == ["COMPLETE"] * 6
    assert len({tuple(row[key] for key in [*SPACE, *spans]) for row in rows}) == 6
    for row in rows:
        assert 2e-4 <= float(row["train.lr"]) <= 5e-3
        assert int(row["train.warmup_steps"]) in range(0, 9, 2)
        assert 0 <= float(row["train.weight_decay"]) <= 0.1


def test_a_gp_does_not_propose_a_pruned_point_again(place: Path, tiny: Callable[..., config.Params]) -> None:
    params = tiny(**TUNE | {"tune.trials": 8, "tune.sampler": "gp", "tune.pruner": "none"})
    search.search("0" * 16, params, storage_url(params.tune), pruned_after_four)
    assert states() == ["COMPLETE"] * 4 + ["PRUNED"] * 4
    assert len({tuple(row[key] for key in SPACE) for row in table()}) == 8
    rates = [math.log(float(row["train.lr"])) for row in table()[4:]]
    assert np.std(rates) > 0.1


def pruned_after_four(params: config.Params) -> Callable[[Attempt], float]:
    def objective(attempt: Attempt) -> float:
        if attempt.number >= 4:
            raise trial.PrunedError("not worth it")
        return float(attempt.number)

    return objective


def test_a_device_that_is_not_here_is_said_before_any_trial(place: Path, tiny: Callable[..., config.Params]) -> None:
    with pytest.raises(UserError, match="cuda"):
        search.tune(tiny(**TUNE | {"train.device": "cuda"}))
    assert not paths.OPTUNA_DB.exists()


def test_an_error_that_is_no_fault_of_the_values_ends_the_search(
    place: Path, tiny: Callable[..., config.Params]
) -> None:
    params = tiny(**TUNE)
    with pytest.raises(ZeroDivisionError):
        search.search("0" * 16, params, storage_url(params.tune), broken)
    assert (states(), table()[0]["reason"]) == (["FAIL"], "ZeroDivisionError: division by zero")
    search.search("0" * 16, params, storage_url(params.tune), fast_trials_at_once)  # it was put right
    assert states() == ["FAIL"] + ["COMPLETE"] * 3
    assert [row["retry_of"] for row in table()] == [""] * 4, "a trial that failed for good was tried again"


def broken(params: config.Params) -> Callable[[Attempt], float]:
    return lambda attempt: 1 / 0


def test_a_full_disk_costs_no_trial(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, and the present setting is tried again when there is room."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "samples.png")

    with monkeypatch.context() as patch:
        patch.setattr(trial.Trainings, "_score", full)
        with pytest.raises(UserError, match=r"No space left on device \(samples.png\): put that right"):
            search.tune(tiny(**TUNE | {"tune.trials": 1}))
    search.tune(tiny(**TUNE | {"tune.trials": 1}))
    rows = table()
    assert [row["state"] for row in rows] == ["FAIL", "COMPLETE"]
    assert (rows[0]["reason"], rows[1]["retry_of"]) == ("stopped", "0")


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, ["0", "1", "0"]), ("5,GPU-b", ["5", "GPU-b", "5"])], ids=["all", "some"]
)
def test_each_worker_has_a_gpu_of_its_own(
    visible: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    cuda = torch.device("cuda")
    assert [search.own_gpu(number, cuda) for number in range(3)] == [{"CUDA_VISIBLE_DEVICES": e} for e in expected]
    assert search.own_gpu(0, torch.device("cpu")) == {}


def test_a_store_that_is_away_for_a_moment_is_the_workers_to_notice() -> None:
    """The process that waits for them looks again; a bug of its own ends the search."""

    class Away:
        @property
        def study(self) -> None:
            raise StorageInternalError("the server closed the connection")

    class Broken:
        @property
        def study(self) -> None:
            raise ZeroDivisionError

    assert search.look(Away()) == 0
    with pytest.raises(ZeroDivisionError):
        search.look(Broken())


def test_a_present_setting_outside_the_space_is_said(
    place: Path, tiny: Callable[..., config.Params], capsys: pytest.CaptureFixture[str]
) -> None:
    params = tiny(**TUNE | {"tune.trials": 1, "tune.space": {"train.batch_size": [2, 8]}})
    search.search("0" * 16, params, storage_url(params.tune), fast_trials_at_once)
    assert "the study does not begin with it" in capsys.readouterr().err


def test_a_missing_or_other_reference_is_named(place: Path, tiny: Callable[..., config.Params]) -> None:
    write_reference(images=19)
    with pytest.raises(UserError, match=r"images was 19, is 20\): run `dvc repro .*reference"):
        search.tune(tiny(**TUNE))
    (paths.REFERENCE / "fd_lite0.npz").unlink()
    with pytest.raises(UserError, match=r"fd_lite0.npz cannot be used .* run `dvc repro .*reference`"):
        search.tune(tiny(**TUNE))
