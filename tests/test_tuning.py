"""The search: how many trials, which points, what is written. Trainings are real, scores mostly a formula."""

import csv
import math
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from conftest import REPO, TINY
from ruamel.yaml import YAML

from diffusion import config, paths, training, tuning
from diffusion.data import Dataset
from diffusion.errors import UserError
from diffusion.evaluation import evaluate
from diffusion.export import load_model, save_model
from diffusion.features import EfficientNetLite0
from diffusion.parameterization import Denoiser
from diffusion.previews import preview_config
from diffusion.reference import Reference, make_reference
from diffusion.runtime import resolve_device
from diffusion.sampling import generate
from diffusion.schedules import make_schedule
from diffusion.training import Record, Trainer

TUNE = {"tracking.enabled": False, "tune.images_per_trial": 8, "tune.sample_images": 4, "tune.trials": 3}


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
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(paths, "OPTUNA_DB", tmp_path / "optuna/study.db")
    monkeypatch.setattr(Dataset, "load", lambda: tiny_data)
    monkeypatch.setattr(tuning, "EfficientNetLite0", StubExtractor)
    monkeypatch.setattr(tuning, "score", formula)
    write_reference(images=20)
    return tmp_path


def write_reference(images: int) -> None:
    key = {"split": "train", "images": images, "extractor": {"name": "stub"}}
    Reference(np.zeros(2), np.eye(2), key).save(paths.REFERENCE / "fd_lite0.npz")


def formula(trainer: Trainer, *_: Any) -> float:
    assert trainer.progress.step == trainer.config.train.steps, "scored before the training's end"
    return 10.0 + abs(math.log10(trainer.config.train.lr) + 3) + len(trainer.config.diffusion.schedule)


def table() -> list[dict[str, str]]:
    with paths.TRIALS_CSV.open(newline="") as file:
        return list(csv.DictReader(file))


def states() -> list[str]:
    return [row["state"] for row in table()]


def studies() -> list[str]:
    return optuna.get_all_study_names(f"sqlite:///{paths.OPTUNA_DB}")


def stop_after(trials: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM comes after the first step of trial number `trials` (from 0) of the sitting."""
    seen: list[Path] = []

    def interrupted(trainer: Trainer) -> Iterator[Record]:
        seen.append(trainer.folder)
        for record in training.train(trainer):
            if len(seen) > trials:
                os.kill(os.getpid(), signal.SIGTERM)
            yield record

    monkeypatch.setattr(tuning, "train", interrupted)


def test_trials_are_counted_over_all_sittings(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = tiny(**TUNE | {"tune.trials": 5})
    stop_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt, match=r"stopped after 2 trials; `make tune` goes on"):
        tuning.tune(params)
    assert states() == ["COMPLETE", "COMPLETE", "FAIL"]
    assert len(list(paths.RUNS.glob("*/step_00000001-*.pt"))) == 1, "the stopped training was saved"
    monkeypatch.setattr(tuning, "train", training.train)
    tuning.tune(params)
    assert sorted(states()) == ["COMPLETE"] * 5 + ["FAIL"]
    tuning.tune(params)  # nothing left
    assert len(table()) == 6
    tuning.tune(tiny(**TUNE | {"tune.trials": 6}))  # raised: the same study goes on
    assert states().count("COMPLETE") == 6
    assert len(studies()) == 1


def test_a_trial_that_is_asked_to_stop_while_it_is_scored_counts(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(trainer: Trainer, *rest: Any) -> float:
        os.kill(os.getpid(), signal.SIGINT)
        return formula(trainer, *rest)

    monkeypatch.setattr(tuning, "score", stopped)
    for done in (1, 2):
        with pytest.raises(KeyboardInterrupt, match=f"stopped after {done} trials"):
            tuning.tune(tiny(**TUNE))
    tuning.tune(tiny(**TUNE))  # the last one needs no going on
    assert states() == ["COMPLETE"] * 3


def test_no_point_is_proposed_twice(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = tiny(**TUNE | {"tune.trials": 6})
    for _ in range(3):
        stop_after(1, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            tuning.tune(params)
    monkeypatch.setattr(tuning, "train", training.train)
    tuning.tune(params)
    rates = [float(row["train.lr"]) for row in table()]
    assert len(rates) == 9
    assert len(set(rates)) == len(rates)
    assert all(params.tune.lr[0] <= rate <= params.tune.lr[1] for rate in rates)


def test_a_trial_that_a_dead_process_left_running_fails_and_does_not_count(
    place: Path, tiny: Callable[..., config.Params]
) -> None:
    params = tiny(**TUNE)
    reference = Reference.load(paths.REFERENCE / "fd_lite0.npz", {"name": "stub"})
    name = tuning.study_name(params, "tiny", reference)
    paths.OPTUNA_DB.parent.mkdir()
    killed = f"import optuna, os, signal; s = optuna.create_study(study_name={name!r}, storage=" + (
        f"'sqlite:///{paths.OPTUNA_DB}'); s.ask(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", killed], capture_output=True, check=False).returncode == -9
    with sqlite3.connect(paths.OPTUNA_DB) as database:
        assert database.execute("SELECT state FROM trials").fetchall() == [("RUNNING",)]
    tuning.tune(params)
    assert states() == ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]


def test_best_is_the_least_of_the_table_and_loads_as_overrides(
    place: Path, tiny: Callable[..., config.Params], capsys: pytest.CaptureFixture[str]
) -> None:
    tuning.tune(tiny(**TUNE | {"tune.trials": 5, "tune.lr": [1e-6, 1e-4]}))
    least = min(table(), key=lambda row: float(row["value"]))
    tree = YAML(typ="safe", pure=True).load(paths.BEST_YAML)
    overrides = {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}
    assert {key: str(value) for key, value in overrides.items()} == {key: least[key] for key in tuning.SEARCHED}
    params = config.load(REPO / "params.yaml", {**TINY, **overrides})
    assert params.train.lr == float(least["train.lr"])
    for row in table():
        exact = 10.0 + abs(math.log10(float(row["train.lr"])) + 3) + len(row["diffusion.schedule"])
        assert float(row["value"]) == exact
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trial ")]
    assert [line.split(":")[0] for line in lines] == [f"trial {i} ({i + 1} of 5)" for i in range(5)]
    assert f"best {float(least['value']):.2f} (trial {least['number']})" in lines[-1]


@pytest.mark.parametrize(
    "change",
    [{"tune.lr": [1e-4, 1e-3]}, {"tune.schedules": ["cosine"]}, {"train.ema_decay": 0.5}, {"seed": 1}],
    ids=lambda change: next(iter(change)),
)
def test_a_changed_setting_is_another_study(
    place: Path, tiny: Callable[..., config.Params], change: dict[str, Any]
) -> None:
    tuning.tune(tiny(**TUNE | {"tune.trials": 1}))
    tuning.tune(tiny(**TUNE | {"tune.trials": 2} | change))
    assert states() == ["COMPLETE"] * 2
    assert len(studies()) == 2


def test_applying_the_best_values_keeps_the_study(place: Path, tiny: Callable[..., config.Params]) -> None:
    searched = {"train.lr": 1e-5, "train.lr_schedule": "constant", "diffusion.schedule": "sigmoid"}
    reference = Reference.load(paths.REFERENCE / "fd_lite0.npz", {"name": "stub"})
    names = {tuning.study_name(tiny(**TUNE | values), "tiny", reference) for values in ({}, searched)}
    assert len(names) == 1
    assert tuning.study_name(tiny(**TUNE), "other data", reference) not in names


@pytest.mark.parametrize("kind", ["raises", "never finite"])
def test_divergence_prunes_with_the_reason(
    place: Path, tiny: Callable[..., config.Params], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    made: list[Path] = []

    def diverging(trainer: Trainer) -> Iterator[Record]:
        made.append(trainer.folder)
        if len(made) == 1:
            if kind == "raises":
                raise UserError("the loss was not finite")
            return
        yield from training.train(trainer)

    monkeypatch.setattr(tuning, "train", diverging)
    tuning.tune(tiny(**TUNE))
    assert states() == ["PRUNED", "COMPLETE", "COMPLETE"]
    assert "not finite" in table()[0]["reason"] or "never finite" in table()[0]["reason"]
    assert table()[0]["value"] == ""


def test_a_trial_is_the_same_training_cut_short(tiny: Callable[..., config.Params]) -> None:
    base = config.load(REPO / "params.yaml")
    cut = tuning.trial_config(base, {"train.lr": 3e-4, "diffusion.schedule": "sigmoid"})
    assert (cut.train.lr, cut.diffusion.schedule, cut.train.lr_schedule) == (3e-4, "sigmoid", base.train.lr_schedule)
    assert cut.train.steps == base.tune.images_per_trial // base.train.batch_size
    assert cut.train.warmup_steps / cut.train.steps == pytest.approx(
        base.train.warmup_steps / base.train.steps, rel=0.1
    )
    shortest = tuning.trial_config(tiny(**{"tune.images_per_trial": 1}), {}).train
    every = (shortest.log_every, shortest.validate_every, shortest.preview_every, shortest.checkpoint_every)
    assert (shortest.steps, shortest.warmup_steps, *every) == (1, 0, 1, 1, 1, 1)
    whole = tiny(**{"tune.images_per_trial": 32})  # 8 steps of 4: nothing to cut
    assert tuning.trial_config(whole, {}) == config.trained(whole)


def test_a_missing_or_other_reference_is_named(place: Path, tiny: Callable[..., config.Params]) -> None:
    write_reference(images=19)
    with pytest.raises(UserError, match="other images than the evaluate section names: run `dvc repro reference`"):
        tuning.tune(tiny(**TUNE))
    (paths.REFERENCE / "fd_lite0.npz").unlink()
    with pytest.raises(UserError, match=r"fd_lite0.npz cannot be used .* run `dvc repro .*reference`"):
        tuning.tune(tiny(**TUNE))


def test_the_score_is_what_the_stages_would_give(
    tmp_path: Path, tiny: Callable[..., config.Params], tiny_data: Dataset
) -> None:
    params, device = tiny(**TUNE), resolve_device("cpu")
    extractor = EfficientNetLite0()
    reference = make_reference(tiny_data.images[:20].numpy(), "train", extractor, 10, device)
    trainer = Trainer(config.trained(params), tiny_data, tmp_path / "run", device)
    for _ in training.train(trainer):
        pass
    save_model(tmp_path / "model.safetensors", trainer.best, trainer.config, {})
    for parameter in trainer.ema.net.parameters():
        parameter.data.mul_(0.5)  # as if training had gone on and become worse
    value = tuning.score(trainer, params, reference, extractor)
    params = tiny(**TUNE, **{"evaluate.measures": ["frechet"]})

    net, card = load_model(tmp_path / "model.safetensors")  # the way of the sample and evaluate stages
    schedule = make_schedule(card.diffusion.schedule, card.diffusion.num_steps)
    denoiser = Denoiser(net, schedule, card.diffusion.prediction, dtype=trainer.dtype, clip_x0=True)
    images = [batch.numpy() for batch in generate(denoiser, preview_config(card.train), card.seed, range(4), device)]
    np.savez(tmp_path / "images.npz", images=np.concatenate(images))
    reference.save(tmp_path / "fd_lite0.npz")
    assert value == pytest.approx(evaluate(params, tmp_path / "images.npz", {}, tmp_path)["fd_lite0_4"], rel=1e-6)


def test_the_library_imports_without_optuna() -> None:
    code = "import sys; sys.modules['optuna'] = None; import diffusion.tuning, stages.tune"
    path = f"{REPO}/src:{REPO}"
    run = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": path}, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr
