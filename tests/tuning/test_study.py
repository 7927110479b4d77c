"""Which trials are begun, with which values, and what becomes of those whose worker died."""

import re
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from helpers import fast_trials
from helpers.project import REPO
from helpers.studies import SPACE, TUNE, fast_trials_at_once, name_of, search_at_once, states, stop_after, table

from diffusion import config
from diffusion.errors import StopRequest, UserError
from diffusion.training import loop
from diffusion.tuning import search, storage, study, trial
from diffusion.tuning.space import first_settings, read_space
from diffusion.tuning.storage import quiet, storage_url
from diffusion.tuning.study import WORKER, enqueue_first, make_sampler, open_study, retry_lost
from diffusion.tuning.trial import Attempt

STALE = "UPDATE trial_heartbeats SET heartbeat = '2000-01-01 00:00:00'"


def opened(params: config.Params) -> optuna.Study:
    found = open_study(name_of(params), params, storage_url(params.tune))
    enqueue_first(found, params)
    return found


def begin(known: optuna.Study, params: config.Params) -> tuple[optuna.Trial, dict[str, object]]:
    """A trial as a worker begins it, with its first heartbeat; and its values."""
    with quiet():
        begun = known.ask()
    values = {dimension.key: dimension.suggest(begun) for dimension in read_space(params)}
    begun.set_user_attr(WORKER, begun.number)
    known._storage.record_heartbeat(begun._trial_id)
    return begun, values


def kill(params: config.Params) -> None:
    """All trials at work have had no heartbeat for long."""
    with storage.open_storage(storage_url(params.tune), study.retry()).engine.begin() as connection:
        connection.exec_driver_sql(STALE)


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


def test_a_trial_whose_heartbeat_stopped_is_tried_again_and_counts_once(
    place: Path, tiny: Callable[..., config.Params]
) -> None:
    params = tiny(**TUNE)
    known = opened(params)
    begun, values = begin(known, params)
    begun.report(7.0, 4)
    kill(params)
    search_at_once(params)
    rows = [row for row in table() if row["state"] != "WAITING"]
    assert [row["state"] for row in rows].count("COMPLETE") == 3
    assert (rows[0]["state"], rows[0]["reason"]) == ("FAIL", "its worker was killed")
    (again,) = [row for row in rows if row["retry_of"] == "0"]
    assert again["train.lr"] == rows[0]["train.lr"] == str(values["train.lr"])
    assert known.trials[int(again["number"])].intermediate_values[4] == 7.0, "what the first try reported is lost"


def test_a_trial_that_died_before_its_first_heartbeat_is_tried_again(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which Optuna would leave RUNNING for ever."""
    params = tiny(**TUNE)
    known = opened(params)
    with quiet():
        known.ask()
    begin(known, params)
    retry_lost(known)
    assert known.trials[0].state.name == "RUNNING", "its worker may be seeking its values"
    monkeypatch.setattr(storage, "GRACE_SECONDS", -1)
    for _ in range(2):
        retry_lost(known)
    running = known.trials[1]
    assert running.state.name == "RUNNING", "it has its heartbeat"
    again = [t for t in known.trials if t.system_attrs.get("failed_trial") == 0]
    assert len(again) == 1
    assert again[0].system_attrs["fixed_params"] == known.trials[0].system_attrs["fixed_params"]


def test_a_setting_that_kills_its_worker_again_and_again_is_given_up(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "MAX_RETRIES", 2)
    params = tiny(**TUNE | {"tune.trials": 1})
    known = opened(params)
    tried = []
    for _ in range(3):
        tried.append(begin(known, params)[1])
        kill(params)
        retry_lost(known)
        retry_lost(known)  # changes nothing
    assert [t.state.name for t in known.trials] == ["FAIL"] * 3
    assert tried == [tried[0]] * 3
    new = begin(known, params)[0].number
    assert "failed_trial" not in known.trials[new].system_attrs


def test_a_search_does_not_wait_for_ever_for_a_trial_of_another_machine(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    params = tiny(**TUNE)
    known = opened(params)
    begin(known, params)
    for name in ("GRACE_SECONDS", "HEARTBEAT_SECONDS"):
        monkeypatch.setattr(storage, name, 0)
    with StopRequest() as stop:
        search.wait_for_others(known, stop)
    assert known.trials[0].state.name == "RUNNING"
    assert "1 trials are still at work on other machines" in capsys.readouterr().out


def test_a_trial_that_is_stopped_often_is_not_given_up(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "MAX_RETRIES", 2)
    params = tiny(**TUNE | {"tune.trials": 1})

    def stopped(_: config.Params) -> Callable[[Attempt], float]:
        def objective(attempt: Attempt) -> float:
            raise UserError("there is no room")

        return objective

    for _ in range(4):
        with pytest.raises(UserError):
            search.search(name_of(params), params, storage_url(params.tune), stopped)
    search_at_once(params)
    rows = table()
    assert [row["state"] for row in rows] == ["FAIL"] * 4 + ["COMPLETE"]
    assert [row["retry_of"] for row in rows] == ["", "0", "0", "0", "0"]


@pytest.mark.parametrize("moment", ["at a report", "at its end"])
def test_a_worker_that_was_taken_for_dead_goes_on_with_another_trial(
    place: Path, tiny: Callable[..., config.Params], capsys: pytest.CaptureFixture[str], moment: str
) -> None:
    params = tiny(**TUNE | {"tune.trials": 2})
    known = opened(params)

    def prepare(_: config.Params) -> Callable[[Attempt], float]:
        def objective(attempt: Attempt) -> float:
            if attempt.number == 0:
                known.tell(0, state=optuna.trial.TrialState.FAIL)
                study.retry()(known, known.trials[0])
                if moment == "at a report":
                    attempt.report(4, 1.0)
            return float(attempt.number)

        return objective

    search.search(name_of(params), params, storage_url(params.tune), prepare)
    assert table()[0]["value"] == ""
    assert states().count("COMPLETE") == 2
    assert "trial 0 was given to another worker" in capsys.readouterr().err


def test_no_trial_repeats_the_random_numbers_of_another(place: Path, tiny: Callable[..., config.Params]) -> None:
    """Each trial has random numbers of its own, the same on every machine."""
    params, found = tiny(**TUNE), list[float]()
    for number in (0, 1, 2, 1):
        known = optuna.create_study()
        begun = known.ask()
        known.sampler = make_sampler(known, params, number)  # as a worker does: Optuna asks it late
        found.append(begun.suggest_float("x", 0, 1))
    assert len(set(found)) == 3
    assert found[1] == found[3]


def test_a_setting_off_the_grid_is_not_the_first_trial(place: Path, tiny: Callable[..., config.Params]) -> None:
    params = tiny(**TUNE | {"tune.space": {"train.batch_size": {"low": 2, "high": 8, "step": 3}}})
    assert params.train.batch_size == 4
    assert begin(opened(params), params)[1]["train.batch_size"] in (2, 5, 8)


def test_each_choice_by_itself_is_tried_first_for_half_of_the_study(
    place: Path, tiny: Callable[..., config.Params]
) -> None:
    """A longer study tries what was not tried yet."""
    found = []
    for trials in (4, 10):
        params = tiny(**TUNE | {"tune.trials": trials})
        known = open_study("0" * 16, params, storage_url(params.tune))
        for _ in range(2):
            enqueue_first(known, params)
        found += [begin(known, params)[1] for _ in range(trials - len(found))]
    expected = first_settings(params, read_space(params))
    assert found[:2] == expected[:2]
    assert found[4:7] == expected[2:]
    assert not any(values in expected for values in [*found[2:4], *found[7:]])


def test_no_private_attribute_of_optuna_is_used() -> None:
    """So that another version of it changes nothing here."""
    for file in (REPO / "src/diffusion/tuning").glob("*.py"):
        private = re.findall(r"(?:study|trial|storage|optuna[\w.]*)\._\w+|from optuna\S*\._", file.read_text())
        assert not private, f"{file.name}: {private}"


def test_a_finished_study_begins_no_trial(place: Path, tiny: Callable[..., config.Params]) -> None:
    params = tiny(**TUNE | {"tune.trials": 1})
    for _ in range(2):
        search.search(fast_trials.STUDY, params, storage_url(params.tune), fast_trials_at_once)
    assert states() == ["COMPLETE"]
