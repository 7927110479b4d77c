"""The JSON card beside a model file: its config, step, data digest, run id, what made it."""

import json
from pathlib import Path
from typing import Any

from diffusion.errors import UserError


def read_card(path: Path) -> dict[str, Any]:
    """The JSON card of a model file: config, step, data digest, run id, ..."""
    try:
        card: dict[str, Any] = json.loads(card_path(path).read_text())
        card["config"]
    except FileNotFoundError:
        raise UserError(f"{card_path(path)} is missing: run `dvc repro train`") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{card_path(path)} is not a model card ({error}): run `dvc repro -f train`") from None
    return card


def card_path(path: Path) -> Path:
    return path.with_suffix(".json")
