"""The weights of FID's Inception: where they are looked for and fetched from, and which ones the pipeline has."""

import hashlib
import json
import os
from pathlib import Path

from diffusion import paths
from diffusion.config import EvaluateConfig
from diffusion.errors import UserError

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_NAMES = (INCEPTION_FILE, "weights-inception-2015-12-05-6726825d.pth")  # pytorch-fid's, torch-fidelity's
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # both names have these bytes
INCEPTION_URLS = {
    "pytorch-fid": f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_NAMES[0]}",
    "torch-fidelity": f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_NAMES[1]}",
}
EXTRACTORS = ("torch-fidelity", "efficientnet-lite-pytorch")  # packages with the networks


class WeightsUnavailableError(Exception):
    """The Inception weights are not at hand and could not be fetched; the message is the reason, one line."""


def at_hand(config: EvaluateConfig, folder: Path | None = None) -> Path | None:
    """The weights that `evaluate.inception_weights` names; else those in `folder` or torch's cache; None without any.

    `folder` is data/weights of the repository if not given.

    Raises:
        UserError: a file was named and is not there, or the one in `folder` is damaged.
    """
    if config.inception_weights is not None:
        named = paths.named(config.inception_weights)
        if not named.is_file():
            raise UserError(f"evaluate.inception_weights = {config.inception_weights}: no such file")
        return named
    folder = folder or paths.WEIGHTS
    for path in (place / name for place in (folder, torch_cache()) for name in INCEPTION_NAMES):
        if path.is_file() and sha256(path) == INCEPTION_SHA256:
            return path
        if path.is_file() and path.parent == folder:  # put there by the user; the cache is not ours to judge
            raise UserError(
                f"{path} is damaged or another file (its sha256 is not {INCEPTION_SHA256}): replace or "
                "remove it; other weights are named in evaluate.inception_weights"
            )
    return None


def find_inception_weights(config: EvaluateConfig, folder: Path | None = None) -> Path:
    """The weights `at_hand`, else from the first of INCEPTION_URLS that works, kept in `folder`.

    A download that was interrupted is continued, also from the other address.

    Raises:
        UserError: as `at_hand`.
        WeightsUnavailableError: none at hand, and no download, because it failed or with `evaluate.inception: local`.
    """
    folder = folder or paths.WEIGHTS
    found = at_hand(config, folder)
    if found:
        return found
    if config.inception == "local":
        raise WeightsUnavailableError("evaluate.inception is local")
    from diffusion.data.download import http  # here: with weights at hand no requests are needed

    reasons = []
    for name, url in INCEPTION_URLS.items():
        try:
            return http.download(url, folder / INCEPTION_FILE, sha256=INCEPTION_SHA256)
        except http.FetchError as error:
            reasons.append(f"{name}: {error}")
    raise WeightsUnavailableError("; ".join(reasons))


def put() -> str:
    """What to do where weights are missing."""
    return f"put {INCEPTION_FILE} into {paths.WEIGHTS}, then `make weights` and `dvc repro`"


def answer() -> str | None:
    """The digest in data/weights.json: of the weights that the stage `weights` found when it looked last; None = none.

    Raises:
        UserError: it has not looked yet, or the file is damaged.
    """
    try:
        found: str | None = json.loads(paths.WEIGHTS_CARD.read_text())["inception_sha256"]
    except FileNotFoundError:
        raise UserError(f"{paths.WEIGHTS_CARD} is missing: run `dvc repro weights`") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{paths.WEIGHTS_CARD} is damaged ({error}): run `make weights`") from None
    return found


def torch_cache() -> Path:
    """Where torch.hub keeps downloaded weights."""
    home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "torch"
    return Path(home).expanduser() / "hub/checkpoints"


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
