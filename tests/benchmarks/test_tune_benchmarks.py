"""The arithmetic of the search's benchmarks; their trainings take hours and are not run here."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.project import REPO
from helpers.studies import SPACE, TUNE, StubExtractor, table

from diffusion.config import Params, flat, trained
from diffusion.params_file import load, write_yaml
from diffusion.tuning import search
from diffusion.tuning.space import changed, present, read_space, trial_config


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(REPO / "benchmarks"), *sys.path])
    return importlib.import_module


def test_rank_correlations_are_of_the_settings_that_have_both(script: Any) -> None:
    rank = script("tune_rank")
    found: dict[str, Any] = {}
    for i, setting in enumerate(rank.SETTINGS[:5]):
        values = {"common_error_half": [5, 4, 3, 2, 1][i], "common_error": [1, 2, 3, 5, 4][i], "fd_lite0": i**3}
        found[rank.name(setting, rank.KINDS[0])] = values
    found[rank.name(rank.SETTINGS[5], rank.KINDS[0])] = values
    wholes = {setting: [290.0 + 10 * i, 310.0 + 10 * i] for i, setting in enumerate(rank.SETTINGS[:5])}
    tables = rank.correlations(found, wholes)
    assert tables["trial with the same rate"] == {"settings": 0}
    table = tables[rank.KINDS[0]]
    assert table["settings"] == 5
    assert table["fd_lite0"] == {"spearman": 1.0, "its_best_ends_as_number": 1}
    assert table["common_error_half"] == {"spearman": -1.0, "its_best_ends_as_number": 5}
    assert table["common_error"]["spearman"] == 0.9  # 1 - 6 (1 + 1) / (5 (25 - 1))
    assert rank.correlations({}, {})[rank.KINDS[0]] == {"settings": 0}


def test_a_final_score_is_of_all_whole_trainings_of_a_setting(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = script("tune_rank")
    monkeypatch.setattr(rank, "RESULTS", tmp_path)
    recipe = {"train.steps": 6000, "train.lr": 1.0}
    about = rank.digest(recipe)
    assert rank.of_gain(about) == {}
    scores = {"default, seed 1000": 250.0, "default, seed 1001": 260.0, "best, seed 1000": 230.0}
    gain = {
        "compared": {
            "default": dict(zip(rank.KEYS, rank.SETTINGS[0], strict=True)),
            "best": dict(zip(rank.KEYS, rank.SETTINGS[2], strict=True)),
            "recipe": recipe | {"train.lr": 2.0},  # one of KEYS
        },
        "trainings": {key: {"fd_lite0": {rank.FINAL: score}} for key, score in scores.items()},
    }
    (tmp_path / "tune_gain.json").write_text(json.dumps(gain))
    found = {rank.name(rank.SETTINGS[i], "whole"): {"fd_lite0": {rank.FINAL: 240.0 + i}} for i in (0, 1)}
    found |= {rank.name(rank.SETTINGS[3], "trial"): {"fd_lite0": 400.0}}
    assert rank.finals(found | rank.of_gain(about)) == {
        rank.SETTINGS[0]: [240.0, 250.0, 260.0],
        rank.SETTINGS[1]: [241.0],
        rank.SETTINGS[2]: [230.0],
    }
    assert rank.of_gain("another recipe") == {}
    todo = rank.missing(found | rank.of_gain(about), ["trial", "whole"])
    assert [setting for setting, kind in todo if kind == "whole"] == list(rank.SETTINGS[3:])
    assert [setting for setting, kind in todo if kind == "trial"] == [s for s in rank.SETTINGS if s != rank.SETTINGS[3]]


def test_trials_of_another_length_are_not_kept(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank, machine = script("tune_rank"), script("machine")
    monkeypatch.chdir(REPO)
    for module in (rank, machine):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    now = load("params.yaml")
    trial, same_rate, whole = (rank.name(rank.SETTINGS[1], kind) for kind in rank.KINDS)
    result: dict[str, Any] = dict.fromkeys(rank.CANDIDATES, 1.0)
    found = {
        trial: result | {"conditions": rank.conditions(now, rank.KINDS[0])},
        same_rate: result | {"conditions": rank.conditions(now, rank.KINDS[1])},
        whole: {"fd_lite0": {rank.FINAL: 240.0}},
    }
    rank.write("abc", found)
    assert rank.kept("abc") == found
    for key, value in (("images", 1), ("samples", 1), ("lr_horizon", 0.3)):
        other = {trial: result | {"conditions": found[trial]["conditions"] | {key: value}}}
        rank.write("abc", found | other)
        assert sorted(rank.kept("abc")) == sorted([same_rate, whole])


def test_a_trial_of_the_search_is_the_trial_that_is_ranked(
    script: Any, place: Path, tiny: Callable[..., Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, and under the same name; but for the score, which is stubbed in both."""
    rank = script("tune_rank")
    params = tiny(**TUNE | {"tune.space": SPACE | {"train.warmup_steps": {"low": 0, "high": 8}}})
    values = {key: flat(trained(params))[key] for key in rank.KEYS}
    setting = tuple(values.values())
    monkeypatch.setattr(rank, "SETTINGS", ((1.0, "linear", 0, "cosine"), setting))
    monkeypatch.setattr(rank, "EfficientNetLite0", StubExtractor)
    assert rank.of_study(params) == {}
    search.tune(params)
    found = rank.of_study(params)
    assert list(found) == [rank.name(setting, "trial")]
    assert rank.of_study(tiny(**TUNE)) == {}, "of a study of another space"

    monkeypatch.setattr(rank, "load", lambda _: params)
    monkeypatch.setattr(rank, "Scorer", lambda *_: SimpleNamespace(reference=None, extractor=None))
    monkeypatch.setattr(rank, "samples", lambda *_: None)
    monkeypatch.setattr(rank, "score", lambda *_: float(table()[0]["value"]))
    again = rank.trial(values, "trial")
    del again["train_seconds"]
    assert found[rank.name(setting, "trial")] == again


def test_the_settings_differ_and_hold_the_default(script: Any) -> None:
    rank = script("tune_rank")
    assert len(set(rank.SETTINGS)) == len(rank.SETTINGS) >= 8
    default = flat(trained(load(REPO / "params.yaml")))
    assert tuple(default[key] for key in rank.KEYS) in rank.SETTINGS
    assert len({rank.name(s, b) for s in rank.SETTINGS for b in rank.KINDS}) == 3 * len(rank.SETTINGS)


def test_the_settings_lie_in_the_search_space_and_the_rest_names_the_recipe(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank, base = script("tune_rank"), load(REPO / "params.yaml")
    space, share = read_space(base), base.tune.images_per_trial / (base.train.steps * base.train.batch_size)
    for setting in rank.SETTINGS:
        values = dict(zip(rank.KEYS, setting, strict=True))
        assert present(changed(base, values), space)
        assert trial_config(base, values).train.warmup_steps == values["train.warmup_steps"] * share
    monkeypatch.chdir(tmp_path)
    recipes = []
    for other in ({}, {"train.lr": 1e-3}, {"diffusion.schedule": "sigmoid"}, {"train.batch_size": 1}):
        write_yaml(changed(base, other), Path("params.yaml"))
        recipes.append(rank.digest(flat(trained(load("params.yaml")))))
    assert recipes[0] == recipes[1] == recipes[2] != recipes[3]


def test_a_gain_counts_if_it_is_more_than_the_seeds_spread(script: Any) -> None:
    gain = script("tune_gain")

    def found(default: list[float], best: list[float]) -> dict[str, Any]:
        return {
            f"{name}, seed {1000 + i}": {"fd_lite0": {gain.FINAL: value}}
            for name, values in (("default", default), ("best", best))
            for i, value in enumerate(values)
        }

    table = gain.summary(found([320.0, 330.0, 340.0], [300.0, 301.0, 302.0]))
    assert table["default"] == {"mean": 330.0, "sd": 10.0, "values": [320.0, 330.0, 340.0]}
    assert (table["gain"], table["spread"], table["beats_the_spread"]) == (29.0, 20.0, True)
    assert not gain.summary(found([320.0, 330.0, 340.0], [310.0, 312.0, 314.0]))["beats_the_spread"]
    assert "gain" not in gain.summary(found([320.0], []))


def test_results_are_kept_for_the_same_recipe_and_setting_alone(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPO)
    machine = script("machine")
    compared = {"default": {"train.lr": 1}, "best": {"train.lr": 2}, "recipe": {"train.lr": 1, "seed": 0}}
    trainings = ["best, seed 1000", "default, seed 1000"]
    for name, about in (("tune_rank", "abc"), ("tune_gain", compared)):
        module = script(name)
        for other in (module, machine):
            monkeypatch.setattr(other, "RESULTS", tmp_path)
        assert module.kept(about) == {}
        module.write(about, {key: {"fd_lite0": {module.FINAL: 1.0}} for key in trainings})
        assert list(module.kept(about)) == trainings
        assert module.kept({"another": 1}) == {}
        assert json.loads(capsys.readouterr().out)["machine"]
    assert list(module.kept(compared | {"best": {"train.lr": 3}})) == ["default, seed 1000"]
    assert module.kept(compared | {"recipe": {"train.lr": 1, "seed": 1}}) == {}
    best = tmp_path / "best.yaml"
    best.write_text("train:\n  lr: 0.001\n  warmup_steps: 300\ndiffusion:\n  schedule: linear\n")
    gain = script("tune_gain")
    read, _ = gain.read_best(best)
    assert read == {"train.lr": 0.001, "train.warmup_steps": 300, "diffusion.schedule": "linear"}
    about = gain.identity(read)
    now = load("params.yaml")
    default = {"train.lr": now.train.lr, "train.warmup_steps": now.train.warmup_steps}
    assert about["default"] == {**default, "diffusion.schedule": now.diffusion.schedule}
    assert about["recipe"].items() > about["default"].items()
    assert present(load("params.yaml", read), read_space(load("params.yaml")))


def test_overhead_is_scaled_to_a_whole_trial(script: Any) -> None:
    """Two trials of 10 s with 8 s of steps are 82 s each when the steps are ten times as many."""
    overhead = script("tune_overhead")
    first = {"all": 100.0, "step": 5.0, "background": 1.0, "ask": 1.0, "common_error": 0.0}
    last = {"all": 120.0, "step": 21.0, "background": 1.8, "ask": 1.2, "common_error": 1.64, "tell": 0.4}
    found = overhead.shares(first, last, 2, looks=0.001)
    assert found["seconds_of_a_default_trial"] == 10 + 9 * 8
    assert found["seconds"] == {"ask": 0.1, "tell": 0.2, "background": 0.4, "looks": 0.082}
    assert found["share_of_optuna_and_tracking"] == round(0.782 / 82, 4)
    assert found["share_of_the_common_error"] == 0.01
