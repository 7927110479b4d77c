"""The evaluate stage: scores of the samples, to metrics/evaluate.json and to the model's run."""

import json
from typing import Any

from diffusion import evaluation, paths, tracking
from diffusion.config import Params, flat
from diffusion.distributed import joined
from diffusion.errors import UserError
from diffusion.journal import NullTracker, Tracker
from diffusion.metrics.names import shown


def judge(params: Params) -> None:
    """Write metrics/evaluate.json and log the scores.

    Raises:
        UserError: samples or references are missing or unfit.
    """
    with joined(params.evaluate.device) as (world, _):
        about = world.together(_read_card)
        tracker: Tracker = NullTracker()
        if world.is_main:
            journal = paths.RUNS / about["fingerprint"] / "journal.jsonl"
            tracker = tracking.attach(params.tracking, about["run_id"], stage="evaluate", journal=journal)
        with tracking.closing_status(tracker, "evaluate"):
            tracker.params(flat(params.evaluate, "evaluate"))
            result = evaluation.evaluate(params, paths.SAMPLES_NPZ, about, world=world)
            if world.is_main:
                _report(result, about["step"], tracker)


def _report(result: dict[str, Any], step: int, tracker: Tracker) -> None:
    paths.EVALUATE_METRICS.parent.mkdir(parents=True, exist_ok=True)
    paths.EVALUATE_METRICS.write_text(json.dumps(result, indent=2) + "\n")
    scores = {name: value for name, value in result.items() if name != "about"}
    tracker.metrics({f"evaluate/{name}": value for name, value in scores.items()}, step)
    tracker.artifact(paths.EVALUATE_METRICS)
    print("  ".join(f"{name} {shown(value)}" for name, value in scores.items()))


def _read_card() -> dict[str, Any]:
    try:
        card: dict[str, Any] = json.loads(paths.SAMPLES_CARD.read_text())
    except FileNotFoundError:
        raise UserError(f"{paths.SAMPLES_CARD} is missing: run `dvc repro sample`") from None
    except ValueError as error:
        raise UserError(f"{paths.SAMPLES_CARD} is not JSON ({error}): run `dvc repro -f sample`") from None
    return card
