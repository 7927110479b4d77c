"""The report stage: figures and a page that shows them."""

from diffusion import paths
from diffusion.config import Params
from diffusion.report.page import read_json, write_page
from diffusion.serving.registry import register
from diffusion.tracking import runs
from diffusion.tracking.journal import JOURNAL


def report(params: Params) -> None:
    """Write report/, here and to the model's run: loss.png, noising.png, ..., and index.html, which holds all pictures.

    Raises:
        UserError: an output of an earlier stage is missing or damaged.
    """
    card = read_json(paths.SAMPLES_CARD)
    journal, known = paths.RUNS / card["fingerprint"] / JOURNAL, card | card.get("made_by", {})
    tracker = runs.attach(
        params.tracking, card["run_id"], stage="report", journal=journal, card=known, register=register
    )
    with runs.closing_status(tracker, "report"):
        write_page(card, paths.REPORT)
        for path in sorted(paths.REPORT.iterdir()):
            tracker.artifact(path, "report")
