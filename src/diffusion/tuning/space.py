"""What `tune.space` describes: keys of params.yaml, over what each is searched, the training that a choice makes."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from diffusion.config import Params, TrainedConfig, flat, trained
from diffusion.errors import UserError
from diffusion.params_file import checked, schema, unknown

if TYPE_CHECKING:
    from optuna import Trial

Value = float | int | str | bool | None
SECTIONS = ("diffusion", "model", "train")  # what a trial trains
NO_SETTINGS = [  # no trial's value depends on them
    *(f"train.{key}" for key in ("device", "processes", "micro_batch", "compile", "log_every", "checkpoint_every")),
    *(f"train.{key}" for key in ("preview_every", "preview_images", "evaluate_every", "evaluate_images")),
]
NOT_SEARCHED = {
    "train.steps": "tune.images_per_trial sets it",
    "train.best_by": "a trial is scored at its end alone",
    "train.preview_steps": "every trial is scored alike",
    **dict.fromkeys(NO_SETTINGS, "it is no setting"),
    **dict.fromkeys(("model.image_size", "model.image_channels"), "the data have it"),
}
GRID = 1e-8  # steps that a value may be off it: Optuna's own
LR_HORIZON = 0.5  # the best learning rate of a training that sees D images falls with D to the power of minus this
RECIPE = "# Found for the recipe "  # first line of best.yaml, before the digest
DIGITS = 4  # of a number on a continuous scale: what is trained is what the tables say


@dataclass(frozen=True)
class Choices:
    """One of several values."""

    key: str
    values: tuple[Value, ...]

    def suggest(self, trial: "Trial") -> Value:
        """What `trial` is to take."""
        value: Value = trial.suggest_categorical(self.key, self.values)
        return value

    def used(self, value: Any) -> Value:
        """What Optuna's `value` stands for in params.yaml."""
        found: Value = value
        return found

    def has(self, value: object) -> bool:
        """Whether `value` can be taken."""
        return value in self.values

    def corners(self) -> Sequence[Value]:
        """Values that are allowed if all are."""
        return self.values


@dataclass(frozen=True)
class Span:
    """A number from `low` to `high`, both included; `step` is None on a continuous scale."""

    key: str
    low: float
    high: float
    step: float | None
    log: bool
    whole: bool

    def suggest(self, trial: "Trial") -> Value:
        """What `trial` is to take."""
        if self.whole:
            return trial.suggest_int(self.key, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        return self.used(trial.suggest_float(self.key, self.low, self.high, step=self.step, log=self.log))

    def used(self, value: Any) -> Value:
        """What Optuna's `value` stands for in params.yaml: DIGITS digits of it where the scale is continuous."""
        if self.whole or self.step:
            return int(value) if self.whole else float(value)
        return min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high)

    def has(self, value: object) -> bool:
        """Whether Optuna can propose `value`: it lies within, and on the grid if there is one."""
        if not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        step = self.step or (1 if self.whole else None)
        return step is None or abs((value - self.low) / step - round((value - self.low) / step)) < GRID

    def corners(self) -> Sequence[Value]:
        """Values that are allowed if all are."""
        return [int(v) if self.whole else v for v in (self.low, self.high)]


Dimension = Choices | Span


def read_space(params: Params) -> tuple[Dimension, ...]:
    """The dimensions of `tune.space`, each end and each choice checked as if it stood in params.yaml.

    Raises:
        UserError: a key is unknown (the nearest real one is named) or no setting of a training, its description cannot
            be read, or params.yaml does not allow a value.
    """
    if not params.tune.space:
        raise UserError("tune.space is empty: name a key of params.yaml, for example train.lr: {low: 1e-4, high: 1e-2}")
    found = tuple(_dimension(str(key), text) for key, text in params.tune.space.items())
    for dimension in found:
        for value in dimension.corners():
            try:
                changed(params, settings(params, {dimension.key: value}))
            except UserError as error:
                raise UserError(f"tune.space: {error}") from None
    return found


def settings(params: Params, values: Mapping[str, Value]) -> dict[str, Value]:
    """`values`, and the steps of a whole training where they have another batch size: it sees as many images."""
    train, size = params.train, values.get("train.batch_size")
    if not isinstance(size, int):
        return dict(values)
    return {**values, "train.steps": max(1, round(train.steps * train.batch_size / size))}


def recipe(params: Params) -> dict[str, object]:
    """What a study's trials share of params.yaml: dotted keys of a training but those searched and NO_SETTINGS."""
    without = {*params.tune.space, *NO_SETTINGS, "train.steps"}
    shared = {key: value for key, value in flat(trained(params)).items() if key not in without}
    images = params.train.steps * params.train.batch_size
    if "train.batch_size" in params.tune.space:  # whole steps of the one that is found see some more or less
        images = int(float(f"{images:.2g}"))
    return shared | {"images_seen": images}


def recipe_digest(params: Params) -> str:
    """16 hex digits of `recipe` and the space."""
    known = [recipe(params), params.tune.space]
    return sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def changed(params: Params, values: Mapping[str, Value]) -> Params:
    """`params` with other values of dotted keys.

    Raises:
        UserError: params.yaml does not allow them.
    """
    tree = params.model_dump(mode="json")
    for key, value in values.items():
        section, _, name = key.partition(".")
        tree[section][name] = value
    return checked(Params, tree)


def present(params: Params, space: Sequence[Dimension]) -> dict[str, Value] | None:
    """What `params` have for the searched keys, if all of it can be proposed."""
    known: dict[str, Any] = flat(params.diffusion, "diffusion") | flat(params.model, "model")
    known |= flat(params.train, "train")
    values = {dimension.key: known[dimension.key] for dimension in space}
    return values if all(dimension.has(values[dimension.key]) for dimension in space) else None


def first_settings(params: Params, space: Sequence[Dimension]) -> list[dict[str, Value]]:
    """What a study tries before it proposes: what `params` have, then each other choice of each list, alone.

    One change at a time shows what a choice is worth by itself, which a short study's random trials would not. Empty if
    what `params` have cannot be proposed.
    """
    start = present(params, space)
    if start is None:
        return []
    lists = [dimension for dimension in space if isinstance(dimension, Choices)]
    return [start] + [{**start, d.key: value} for d in lists for value in d.values if value != start[d.key]]


def trial_config(params: Params, values: Mapping[str, Value]) -> TrainedConfig:
    """What a trial trains: `params` with `values` (dotted keys), cut to `tune.images_per_trial`.

    `values` are those of the whole training, so that what is found can be written into params.yaml. Warm-up, the time
    that the EMA averages over and the distance between validations keep their share of the training, no distance
    exceeds its length, and the learning rate is larger by the power LR_HORIZON of the ratio of the two lengths, for
    the best one of a short training is too large for a long one: 0.5 is the theory's for convex losses (Defazio et al.
    2023, arXiv 2310.07831), 0.32 was measured on language models (Bjorck et al. 2024, arXiv 2409.19913).
    benchmarks/tune_rank.py measures what it does here.

    Raises:
        UserError: params.yaml does not allow these values together.
    """
    whole = changed(params, settings(params, values))
    train = whole.train
    steps = max(1, params.tune.images_per_trial // train.batch_size)
    share = min(1.0, steps / train.steps)
    tree = whole.model_dump(mode="json")
    tree["train"] |= {
        "steps": steps,
        "evaluate_every": 0,  # a trial is scored at its end
        "best_by": "last" if train.best_by == "last" else "val_loss",
        "lr": min(1.0, train.lr * share**-LR_HORIZON),
        "warmup_steps": round(train.warmup_steps * share),
        "ema_decay": max(0.0, 1.0 - (1.0 - train.ema_decay) / share),
        "validate_every": max(1, round(train.validate_every * share)),
        "checkpoint_every": max(1, min(train.checkpoint_every, math.ceil(steps / 4))),  # what a kill costs at most
        **{key: min(getattr(train, key), steps) for key in ("log_every", "preview_every")},
    }
    return trained(checked(Params, tree))


def _dimension(key: str, text: object) -> Dimension:
    kinds = schema()
    if key not in kinds:
        raise UserError(f"tune.space: {unknown(key)}")
    if key.split(".")[0] not in SECTIONS:
        raise UserError(f"tune.space: {key} changes no training: search keys of {', '.join(SECTIONS)}")
    if key in NOT_SEARCHED:
        raise UserError(f"tune.space: {key} cannot be searched: {NOT_SEARCHED[key]}")
    if isinstance(text, Mapping):
        return _span(key, text, _number(kinds[key]))
    if isinstance(text, list | tuple) and text and all(isinstance(v, Value) for v in text):
        return Choices(key, tuple(dict.fromkeys(text)))
    raise UserError(f"tune.space: {key} = {text!r}: give {{low, high}}, or a list of numbers or words")


def _span(key: str, text: Mapping[str, Any], kind: type | None) -> Span:
    if kind is None:
        raise UserError(f"tune.space: {key} is no number: give a list of its words")
    if wrong := sorted({"low", "high"} - set(text)) or sorted(set(text) - {"low", "high", "log", "step"}):
        raise UserError(f"tune.space: {key} = {dict(text)}: {wrong[0]} is wrong or missing: low, high[, log or step]")
    low, high, log, step = text["low"], text["high"], text.get("log", False), text.get("step")
    numbers = [v for v in (low, high, step) if v is not None]
    if not isinstance(log, bool) or any(isinstance(v, bool) or not isinstance(v, kind | int) for v in numbers):
        words = "whole numbers" if kind is int else "numbers"
        raise UserError(f"tune.space: {key} = {dict(text)}: low, high and step are {words}, log is true or false")
    if low > high or (log and (low <= 0 or step is not None)) or (step is not None and step <= 0):
        raise UserError(f"tune.space: {key} = {dict(text)}: low comes first; log wants it above 0 and has no step")
    return Span(key, low, high, step, log, kind is int)


def _number(about: Mapping[str, Any]) -> type | None:
    """Int or float for a key of such a JSON Schema, null allowed or not."""
    (first, *others) = about.get("anyOf", [about])
    is_number = "enum" not in first and others in ([], [{"type": "null"}])
    return {"integer": int, "number": float}.get(first.get("type")) if is_number else None
