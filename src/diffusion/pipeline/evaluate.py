"""The evaluate stage: scores of the samples, to metrics/evaluate.json and to the model's run."""

import contextlib
import json
import sys
from hashlib import sha256
from typing import Any

from diffusion import paths
from diffusion.atomic import write_json
from diffusion.code_digest import LIBRARY
from diffusion.config import Params, flat
from diffusion.distributed import joined
from diffusion.errors import UserError
from diffusion.locks import only_process
from diffusion.metrics import scores
from diffusion.metrics.names import shown
from diffusion.model.card import read_card
from diffusion.serving import registry
from diffusion.serving.registry import register
from diffusion.tracking import runs
from diffusion.tracking.journal import JOURNAL
from diffusion.tracking.tracker import Tracker

MADE_BY = ("fingerprint", "run_id", "step")  # what the samples' card has of the model's
CARD = ("config", *MADE_BY)  # what is read of the samples' card here


def evaluate(params: Params) -> None:
    """Write metrics/evaluate.json and log the scores.

    Raises:
        UserError: samples or references are missing or unfit.
    """
    with joined(params.evaluate.device) as (world, _), contextlib.ExitStack() as held:
        about = world.together(_read_card)
        drawn_with, code, made_by = about.pop("config"), about.pop("code", None), about.pop("made_by", {})
        about.pop("trained", None)  # the model's card has it
        about.pop("images", None)
        model = world.together(lambda: _model_of(about))
        run = paths.RUNS / about["fingerprint"]
        lock = only_process(run / "evaluate.lock", "is scoring samples of this model", wait=True)
        world.together(lambda: held.enter_context(lock) if world.is_main else None)
        tracker: Tracker = Tracker()
        if world.is_main:
            card, journal = {**made_by, **about}, run / JOURNAL
            tracker = runs.attach(
                params.tracking, about["run_id"], stage="evaluate", journal=journal, card=card, register=register
            )
        with runs.closing_status(tracker, "evaluate"):
            tracker.params(flat(params.evaluate, "evaluate"))
            result = scores.evaluate(params, paths.SAMPLES_NPZ, about, world=world)
            if world.is_main:
                _report(result, about["step"], tracker)
                _register(params.tracking.experiment, model, drawn_with, code, result, tracker)


def _report(result: dict[str, Any], step: int, tracker: Tracker) -> None:
    write_json(paths.EVALUATE_METRICS, result)
    scores = {name: value for name, value in result.items() if name != "about"}
    tracker.metrics({f"evaluate/{name}": value for name, value in scores.items()}, step)
    tracker.artifact(paths.EVALUATE_METRICS)
    print("  ".join(f"{name} {shown(value)}" for name, value in scores.items()))


def _register(
    name: str, card: dict[str, Any], sample: dict[str, Any], code: str | None, result: dict[str, Any], tracker: Tracker
) -> None:
    """Hand the model to the registry with its scores and the section and code that the samples were generated with.

    The library is kept as it is now: what MLflow gets later must not have the code of then.
    """
    scores = [
        {"metric": about["metric"], "value": result[about["metric"]], "of": _conditions(about)}
        for about in result["about"]
        if about["measure"] == "frechet"
    ]
    if not scores:
        print(
            "warning: evaluate.measures lacks frechet: this model can be compared with no other version",
            file=sys.stderr,
        )
    about = registry.described(name, paths.MODEL, card, sample, scores, code)
    library = tracker.keep(LIBRARY, f"code-{about['identity']}")
    tracker.model(paths.MODEL, {**about, "library": str(library)})


def _conditions(about: dict[str, Any]) -> str:
    """What has to be equal for two scores to be comparable."""
    key = {name: value for name, value in about["reference"].items() if name != "kept"}  # of which no distance depends
    digest = sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    return f"{about['samples']} samples against {key['images']} of {key['split']}, {digest}"


def _model_of(samples: dict[str, Any]) -> dict[str, Any]:
    """The card of the model, which has to be the one that drew the samples."""
    card = read_card(paths.MODEL)
    if any(card.get(key) != samples[key] for key in MADE_BY):
        raise UserError(f"{paths.SAMPLES}/ is of another model than {paths.MODEL} is now: run `dvc repro sample`")
    return card


def _read_card() -> dict[str, Any]:
    again = "run `dvc repro -sf sample`"
    try:
        card: dict[str, Any] = dict(json.loads(paths.SAMPLES_CARD.read_text()))
    except FileNotFoundError:
        raise UserError(f"{paths.SAMPLES_CARD} is missing: run `dvc repro sample`") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{paths.SAMPLES_CARD} is no card of samples ({error}): {again}") from None
    lost = [key for key in CARD if key not in card]
    if lost:
        raise UserError(f"{paths.SAMPLES_CARD} is no card of samples (it lacks {', '.join(lost)}): {again}")
    return card
