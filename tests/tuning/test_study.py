"""Which trials are begun, with which values, and what becomes of those whose worker died."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from helpers.studies import SPACE, TUNE, fast_trials_at_once, name_of, search_at_once, states, stop_after, table

from diffusion import config, paths
from diffusion.training import loop
from diffusion.tuning import search, trial
from diffusion.tuning.space import first_settings
from diffusion.tuning.store import GRACE_SECONDS, quiet, storage_url
from diffusion.tuning.study import SharedStudy


def test_no_point_is_proposed_twice_and_the_first_is_the_present_setting(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = tiny(**TUNE | {"tune.trials": 4})
    for _ in range(2):
        stop_after(1, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            search.tune(params)
    monkeypatch.setattr(trial, "train", loop.train)
    search.tune(params)
    tried = [tuple(row[key] for key in SPACE) for row in table() if not row["retry_of"]]
    assert len(tried) == len(set(tried)) == 4
    assert all(2e-4 <= float(row["train.lr"]) <= 5e-3 for row in table())
    assert table()[0]["train.lr"] == str(params.train.lr)


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
    search_at_once(params)
    rows = table()
    assert [row["state"] for row in rows] == ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert (rows[0]["reason"], rows[1]["retry_of"]) == ("its worker was killed", "0")
    assert rows[0]["train.lr"] == rows[1]["train.lr"] == str(rate)
    again = optuna.load_study(study_name=name_of(params), storage=f"sqlite:///{paths.OPTUNA_DB}").trials[1]
    assert again.intermediate_values[4] == 7.0, "what the first try reported is lost"


def test_a_trial_to_be_tried_again_is_nobodys(place: Path, tiny: Callable[..., config.Params]) -> None:
    """A claim of it that is cut short must not look like the work of the one who had it first."""
    params = tiny(**TUNE)
    shared = SharedStudy(name_of(params), params, storage_url(params.tune))
    trial = shared.claim()
    assert trial
    trial.set_user_attr("pid", "999999999")
    with shared.alone():
        shared.recover()
    (left,) = shared.trials("WAITING")
    assert not {"host", "pid", "machine"} & set(left.user_attrs)
    with quiet():
        shared.study.ask()  # and dies
    new = shared.claim()
    assert new
    assert shared.trials()[new.number].system_attrs["retry_history"] == [0, 1]


def test_a_claim_that_was_cut_short_is_no_trial_at_work(place: Path, tiny: Callable[..., config.Params]) -> None:
    """Killed between asking and signing: the trial names no process."""
    params = tiny(**TUNE)
    shared = SharedStudy(name_of(params), params, storage_url(params.tune))
    with quiet():
        shared.study.ask()
    search_at_once(params)
    assert states() == ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert len({row["train.lr"] for row in table()[1:]}) == 3


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_claim_that_was_cut_short_before_its_values_were_drawn_repeats_no_other(
    place: Path, tiny: Callable[..., config.Params], sampler: str
) -> None:
    """The second trial, of which params.yaml does not know the values."""
    rates = {"train.lr": SPACE["train.lr"]}
    params = tiny(**TUNE | {"tune.trials": 4, "tune.sampler": sampler, "tune.space": rates})
    shared = SharedStudy("0" * 16, params, storage_url(params.tune))
    first, second = shared.claim(), shared.claim()
    assert first
    assert second
    for begun in (first, second):
        begun.set_user_attr("pid", "999999999")
    search.search("0" * 16, params, storage_url(params.tune), fast_trials_at_once)
    complete = [row for row in table() if row["state"] == "COMPLETE"]
    assert len(complete) == len({row["train.lr"] for row in complete}) == 4


def test_a_setting_that_kills_its_worker_again_and_again_is_given_up(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusion.tuning.study.MAX_KILLS", 2)
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
        trial.set_user_attr("machine", "another")
        trial.set_user_attr("pid", "999999999")  # a process's number means nothing there
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
    """A trial that failed for good is replaced by another, not tried again."""
    params = tiny(**TUNE)
    views = [SharedStudy(name_of(params), params, storage_url(params.tune)) for _ in range(2)]
    claimed = [views[i % 2].claim() for i in range(4)]
    assert [trial and trial.number for trial in claimed] == [0, 1, 2, None]
    views[0].tell(claimed[0], "FAIL", final=True, reason="bad")
    assert [views[1].claim().number, views[0].claim()] == [3, None]
    assert "retry_history" not in views[0].trials()[3].system_attrs


@pytest.mark.parametrize("drawn", [True, False], ids=["killed at work", "killed before its values were drawn"])
def test_each_choice_alone_is_tried_first_and_again_if_it_was_killed(
    place: Path, tiny: Callable[..., config.Params], drawn: bool
) -> None:
    params = tiny(**TUNE | {"tune.trials": 10})
    shared = SharedStudy(name_of(params), params, storage_url(params.tune))
    expected = first_settings(params, shared.space)
    assert len(expected) == 5
    claimed = []
    for number in range(8):
        trial = shared.claim()
        assert trial
        if drawn or number != 2:
            claimed.append({dimension.key: dimension.suggest(trial) for dimension in shared.space})
        if number == 2:
            trial.set_user_attr("pid", "999999999")
    again = [shared.trials()[number].system_attrs.get("failed_trial") for number in range(8)]
    assert again == [None, None, None, 2, None, None, None, None]
    assert claimed[:-2] == expected[:2] + expected[2:3] * (1 + drawn) + expected[3:]
    assert not any(values in expected for values in claimed[-2:])


def test_what_a_longer_study_tries_first_is_what_was_not_tried_yet(
    place: Path, tiny: Callable[..., config.Params]
) -> None:
    found = []
    for trials in (4, 10):
        params = tiny(**TUNE | {"tune.trials": trials})
        shared = SharedStudy("0" * 16, params, storage_url(params.tune))
        while trial := shared.claim():
            found.append({dimension.key: dimension.suggest(trial) for dimension in shared.space})
    expected = first_settings(params, shared.space)
    assert [values for values in found if values in expected] == expected
    assert found[:2] == expected[:2]
    assert found[4:7] == expected[2:]


def test_half_of_a_study_at_least_is_for_the_sampler(place: Path, tiny: Callable[..., config.Params]) -> None:
    params = tiny(**TUNE | {"tune.trials": 4})
    shared = SharedStudy(name_of(params), params, storage_url(params.tune))
    found = []
    for _ in range(4):
        trial = shared.claim()
        assert trial
        found.append({dimension.key: dimension.suggest(trial) for dimension in shared.space})
    expected = first_settings(params, shared.space)
    assert found[:2] == expected[:2]
    assert not any(values in expected for values in found[2:])
