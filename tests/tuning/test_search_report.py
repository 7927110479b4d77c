"""What a search leaves: tables, figures, MLflow's runs."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import fast_trials
from helpers.project import REPO
from helpers.studies import SPACE, TUNE, fast_trials_at_once, formula, name_of, search_at_once, stop_after, table
from matplotlib.figure import Figure
from PIL import Image
from ruamel.yaml import YAML

from diffusion import config, params_file, paths
from diffusion.tracking.tracker import Tracker
from diffusion.training import loop
from diffusion.training.loop import Trainer
from diffusion.tuning import apply, report, search, trial
from diffusion.tuning.space import read_space
from diffusion.tuning.storage import quiet, storage_url
from diffusion.tuning.study import enqueue_first, open_study
from diffusion.tuning.trial import Attempt


def test_best_is_the_least_of_the_table_and_goes_into_params(
    place: Path, tiny: Callable[..., config.Params], capsys: pytest.CaptureFixture[str]
) -> None:
    search_at_once(tiny(**TUNE | {"tune.trials": 5}))
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
    difference = apply.apply(paths.BEST_YAML, file)
    assert params_file.load(file) == params_file.load(REPO / "params.yaml", overrides)
    before, after = (REPO / "params.yaml").read_text().splitlines(), file.read_text().splitlines()
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    wanted = [
        key for key, value in overrides.items() if value != config.flat(params_file.load(REPO / "params.yaml"))[key]
    ]
    assert len(changed) == len([line for line in difference.splitlines() if line.startswith("+  ")]) == len(wanted)
    assert [old.partition("#")[2] for old, _ in changed] == [new.partition("#")[2] for _, new in changed]
    assert apply.apply(paths.BEST_YAML, file) == ""


def test_a_best_that_was_found_meanwhile_is_told_the_studys_run(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a worker that ended after its parent."""
    tagged: dict[str, str] = {}
    monkeypatch.setattr(Tracker, "tags", lambda self, tags: tagged.update(tags))
    params = tiny(**TUNE | {"tune.trials": 1})
    study = open_study("0" * 16, params, storage_url(params.tune))
    enqueue_first(study, params)
    with quiet():
        trial = study.ask()
    for dimension in read_space(params):
        dimension.suggest(trial)
    study.tell(trial, 1.5)
    search.search("0" * 16, params, storage_url(params.tune), fast_trials_at_once)
    assert (tagged["best_trial"], tagged["best_fd_lite0"]) == ("0", "1.5000")


def test_other_batch_sizes_come_with_as_many_steps_as_see_the_same_images(
    place: Path, tiny: Callable[..., config.Params]
) -> None:
    params = tiny(**TUNE | {"tune.trials": 1, "tune.space": {"train.batch_size": [8]}, "train.steps": 100})
    search.search("0" * 16, params, storage_url(params.tune), fast_trials_at_once)
    best = YAML(typ="safe", pure=True).load(paths.BEST_YAML)
    assert best == {"train": {"batch_size": 8, "steps": 50}}  # TINY has batches of 4


@pytest.mark.slow
def test_the_figures_are_plotted(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(place)
    monkeypatch.setattr(paths, "RUNS", place / "runs")
    params = tiny(**TUNE | {"tune.storage": f"sqlite:///{place}/study.db", "tune.trials": 5})
    monkeypatch.setattr(fast_trials, "SECONDS", 0.0)
    search.search("0" * 16, params, storage_url(params.tune), fast_trials.prepare)
    drawn = {path.name for path in paths.TUNING_FIGURES.glob("*.png")}
    assert drawn == {"history.png", "importance.png", "parallel.png", "slice.png", "intermediate.png"}
    for path in paths.TUNING_FIGURES.glob("*.png"):
        image = np.asarray(Image.open(path))
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert (border == 255).all(), f"{path.name}: a label is cut off at the edge"


def test_importances_are_shares_of_the_variance(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a sum of two terms on a full grid, where the shares are known."""
    params = tiny(**TUNE | {"tune.storage": f"sqlite:///{place}/study.db"})
    study = open_study("0" * 16, params, storage_url(params.tune))
    by_schedule = {"linear": 540.0, "cosine": 495.0, "sigmoid": 468.0}
    by_rate = {3e-4: 0.0, 6e-4: 4.0, 1.2e-3: 8.0, 2.4e-3: 12.0}
    for schedule, lr in itertools.product(by_schedule, by_rate):
        study.enqueue_trial({"train.lr": lr, "train.lr_schedule": "cosine", "diffusion.schedule": schedule})
        with quiet():
            trial = study.ask()
        for dimension in read_space(params):
            dimension.suggest(trial)
        study.tell(trial, by_schedule[schedule] + by_rate[lr])
    drawn: dict[str, Figure] = {}
    monkeypatch.setattr(report, "_save", lambda figure, path: drawn.update({path.name: figure}))
    report.plot_figures(study)
    axes = drawn["importance.png"].axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    shares = dict(zip(names, (bar.get_width() for bar in axes.patches), strict=False))
    variances = np.var(list(by_schedule.values())), np.var(list(by_rate.values()))
    assert shares["diffusion.schedule"] == pytest.approx(variances[0] / sum(variances), abs=0.05)
    assert shares["train.lr"] == pytest.approx(variances[1] / sum(variances), abs=0.05)


def test_each_trial_is_a_run_below_the_studys(
    place: Path, database: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    def pictured(self: trial.Trainings, trainer: Trainer, attempt: Attempt, tracker: Tracker) -> float:
        if attempt.number == 1:
            raise trial.PrunedError("not worth it")
        monkeypatch.setattr(trial, "score", lambda *_: formula(self, trainer, attempt))
        return real_score(self, trainer, attempt, tracker)

    monkeypatch.setattr(trial.Trainings, "_score", pictured)
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)  # of somebody else
    params = tiny(**TUNE | {"tracking.enabled": True, "tune.storage": f"sqlite:///{place}/optuna/study.db"})
    stop_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        search.tune(params)
    monkeypatch.setattr(trial, "train", loop.train)
    search.tune(params)

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
        assert run.data.params["whole.train.lr"] == rows[number]["train.lr"]
        assert run.data.metrics["fd_lite0"] == float(rows[number]["value"])
        curve = client.get_metric_history(run.info.run_id, "val/common_error")
        assert sorted({point.step for point in curve}) == list(range(1, 9))
        assert [file.path for file in client.list_artifacts(run.info.run_id, "samples")] == ["samples/samples.png"]
    least = min(rows.values(), key=lambda row: float(row["value"]))
    assert parent.data.tags["best_trial"] == least["number"]
    assert {key: parent.data.tags[f"best_{key}"] for key in SPACE} == {key: least[key] for key in SPACE}
    assert parent.data.metrics["best/fd_lite0"] == float(least["value"])
    assert {file.path for file in client.list_artifacts(parent.info.run_id, "tuning")} >= {"tuning/trials.csv"}


real_score = trial.Trainings._score
