"""What may be searched, and the training that a choice makes."""

from collections.abc import Callable
from typing import Any

import optuna
import pytest
from helpers.project import REPO

from diffusion import config, params_file
from diffusion.errors import UserError
from diffusion.tuning.space import Choices, Span, first_settings, present, read_space, settings, trial_config


def space(text: dict[str, Any], tiny: Callable[..., config.Params]) -> tuple[Any, ...]:
    return read_space(tiny(**{"tune.space": text}))


@pytest.mark.parametrize(
    "recipe", ["params.yaml", *sorted(f"params/{p.name}" for p in (REPO / "params").glob("*.yaml"))]
)
def test_every_recipe_describes_a_space_that_holds_its_own_setting(recipe: str) -> None:
    """So that the first trial is what params.yaml has."""
    params = params_file.load(REPO / recipe)
    assert present(params, read_space(params)) == {
        "train.lr": params.train.lr,
        "train.lr_schedule": params.train.lr_schedule,
        "train.warmup_steps": params.train.warmup_steps,
        "diffusion.schedule": params.diffusion.schedule,
    }


def test_the_first_settings_are_the_present_one_and_each_choice_alone(tiny: Callable[..., config.Params]) -> None:
    text = {
        "train.lr": {"low": 1e-4, "high": 1e-2, "log": True},
        "diffusion.schedule": ["linear", "cosine", "sigmoid"],
        "train.loss_weight": ["min_snr", "simple"],
    }
    params = tiny(**{"tune.space": text, "train.loss_weight": "min_snr", "diffusion.schedule": "cosine"})
    start = {
        "train.lr": params.train.lr,
        "diffusion.schedule": "cosine",
        "train.loss_weight": "min_snr",
    }
    assert first_settings(params, read_space(params)) == [
        start,
        start | {"diffusion.schedule": "linear"},
        start | {"diffusion.schedule": "sigmoid"},
        start | {"train.loss_weight": "simple"},
    ]
    outside = tiny(**{"tune.space": text | {"train.lr": {"low": 0.1, "high": 0.2}}})
    assert first_settings(outside, read_space(outside)) == []


def test_any_number_or_choice_can_be_searched(tiny: Callable[..., config.Params]) -> None:
    found = space(
        {
            "train.warmup_steps": {"low": 0, "high": 8},
            "train.batch_size": {"low": 2, "high": 8, "step": 2},
            "train.weight_decay": {"low": 0, "high": 0.1},
            "model.head_channels": [16, None],
            "train.flip": [True, False],
            "model.dropout": [0, 0.1],
        },
        tiny,
    )
    assert found[:3] == (
        Span("train.warmup_steps", 0, 8, None, False, True),
        Span("train.batch_size", 2, 8, 2, False, True),
        Span("train.weight_decay", 0, 0.1, None, False, False),
    )
    assert found[3:5] == (Choices("model.head_channels", (16, None)), Choices("train.flip", (True, False)))


def test_a_span_has_what_optuna_can_propose(tiny: Callable[..., config.Params]) -> None:
    """Optuna refuses a trial off its grid, and with it all that is done to the study afterwards."""
    size, decay, warmup, channels = space(
        {
            "train.batch_size": {"low": 2, "high": 8, "step": 4},
            "train.weight_decay": {"low": 0.05, "high": 0.3, "step": 0.1},
            "train.warmup_steps": {"low": 0, "high": 8},
            "model.num_blocks": {"low": 1, "high": 8, "log": True},
        },
        tiny,
    )
    assert [value for value in range(10) if size.has(value)] == [2, 6]
    assert [round(k / 20, 2) for k in range(8) if decay.has(round(k / 20, 2))] == [0.05, 0.15, 0.25]
    assert [value for value in range(-1, 10) if warmup.has(value)] == [*range(9)]
    assert [value for value in range(10) if channels.has(value)] == [*range(1, 9)]
    assert not warmup.has(2.5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({"train.lrr": {"low": 1e-4, "high": 1e-3}}, ["train.lrr", "did you mean train.lr?"]),
        ({"difusion.schedule": ["cosine"]}, ["difusion.schedule", "diffusion.schedule"]),
        ({}, ["tune.space is empty"]),
        ({"sample.steps": {"low": 5, "high": 20}}, ["sample.steps", "changes no training"]),
        ({"train.steps": {"low": 5, "high": 20}}, ["train.steps", "tune.images_per_trial"]),
        ({"train.device": ["cpu"]}, ["train.device", "cannot be searched"]),
        ({"train.best_by": ["val_loss", "last"]}, ["train.best_by cannot be searched", "at its end"]),
        ({"model.image_size": [32, 16]}, ["model.image_size cannot be searched", "the data have it"]),
        ({"train.lr": {"low": 1e-4}}, ["train.lr", "high"]),
        ({"train.lr": {"low": 1e-4, "high": 1e-3, "lgo": True}}, ["train.lr", "lgo"]),
        ({"train.lr": {"low": 1e-3, "high": 1e-4}}, ["train.lr", "low comes first"]),
        ({"train.lr": {"low": "a", "high": 1e-4}}, ["train.lr", "numbers"]),
        ({"train.lr": {"low": 1e-4, "high": 5.0, "log": True}}, ["train.lr = 5", "1e-08 to 1"]),
        ({"train.weight_decay": {"low": 0, "high": 0.1, "log": True}}, ["train.weight_decay", "above 0"]),
        ({"train.warmup_steps": {"low": 0.5, "high": 3}}, ["train.warmup_steps", "whole numbers"]),
        ({"train.lr_schedule": {"low": 1, "high": 2}}, ["train.lr_schedule", "no number", "a list"]),
        ({"train.lr_schedule": []}, ["train.lr_schedule", "a list"]),
        ({"train.lr_schedule": "cosine"}, ["train.lr_schedule", "a list"]),
        ({"train.lr_schedule": ["cosine", "cosin"]}, ["train.lr_schedule = 'cosin'", "constant, cosine, linear"]),
        ({"model.multipliers": [[1, 2], [1, 1]]}, ["model.multipliers", "numbers or words"]),
        ({"model.channels": [16, 24]}, ["model.head_channels = 16", "divide"]),  # a rule across keys
    ],
    ids=str,
)
def test_a_bad_space_is_one_line_that_helps(
    text: dict[str, Any], words: list[str], tiny: Callable[..., config.Params]
) -> None:
    with pytest.raises(UserError) as caught:
        space(text, tiny)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_what_is_trained_is_what_the_tables_say(tiny: Callable[..., config.Params]) -> None:
    """Four digits of what Optuna draws, never outside; whole numbers and steps as they are."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    rate, size, decay = space(
        {
            "train.lr": {"low": 1.23456e-4, "high": 1.23556e-4, "log": True},
            "train.batch_size": {"low": 2, "high": 8, "step": 3},
            "train.weight_decay": {"low": 0, "high": 0.3, "step": 0.15},
        },
        tiny,
    )
    for _ in range(30):
        trial = study.ask()
        value = rate.suggest(trial)
        assert 1.23456e-4 <= value <= 1.23556e-4
        assert value == rate.used(study.trials[-1].params["train.lr"])
        assert size.suggest(trial) in (2, 5, 8)
        assert decay.suggest(trial) in (0, 0.15, 0.3)
    assert Span("train.lr", 1e-4, 1e-2, None, True, False).used(0.00123456) == 0.001235


def test_a_trial_is_the_same_training_cut_short(tiny: Callable[..., config.Params]) -> None:
    base = params_file.load(REPO / "params.yaml", {"tune.images_per_trial": 48_000, "train.steps": 6000})
    cut = trial_config(base, {"train.lr": 3e-4, "diffusion.schedule": "sigmoid"})
    assert (cut.diffusion.schedule, cut.train.lr_schedule) == ("sigmoid", base.train.lr_schedule)
    assert cut.train.lr == pytest.approx(6e-4)  # 3e-4 is of a training four times as long
    assert cut.train.steps == base.tune.images_per_trial // base.train.batch_size
    assert cut.train.warmup_steps / cut.train.steps == pytest.approx(
        base.train.warmup_steps / base.train.steps, rel=0.1
    )
    window, whole_window = 1 / (1 - cut.train.ema_decay), 1 / (1 - base.train.ema_decay)
    assert window / cut.train.steps == pytest.approx(whole_window / base.train.steps)
    assert trial_config(base, {"train.lr": 0.9}).train.lr == 1.0  # the largest that is allowed
    shortest = trial_config(tiny(**{"tune.images_per_trial": 1}), {}).train
    every = (shortest.log_every, shortest.validate_every, shortest.preview_every, shortest.checkpoint_every)
    assert (shortest.steps, shortest.warmup_steps, *every) == (1, 0, 1, 1, 1, 1)
    whole = tiny(**{"tune.images_per_trial": 32})  # 8 steps of 4: nothing to cut but the distance of checkpoints
    assert trial_config(whole, {"train.checkpoint_every": 2}) == config.trained(
        tiny(**{"tune.images_per_trial": 32, "train.checkpoint_every": 2})
    )


def test_budget_and_warm_up_follow_what_is_searched() -> None:
    """Trials of any batch size see the same images; a warm-up that is found is the whole training's."""
    base = params_file.load(REPO / "params.yaml", {"tune.images_per_trial": 48_000})
    twice = trial_config(base, {"train.batch_size": 64}).train
    assert (twice.steps, twice.warmup_steps / twice.steps) == (750, pytest.approx(100 / 3000, rel=0.05))
    assert settings(base, {"train.batch_size": 64}) == {"train.batch_size": 64, "train.steps": base.train.steps // 2}
    assert trial_config(base, {"train.warmup_steps": 400}).train.warmup_steps == 400 * 1500 // base.train.steps
    with pytest.raises(UserError, match=r"train\.processes"):
        trial_config(params_file.load(REPO / "params.yaml", {"train.processes": 4}), {"train.batch_size": 2})
