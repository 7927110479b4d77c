"""The search in one process: how many trials, which points, what is written. Trainings are real, scores a formula."""

import csv
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fast_trials
import numpy as np
import optuna
import pytest
from conftest import REPO
from ruamel.yaml import YAML

from diffusion import config, paths, training, tuning, tuning_apply, tuning_trial
from diffusion.data import Dataset
from diffusion.errors import UserError
from diffusion.fit import StopRequest
from diffusion.journal import NullTracker, Tracker
from diffusion.progress import Record
from diffusion.reference import Reference
from diffusion.training import Trainer
from diffusion.tuning_study import GRACE_SECONDS, SharedStudy, quiet, storage_url
from diffusion.tuning_trial import Attempt

SPACE = {
    "train.lr": {"low": 2e-4, "high": 5e-3, "log": True},
    "train.lr_schedule": ["constant", "cosine", "linear"],
    "diffusion.schedule": ["linear", "cosine", "sigmoid"],
}
TUNE = {
    "tracking.enabled": False,
    "tune.images_per_trial": 32,
    "tune.sample_images": 4,
    "tune.trials": 3,
    "tune.workers": 1,
    "tune.pruner": "none",
    "tune.space": SPACE,
}


class StubExtractor:
    metric = "fd_lite0"

    def __init__(self, precision: str = "fp32") -> None:
        """In the place of EfficientNetLite0."""

    def describe(self) -> dict[str, str]:
        return {"name": "stub"}


@pytest.fixture
def place(tmp_path: Path, tiny_data: Dataset, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder with a reference; the score is a formula of the setting, least at lr 1e-3."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPTUNA_STORAGE", raising=False)
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(paths, "OPTUNA_DB", tmp_path / "optuna/study.db")
    monkeypatch.setattr(Dataset, "load", lambda: tiny_data)
    monkeypatch.setattr(tuning, "EfficientNetLite0", StubExtractor)
    monkeypatch.setattr(tuning_trial, "EfficientNetLite0", StubExtractor)
    monkeypatch.setattr(tuning_trial.Trainings, "_score", formula)
    monkeypatch.setattr(tuning, "draw_figures", lambda shared: None)  # seconds; they have a test of their own
    write_reference(images=20)
    return tmp_path


def write_reference(images: int) -> None:
    key = {"split": "train", "images": images, "extractor": {"name": "stub"}}
    Reference(np.zeros(2), np.eye(2), key).save(paths.REFERENCE / "fd_lite0.npz")


def formula(_: object, trainer: Trainer, attempt: Attempt, *rest: Any) -> float:
    assert trainer.progress.step == trainer.config.train.steps, "scored before the training's end"
    return fast_trials.value(trainer.config.train.lr, trainer.config.diffusion.schedule)


def table() -> list[dict[str, str]]:
    with paths.TRIALS_CSV.open(newline="") as file:
        return list(csv.DictReader(file))


def states() -> list[str]:
    return [row["state"] for row in table()]


def studies() -> list[str]:
    return optuna.get_all_study_names(f"sqlite:///{paths.OPTUNA_DB}")


def name_of(params: config.Params) -> str:
    reference = Reference.load(paths.REFERENCE / "fd_lite0.npz", {"name": "stub"})
    return tuning.study_name(params, "tiny", reference)


def stop_after(trials: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM comes after the fifth step of trial number `trials` (from 0) of the sitting."""
    seen: list[Path] = []

    def interrupted(trainer: Trainer) -> Iterator[Record]:
        seen.append(trainer.folder)
        for record in training.train(trainer):
            if len(seen) > trials and record.step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            yield record

    monkeypatch.setattr(tuning_trial, "train", interrupted)


def test_trials_are_counted_over_all_sittings_and_a_stopped_one_goes_on(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = tiny(**TUNE | {"tune.trials": 5})
    stop_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt, match=r"stopped after 2 of 5 trials; `make tune` goes on"):
        tuning.tune(params)
    assert states() == ["COMPLETE", "COMPLETE", "FAIL"]
    assert [path.parent.name[-4:] for path in paths.RUNS.glob("*/step_00000005-*.pt")] == ["0002"]
    begun: list[int] = []

    def watched(trainer: Trainer) -> Iterator[Record]:
        begun.append(trainer.progress.step)
        return training.train(trainer)

    monkeypatch.setattr(tuning_trial, "train", watched)
    tuning.tune(params)
    rows = table()
    assert [row["state"] for row in rows] == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert begun == [5, 0, 0], "the stopped training was not resumed"
    assert (rows[2]["reason"], rows[3]["retry_of"]) == ("stopped", "2")
    assert [rows[3][key] for key in SPACE] == [rows[2][key] for key in SPACE]
    tuning.tune(params)  # nothing left
    assert len(table()) == 6
    tuning.tune(tiny(**TUNE | {"tune.trials": 6, "tune.sampler": "random"}))  # the same study goes on
    assert states().count("COMPLETE") == 6
    assert len(studies()) == 1
    assert not [*paths.RUNS.glob("*/step_*.pt")], "checkpoints of finished trials stay"


def test_no_point_is_proposed_twice_and_the_first_is_the_present_setting(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = tiny(**TUNE | {"tune.trials": 6})
    for _ in range(2):
        stop_after(1, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            tuning.tune(params)
    monkeypatch.setattr(tuning_trial, "train", training.train)
    tuning.tune(params)
    rates = [float(row["train.lr"]) for row in table() if not row["retry_of"]]
    assert len(rates) == len(set(rates)) == 6
    assert all(2e-4 <= rate <= 5e-3 for rate in rates)
    assert table()[0]["train.lr"] == str(params.train.lr)


def test_other_seeds_propose_other_points(place: Path, tiny: Callable[..., config.Params]) -> None:
    proposed = []
    for seed in (None, 1, 1):
        params = tiny(**TUNE | {"tune.trials": 2, "tune.seed": seed})
        tuning.search("0" * 16, params, storage_url(params.tune), fast_trials_at_once)
        proposed.append(table()[1]["train.lr"])
        paths.OPTUNA_DB.unlink()
    assert proposed[0] != proposed[1] == proposed[2]


def fast_trials_at_once(params: config.Params) -> Callable[[Attempt], float]:
    return lambda attempt: 1.0


def test_a_trial_that_a_dead_process_left_running_is_tried_again_and_counts_once(
    place: Path, tiny: Callable[..., config.Params]
) -> None:
    params = tiny(**TUNE)
    shared = SharedStudy(name_of(params), params, storage_url(params.tune))
    trial = shared.claim()
    assert trial
    rate = shared.space[0].suggest(trial)
    trial.report(7.0, 4)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    trial.set_user_attr("pid", str(dead.pid))
    tuning.tune(params)
    rows = table()
    assert [row["state"] for row in rows] == ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert (rows[0]["reason"], rows[1]["retry_of"]) == ("its worker was killed", "0")
    assert rows[0]["train.lr"] == rows[1]["train.lr"] == str(rate)
    again = optuna.load_study(study_name=name_of(params), storage=f"sqlite:///{paths.OPTUNA_DB}").trials[1]
    assert again.intermediate_values[4] == 7.0, "what the first try reported is lost"


def test_a_claim_that_was_cut_short_is_no_trial_at_work(place: Path, tiny: Callable[..., config.Params]) -> None:
    """Killed between asking and signing: the trial names no process."""
    params = tiny(**TUNE)
    shared = SharedStudy(name_of(params), params, storage_url(params.tune))
    with quiet():
        shared.study.ask()
    tuning.tune(params)
    assert states() == ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert len({row["train.lr"] for row in table()[1:]}) == 3


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_claim_that_was_cut_short_before_its_values_were_drawn_repeats_no_other(
    place: Path, tiny: Callable[..., config.Params], sampler: str
) -> None:
    """The second trial, of which params.yaml does not know the values."""
    params = tiny(**TUNE | {"tune.trials": 4, "tune.sampler": sampler})
    shared = SharedStudy("0" * 16, params, storage_url(params.tune))
    first, second = shared.claim(), shared.claim()
    assert first
    assert second
    for trial in (first, second):
        trial.set_user_attr("pid", "999999999")
    tuning.search("0" * 16, params, storage_url(params.tune), fast_trials_at_once)
    complete = [row for row in table() if row["state"] == "COMPLETE"]
    assert len(complete) == len({row["train.lr"] for row in complete}) == 4


def test_a_setting_that_kills_its_worker_again_and_again_is_given_up(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusion.tuning_study.MAX_KILLS", 2)
    params = tiny(**TUNE | {"tune.trials": 1})
    shared = SharedStudy(name_of(params), params, storage_url(params.tune))
    for _ in range(3):
        trial = shared.claim()
        assert trial
        shared.space[0].suggest(trial)
        trial.set_user_attr("pid", "999999999")
    with shared.alone():
        shared.recover()
        shared.recover()  # changes nothing
    assert [t.state.name for t in shared.trials()] == ["FAIL"] * 3
    assert len({t.params["train.lr"] for t in shared.trials()}) == 1
    new = shared.claim()
    assert new
    assert "failed_trial" not in shared.trials()[new.number].system_attrs


def test_a_setting_off_the_grid_is_not_the_first_trial(place: Path, tiny: Callable[..., config.Params]) -> None:
    params = tiny(**TUNE | {"tune.space": {"train.batch_size": {"low": 2, "high": 8, "step": 3}}})
    assert params.train.batch_size == 4
    shared = SharedStudy(name_of(params), params, storage_url(params.tune))
    trial = shared.claim()
    assert trial
    assert shared.space[0].suggest(trial) in (2, 5, 8)
    trial.set_user_attr("pid", "999999999")
    again = shared.claim()
    assert again
    assert shared.trials()[1].system_attrs["failed_trial"] == 0


def test_a_trial_of_another_machine_is_tried_again_when_its_heart_has_stopped(
    place: Path, tiny: Callable[..., config.Params]
) -> None:
    """Whose worker may have died right after it took the trial."""
    params = tiny(**TUNE | {"tune.trials": 2})
    shared = SharedStudy(name_of(params), params, storage_url(params.tune))
    for _ in range(2):
        trial = shared.claim()
        assert trial
        shared.space[0].suggest(trial)
        trial.set_user_attr("host", "another machine")
    late = f"datetime('now', '-{GRACE_SECONDS + 5} seconds')"
    with shared.storage.engine.begin() as connection:
        beats = connection.exec_driver_sql("SELECT trial_id FROM trial_heartbeats").scalars().all()
        connection.exec_driver_sql(f"UPDATE trial_heartbeats SET heartbeat = {late} WHERE trial_id = {beats[0]}")
    assert len(beats) == 2
    taken = shared.claim()
    assert taken
    assert [t.state.name for t in shared.trials()] == ["FAIL", "RUNNING", "RUNNING"]
    assert shared.trials()[taken.number].system_attrs["failed_trial"] == 0
    assert shared.trials()[taken.number].params == shared.trials()[0].params
    assert shared.claim() is None, "the trial whose heart beats was taken"


def test_a_trial_that_a_dead_workers_server_completes_meanwhile_counts(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Postgres may commit what a worker sent it after that was killed, and after recovery looked."""
    params = tiny(**TUNE | {"tune.trials": 2})
    shared = SharedStudy(name_of(params), params, storage_url(params.tune))
    done = shared.claim()
    assert done
    done.set_user_attr("pid", "999999999")
    real = shared.study.tell

    def late(number: int, **how: Any) -> None:
        monkeypatch.setattr(shared.study, "tell", real)
        monkeypatch.setattr(shared.study.sampler, "after_trial", lambda *_: complete())
        real(number, **how)

    def complete() -> None:
        shared.storage.set_trial_state_values(done._trial_id, optuna.trial.TrialState.COMPLETE, [1.0])

    monkeypatch.setattr(shared.study, "tell", late)
    new = shared.claim()
    assert new
    assert [(t.state.name, t.values) for t in shared.trials()] == [("COMPLETE", [1.0]), ("RUNNING", None)]


def test_ctrl_c_while_a_worker_is_started_is_heard_afterwards() -> None:
    with StopRequest() as stop:
        with tuning._inherited({}):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked


def test_a_worker_that_was_taken_for_dead_does_not_spoil_what_came_after(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finishes after its trial was given to another: the value counts once, and it goes on with another trial."""
    params = tiny(**TUNE | {"tune.trials": 2})
    shared = SharedStudy(name_of(params), params, storage_url(params.tune))
    late = shared.claim()
    assert late
    late.set_user_attr("pid", "999999999")
    other = SharedStudy(name_of(params), params, storage_url(params.tune)).claim()
    assert other
    assert not shared.tell(late, "COMPLETE", 1.0)
    assert shared.tell(other, "COMPLETE", 2.0)
    assert [(t.state.name, t.values) for t in shared.trials()] == [("FAIL", None), ("COMPLETE", [2.0])]


def test_no_more_trials_are_begun_than_there_are_to_be(place: Path, tiny: Callable[..., config.Params]) -> None:
    params = tiny(**TUNE)
    views = [SharedStudy(name_of(params), params, storage_url(params.tune)) for _ in range(2)]
    claimed = [views[i % 2].claim() for i in range(4)]
    assert [trial and trial.number for trial in claimed] == [0, 1, 2, None]
    views[0].tell(claimed[0], "FAIL", final=True, reason="bad")
    assert [views[1].claim().number, views[0].claim()] == [3, None]


def test_the_store_is_in_wal_mode_with_heartbeats(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusion.tuning_study.HEARTBEAT_SECONDS", 0.02)
    params = tiny(**TUNE)
    shared = SharedStudy(name_of(params), params, storage_url(params.tune))
    trial = shared.claim()
    with sqlite3.connect(paths.OPTUNA_DB) as database:
        assert database.execute("PRAGMA journal_mode").fetchall() == [("wal",)]

        def beats() -> list[tuple[int, str]]:
            return database.execute("SELECT trial_id, heartbeat FROM trial_heartbeats").fetchall()

        assert [beat[0] for beat in beats()] == [trial._trial_id], "there is none before the work begins"
        database.execute("UPDATE trial_heartbeats SET heartbeat = '2000-01-01 00:00:00'")
        database.commit()
        with shared.beating(trial):
            for _ in range(5000):
                if beats()[0][1] > "2001":
                    break
                time.sleep(0.02)
        assert beats()[0][1] > "2001"


@pytest.mark.parametrize(
    ("overrides", "variable", "words"),
    [
        ({"tune.workers": 5}, "", ["tune.workers = 5", "more than 4", "postgresql://"]),
        ({"tune.storage": "mysql://me:secret@host/db"}, "", ["mysql://me:***@host/db", "neither", "postgresql://"]),
        ({}, "redis://host", ["OPTUNA_STORAGE = redis://host", "neither"]),
        ({}, "sqlite://", ["OPTUNA_STORAGE = sqlite://", "names no file"]),
        ({"tune.storage": "sqlite:///:memory:"}, "", ["tune.storage = sqlite:", "names no file"]),
        ({"tune.storage": "a secret place"}, "", ["tune.storage = what is no URL", "postgresql://"]),
        ({"tune.storage": "mysql://me:se/secret@host/db?password=secret"}, "", ["mysql://me:***@host/db is neither"]),
    ],
    ids=str,
)
def test_a_store_that_will_not_do_is_refused(
    overrides: dict[str, Any],
    variable: str,
    words: list[str],
    tiny: Callable[..., config.Params],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPTUNA_STORAGE", variable)
    with pytest.raises(UserError) as caught:
        storage_url(tiny(**overrides).tune)
    for word in words:
        assert word in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_store_that_is_no_database_is_one_line(place: Path, tiny: Callable[..., config.Params]) -> None:
    paths.OPTUNA_DB.parent.mkdir()
    paths.OPTUNA_DB.write_text("no database " * 100)
    with pytest.raises(UserError, match="cannot be used") as caught:
        tuning.tune(tiny(**TUNE))
    assert "\n" not in str(caught.value)


def test_a_store_that_goes_away_is_one_line_and_the_trial_is_tried_again(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise optuna.exceptions.StorageInternalError("the server closed\nthe connection")

    with monkeypatch.context() as patch:
        patch.setattr(optuna.trial.Trial, "report", away)
        with pytest.raises(UserError, match=r"does not answer \(the server closed the connection\)"):
            tuning.tune(tiny(**TUNE))
    assert states() == ["RUNNING"]
    monkeypatch.setattr("diffusion.tuning_study.is_alive", lambda tags: False)
    tuning.tune(tiny(**TUNE))
    assert [(row["state"], row["retry_of"]) for row in table()][:2] == [("FAIL", ""), ("COMPLETE", "0")]


def test_best_is_the_least_of_the_table_and_goes_into_params(
    place: Path, tiny: Callable[..., config.Params], capsys: pytest.CaptureFixture[str]
) -> None:
    tuning.tune(tiny(**TUNE | {"tune.trials": 5}))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trial ")]
    assert [line.split(":")[0] for line in lines] == [f"trial {i} ({i + 1} of 5)" for i in range(5)]
    least = min(table(), key=lambda row: float(row["value"]))
    assert f"best {float(least['value']):.2f} (trial {least['number']})" in lines[-1]
    for row in table():
        assert float(row["value"]) == fast_trials.value(float(row["train.lr"]), row["diffusion.schedule"])
    tree = YAML(typ="safe", pure=True).load(paths.BEST_YAML)
    overrides = {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}
    assert {key: str(value) for key, value in overrides.items()} == {key: least[key] for key in SPACE}

    file = place / "params.yaml"
    file.write_text((REPO / "params.yaml").read_text())
    difference = tuning_apply.apply(paths.BEST_YAML, file)
    assert config.load(file) == config.load(REPO / "params.yaml", overrides)
    before, after = (REPO / "params.yaml").read_text().splitlines(), file.read_text().splitlines()
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    wanted = [key for key, value in overrides.items() if value != config.flat(config.load(REPO / "params.yaml"))[key]]
    assert len(changed) == len([line for line in difference.splitlines() if line.startswith("+  ")]) == len(wanted)
    assert [old.partition("#")[2] for old, _ in changed] == [new.partition("#")[2] for _, new in changed]
    assert tuning_apply.apply(paths.BEST_YAML, file) == ""


def test_best_values_of_another_recipe_are_warned_of(
    place: Path, tiny: Callable[..., config.Params], capsys: pytest.CaptureFixture[str]
) -> None:
    file = place / "params.yaml"
    file.write_text((REPO / "params.yaml").read_text())
    params = config.load(file, TUNE | {"tune.space": config.load(file).tune.space})
    tuning.search("0" * 16, params, storage_url(params.tune), fast_trials_at_once)
    capsys.readouterr()
    for _ in range(2):  # applying them does not make it another recipe
        tuning_apply.apply(paths.BEST_YAML, file)
        assert capsys.readouterr().err == ""
    file.write_text((REPO / "params/gpu.yaml").read_text())
    tuning_apply.apply(paths.BEST_YAML, file)
    assert "was found for another recipe" in capsys.readouterr().err


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
    assert tuning.study_name(tiny(**TUNE), "other data", reference) not in names


@pytest.mark.parametrize("kind", ["raises", "never finite", "not a number"])
def test_divergence_prunes_with_the_reason(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    made: list[Path] = []

    def diverging(trainer: Trainer) -> Iterator[Record]:
        made.append(trainer.folder)
        if len(made) == 1:
            if kind == "raises":
                raise training.DivergedError("the loss was not finite")
            if kind == "never finite":
                return
            next(trainer.ema.net.parameters()).data.fill_(math.nan)
        yield from training.train(trainer)

    monkeypatch.setattr(tuning_trial, "train", diverging)
    tuning.tune(tiny(**TUNE))
    assert states() == ["PRUNED", "COMPLETE", "COMPLETE"]
    words = {"raises": "not finite", "never finite": "never finite", "not a number": "the error is nan after 4 images"}
    assert words[kind] in table()[0]["reason"]
    assert table()[0]["value"] == ""


def test_the_median_prunes_what_does_worse_half_way(place: Path, tiny: Callable[..., config.Params]) -> None:
    """Three good trials, then bad ones: pruned at half of the images, not before."""
    params = tiny(**TUNE | {"tune.trials": 6, "tune.pruner": "median"})
    tuning.search("0" * 16, params, storage_url(params.tune), worse_after_three)
    rows = table()
    assert [row["state"] for row in rows] == ["COMPLETE"] * 3 + ["PRUNED"] * 3
    assert all(row["reason"] == "median: an error of 9 after 16 images" for row in rows[3:])
    assert all(row["value"] == "" and row["error"] == "9.0" for row in rows[3:])


def test_hyperband_prunes_what_does_worse(place: Path, tiny: Callable[..., config.Params]) -> None:
    params = tiny(**TUNE | {"tune.trials": 12, "tune.pruner": "hyperband"})
    tuning.search("0" * 16, params, storage_url(params.tune), worse_after_three)
    rows = table()
    assert [row["state"] for row in rows][:3] == ["COMPLETE"] * 3
    pruned = [row for row in rows if row["state"] == "PRUNED"]
    assert pruned
    assert len(rows) == 12
    assert all(row["reason"].startswith("hyperband: an error of 9 after ") for row in pruned)


@pytest.mark.parametrize("sampler", ["tpe", "random", "gp"])
def test_each_sampler_finishes_a_study(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    """More trials than begin at random; numbers on each kind of scale."""
    spans = {"train.warmup_steps": {"low": 0, "high": 8, "step": 2}, "train.weight_decay": {"low": 0.0, "high": 0.1}}
    params = tiny(**TUNE | {"tune.trials": 6, "tune.sampler": sampler, "tune.space": SPACE | spans})
    monkeypatch.setattr(fast_trials, "SECONDS", 0.0)
    tuning.search("0" * 16, params, storage_url(params.tune), fast_trials.prepare)
    rows = table()
    assert [row["state"] for row in rows] == ["COMPLETE"] * 6
    assert len({row["train.lr"] for row in rows}) == 6
    for row in rows:
        assert 2e-4 <= float(row["train.lr"]) <= 5e-3
        assert int(row["train.warmup_steps"]) in range(0, 9, 2)
        assert 0 <= float(row["train.weight_decay"]) <= 0.1


def worse_after_three(params: config.Params) -> Callable[[Attempt], float]:
    def objective(attempt: Attempt) -> float:
        for images in range(4, 33, 4):
            attempt.report(images, 1.0 if attempt.number < 3 else 9.0)
        return 1.0

    return objective


def test_a_gp_does_not_propose_a_pruned_point_again(place: Path, tiny: Callable[..., config.Params]) -> None:
    params = tiny(**TUNE | {"tune.trials": 8, "tune.sampler": "gp", "tune.pruner": "none"})
    tuning.search("0" * 16, params, storage_url(params.tune), pruned_after_four)
    assert states() == ["COMPLETE"] * 4 + ["PRUNED"] * 4
    assert len({row["train.lr"] for row in table()}) == 8
    rates = [math.log(float(row["train.lr"])) for row in table()[4:]]
    assert np.std(rates) > 0.1


def pruned_after_four(params: config.Params) -> Callable[[Attempt], float]:
    def objective(attempt: Attempt) -> float:
        if attempt.number >= 4:
            raise tuning_trial.PrunedError("not worth it")
        return float(attempt.number)

    return objective


def test_what_no_trial_can_do_here_ends_the_search_and_costs_no_trial(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose message is the user's to read; afterwards the same trial is tried again."""
    params = tiny(**TUNE)

    def no_classes(*_: object) -> None:
        raise UserError("the images have 10 classes: set model.num_classes: 10")

    with monkeypatch.context() as patch:
        patch.setattr(tuning_trial, "Trainer", no_classes)
        for _ in range(2):
            with pytest.raises(UserError, match=r"set model\.num_classes: 10"):
                tuning.tune(params)
    tuning.tune(params)
    assert states() == ["FAIL", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert [row["train.lr"] for row in table()[:3]] == [str(params.train.lr)] * 3


def test_a_device_that_is_not_here_is_said_before_any_trial(place: Path, tiny: Callable[..., config.Params]) -> None:
    with pytest.raises(UserError, match="cuda"):
        tuning.tune(tiny(**TUNE | {"train.device": "cuda"}))
    assert not paths.OPTUNA_DB.exists()


def test_choices_that_only_some_others_allow_are_searched_in_any_order(
    place: Path, tiny: Callable[..., config.Params]
) -> None:
    for weights in (["min_snr", "simple"], ["simple", "min_snr"]):
        space = {"diffusion.zero_terminal_snr": [True, False], "train.loss_weight": weights}
        params = tiny(**TUNE | {"train.loss_weight": "simple", "tune.space": space, "tune.trials": 6})
        tuning.tune(params)
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
        for record in training.train(trainer):
            if kind == "rolled back" and record.step == 3:
                yield Record(4, record.loss, None)  # a step that does not count any more
            yield record

    monkeypatch.setattr(tuning_trial, "common_error", measured)
    monkeypatch.setattr(tuning_trial, "train", unlucky)
    params = tiny(**TUNE | {"tune.trials": 1, "train.checkpoint_every": 4})
    tuning.tune(params)
    study = optuna.load_study(study_name=name_of(params), storage=f"sqlite:///{paths.OPTUNA_DB}")
    assert study.trials[-1].intermediate_values == {4 * step: float(step) for step in range(1, 9)}


def test_a_best_that_was_found_between_sittings_is_told_the_studys_run(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a worker that ended after its parent."""
    tagged: dict[str, str] = {}
    monkeypatch.setattr(NullTracker, "tags", lambda self, tags: tagged.update(tags))
    params = tiny(**TUNE | {"tune.trials": 1})
    shared = SharedStudy("0" * 16, params, storage_url(params.tune))
    trial = shared.claim()
    assert trial
    for dimension in shared.space:
        dimension.suggest(trial)
    shared.tell(trial, "COMPLETE", 1.5)
    tuning.search("0" * 16, params, storage_url(params.tune), fast_trials_at_once)
    assert (tagged["best_trial"], tagged["best_fd_lite0"]) == ("0", "1.5000")


def test_other_batch_sizes_come_with_as_many_steps_as_see_the_same_images(
    place: Path, tiny: Callable[..., config.Params]
) -> None:
    params = tiny(**TUNE | {"tune.trials": 1, "tune.space": {"train.batch_size": [8]}, "train.steps": 100})
    tuning.tune(params)
    best = YAML(typ="safe", pure=True).load(paths.BEST_YAML)
    assert best == {"train": {"batch_size": 8, "steps": 50}}  # TINY has batches of 4


def test_the_dashboard_is_opened_on_the_store(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stub in the place of optuna-dashboard's command, which has no `python -m`."""
    command = place / "bin/optuna-dashboard"
    command.parent.mkdir()
    command.write_text('#!/bin/sh\necho "opened $@"\n')
    command.chmod(0o755)
    paths.OPTUNA_DB.parent.mkdir()
    paths.OPTUNA_DB.touch()
    (place / "params.yaml").write_text((REPO / "params.yaml").read_text())
    code = "import sys; sys.executable = sys.argv.pop(1); from diffusion.tuning_dashboard import main; main()"
    run = subprocess.run(
        [sys.executable, "-c", code, str(place / "bin/python"), "--port", "8123"],
        env={"PYTHONPATH": f"{REPO}/src", "DVC_ROOT": str(place), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert f"opened sqlite:///{paths.OPTUNA_DB} --host 127.0.0.1 --port 8123" in run.stdout


def test_reports_are_at_the_same_images_whatever_the_batch(place: Path, tiny: Callable[..., config.Params]) -> None:
    params = tiny(**TUNE | {"tune.images_per_trial": 48, "tune.space": {"train.batch_size": [2, 3, 4]}})
    tuning.tune(params)
    study = optuna.load_study(study_name=name_of(params), storage=f"sqlite:///{paths.OPTUNA_DB}")
    assert {tuple(trial.intermediate_values) for trial in study.trials} == {(6, 12, 18, 24, 30, 36, 42, 48)}
    assert {trial.params["train.batch_size"] for trial in study.trials} > {4}


def test_an_error_that_is_no_fault_of_the_values_ends_the_search(
    place: Path, tiny: Callable[..., config.Params]
) -> None:
    params = tiny(**TUNE)
    with pytest.raises(ZeroDivisionError):
        tuning.search("0" * 16, params, storage_url(params.tune), broken)
    assert (states(), table()[0]["reason"]) == (["FAIL"], "ZeroDivisionError: division by zero")


def broken(params: config.Params) -> Callable[[Attempt], float]:
    return lambda attempt: 1 / 0


def test_the_figures_are_drawn(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(place)
    monkeypatch.setattr(paths, "RUNS", place / "runs")
    params = tiny(**TUNE | {"tune.storage": f"sqlite:///{place}/study.db", "tune.trials": 5})
    monkeypatch.setattr(fast_trials, "SECONDS", 0.0)
    tuning.search("0" * 16, params, storage_url(params.tune), fast_trials.prepare)
    drawn = {path.name for path in paths.TUNING_FIGURES.glob("*.png")}
    assert drawn == {"history.png", "importance.png", "parallel.png", "slice.png", "intermediate.png"}


def test_a_missing_or_other_reference_is_named(place: Path, tiny: Callable[..., config.Params]) -> None:
    write_reference(images=19)
    with pytest.raises(UserError, match=r"images was 19, is 20\): run `dvc repro .*reference"):
        tuning.tune(tiny(**TUNE))
    (paths.REFERENCE / "fd_lite0.npz").unlink()
    with pytest.raises(UserError, match=r"fd_lite0.npz cannot be used .* run `dvc repro .*reference`"):
        tuning.tune(tiny(**TUNE))


def test_the_library_imports_without_optuna() -> None:
    code = "import sys; sys.modules['optuna'] = None; import diffusion.tuning, stages.tune, diffusion.tuning_dashboard"
    path = f"{REPO}/src:{REPO}"
    run = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": path}, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr


def test_each_trial_is_a_run_below_the_studys(
    place: Path, database: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    def pictured(self: tuning_trial.Trainings, trainer: Trainer, attempt: Attempt, tracker: Tracker) -> float:
        if attempt.number == 1:
            raise tuning_trial.PrunedError("not worth it")
        monkeypatch.setattr(tuning_trial, "score", lambda *_: formula(self, trainer, attempt))
        return real_score(self, trainer, attempt, tracker)

    monkeypatch.setattr(tuning_trial.Trainings, "_score", pictured)
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)  # of somebody else
    params = tiny(**TUNE | {"tracking.enabled": True, "tune.storage": f"sqlite:///{place}/optuna/study.db"})
    stop_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        tuning.tune(params)
    monkeypatch.setattr(tuning_trial, "train", training.train)
    tuning.tune(params)

    client = MlflowClient(f"sqlite:///{database}")
    experiment = client.get_experiment_by_name("cifar10-diffusion").experiment_id
    found = {run.info.run_name: run for run in client.search_runs([experiment])}
    parent = found.pop(f"tune-{name_of(params)}")
    assert {run.data.tags["mlflow.parentRunId"] for run in found.values()} == {parent.info.run_id}
    assert set(found) == {"trial 0", "trial 1", "trial 2"}, "the trial that was tried again has another run"
    assert {name: run.data.tags["trial.state"] for name, run in found.items()} == {
        "trial 0": "COMPLETE",
        "trial 1": "PRUNED",
        "trial 2": "COMPLETE",
    }
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    assert found["trial 1"].data.tags["trial.reason"] == "not worth it"
    assert found["trial 2"].data.tags["optuna.trial"] == "3"
    rows = {row["retry_of"] or row["number"]: row for row in table() if row["state"] == "COMPLETE"}
    for number in ("0", "2"):
        run = found[f"trial {number}"]
        assert run.data.params["train.lr"] == rows[number]["train.lr"]
        assert run.data.metrics["fd_lite0"] == float(rows[number]["value"])
        curve = client.get_metric_history(run.info.run_id, "val/common_error")
        assert sorted({point.step for point in curve}) == list(range(1, 9))
        assert [file.path for file in client.list_artifacts(run.info.run_id, "samples")] == ["samples/samples.png"]
    least = min(rows.values(), key=lambda row: float(row["value"]))
    assert parent.data.tags["best_trial"] == least["number"]
    assert {key: parent.data.tags[f"best_{key}"] for key in SPACE} == {key: least[key] for key in SPACE}
    assert parent.data.metrics["best/fd_lite0"] == float(least["value"])
    assert {file.path for file in client.list_artifacts(parent.info.run_id, "tuning")} >= {"tuning/trials.csv"}


real_score = tuning_trial.Trainings._score
