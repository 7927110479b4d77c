"""The weights stage: whether FID's network can be had."""

import json
import sys
from importlib.metadata import version

from diffusion import paths
from diffusion.atomic import write_json
from diffusion.config import Params
from diffusion.data.download.inception_weights import (
    EXTRACTORS,
    WeightsUnavailableError,
    find_inception_weights,
    put,
    sha256,
)
from diffusion.errors import UserError


def write_card(params: Params) -> None:
    """The weights stage: fetch Inception's if `evaluate.inception` wants them, write which ones there are.

    data/weights.json holds no path and no date: references and scores are made again when its content changes. DVC asks
    once; `make weights` asks again. DVC leaves the last answer where it is, so that a change can be said.

    Raises:
        UserError: weights are required and cannot be had, or the file that was named or put there is unfit.
    """
    config, found = params.evaluate, None
    try:
        found = None if config.inception == "off" else find_inception_weights(config)
    except WeightsUnavailableError as error:
        if config.inception == "require":
            raise UserError(f"evaluate.inception is require and the weights are missing ({error}): {put()}") from None
        print(f"no Inception weights: not at hand, and not to be fetched ({error})", file=sys.stderr)
    card = {"inception_sha256": sha256(found) if found else None, **{name: version(name) for name in EXTRACTORS}}
    _say_change(card)
    write_json(paths.WEIGHTS_CARD, card)


def _say_change(card: dict[str, str | None]) -> None:
    try:
        before = json.loads(paths.WEIGHTS_CARD.read_text())
    except (OSError, ValueError):  # the first answer, or a damaged one
        return
    changed = {key: now for key, now in card.items() if before.get(key) != now}
    words = "; ".join(f"{key} was {before.get(key) or 'none'}, is {now or 'none'}" for key, now in changed.items())
    said = f"{words}: `dvc repro` runs what depends on it" if changed else "nothing has changed"
    print(f"weights: {said}", file=sys.stderr)
