"""Where a study is kept: which stores will do, and what becomes of one that goes away."""

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from helpers.studies import TUNE, search_at_once, table

from diffusion import config, paths
from diffusion.errors import UserError
from diffusion.tuning import search
from diffusion.tuning.storage import open_storage, quiet, storage_url
from diffusion.tuning.study import open_study, retry


def test_the_store_is_in_wal_mode(place: Path, tiny: Callable[..., config.Params]) -> None:
    params = tiny(**TUNE)
    open_study("0" * 16, params, storage_url(params.tune))
    with sqlite3.connect(paths.OPTUNA_DB) as database:
        assert database.execute("PRAGMA journal_mode").fetchall() == [("wal",)]


def test_a_heartbeat_outlives_an_outage(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise optuna.exceptions.StorageInternalError("the server closed the connection")

    params = tiny(**TUNE)
    study = open_study("0" * 16, params, storage_url(params.tune))
    monkeypatch.setattr(optuna.storages.RDBStorage, "record_heartbeat", away)
    with quiet():
        study.optimize(lambda trial: 1.0, n_trials=1)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"]


@pytest.mark.parametrize(
    ("overrides", "variable", "words"),
    [
        ({"tune.workers": 5}, "", ["tune.workers = 5", "more than 4", "postgresql://"]),
        ({"tune.storage": "mysql+none://me:secret@host/db"}, "", ["mysql+none://***@host/db cannot be used"]),
        ({}, "redis://host", ["redis://host cannot be used"]),
        ({}, "sqlite://", ["OPTUNA_STORAGE = sqlite://", "names no file"]),
        ({"tune.storage": "sqlite:///:memory:"}, "", ["tune.storage = sqlite:", "names no file"]),
        ({"tune.storage": "a secret place"}, "", ["tune.storage is no URL", "postgresql://"]),
        ({"tune.storage": "postgresql://me:se/secret@host/db"}, "", ["tune.storage: the @ in it is ambiguous"]),
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
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between tries
    with pytest.raises(UserError) as caught:
        open_storage(storage_url(tiny(**overrides).tune), retry())
    for word in words:
        assert word in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_store_that_is_no_database_is_one_line(place: Path, tiny: Callable[..., config.Params]) -> None:
    paths.OPTUNA_DB.parent.mkdir()
    paths.OPTUNA_DB.write_text("no database " * 100)
    with pytest.raises(UserError, match="cannot be used") as caught:
        search.tune(tiny(**TUNE))
    assert "\n" not in str(caught.value)


def test_a_store_that_goes_away_is_one_line_and_the_trial_is_tried_again(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise optuna.exceptions.StorageInternalError("the server closed\nthe connection")

    with monkeypatch.context() as patch:
        patch.setattr(optuna.trial.Trial, "report", away)
        with pytest.raises(UserError, match=r"does not answer \(the server closed the connection\)"):
            search_at_once(tiny(**TUNE))
    search_at_once(tiny(**TUNE))
    assert [(row["state"], row["retry_of"]) for row in table()][:2] == [("FAIL", ""), ("COMPLETE", "0")]
