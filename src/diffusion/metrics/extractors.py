"""Which feature extractors a run uses: EfficientNet-Lite0 always, Inception as `evaluate.inception` says."""

from pathlib import Path

import click

from diffusion import paths
from diffusion.config import EvaluateConfig
from diffusion.data.download.inception_weights import answer, at_hand, put, sha256
from diffusion.errors import UserError
from diffusion.metrics.features import EfficientNetLite0, Extractor, Inception
from diffusion.rules import INFINITY_ROWS

AGAIN = "run `dvc repro -sf reference`"  # -s: without it, -f would force the download too
OTHERWISE = "or set evaluate.measures without frechet (KID, kid, is unbiased for few), or evaluate.inception: off"


def reference_images(config: EvaluateConfig, extractor: Extractor) -> int:
    """How many real images, the first of the split, `extractor` is given."""
    return config.inception_images if isinstance(extractor, Inception) else config.reference_images


def kept_images(config: EvaluateConfig, available: int) -> int:
    """How many of `available` images keep their features, for the measures that need more than moments."""
    return min(config.kept_features, available) if set(config.measures) - {"frechet"} else 0


def for_reference(config: EvaluateConfig, weights: Path | None, available: int, *, speak: bool) -> list[Extractor]:
    """fd_lite0's always, Inception's if there are weights; for references from `available` images.

    Raises:
        UserError: more images are asked for than there are, or fewer than FID needs.
    """
    extractors: list[Extractor] = [EfficientNetLite0(precision=config.precision)]
    if weights:
        inception = Inception(weights, config.precision)
        if speak and not inception.published:
            mine = (
                f"evaluate.inception_weights = {config.inception_weights}: not the 2015-12-05 weights, so this `fid` "
            )
            click.secho(mine + "is comparable with no published number", fg="yellow", bold=True, err=True)
        extractors.append(inception)
    for extractor in extractors:
        count = reference_images(config, extractor)
        if count > available:
            raise UserError(f"{count} reference images are asked for and {config.reference_split} has {available}")
        kept = min(config.kept_features, config.repeats * count)
        if isinstance(extractor, Inception) and "infinity" in config.measures and kept < INFINITY_ROWS * extractor.dim:
            raise UserError(
                f"evaluate.measures has infinity, which needs {INFINITY_ROWS * extractor.dim} samples for fid and gets "
                f"{kept}: raise evaluate.inception_images and evaluate.kept_features, or take it out"
            )
        if isinstance(extractor, Inception) and "frechet" in config.measures and count < extractor.dim:
            raise UserError(
                f"evaluate.inception_images = {count}: FID needs at least {extractor.dim} images a side: raise it, "
                f"{OTHERWISE}"
            )
    return extractors


def for_samples(config: EvaluateConfig, count: int, folder: Path) -> list[Extractor]:
    """The same for `count` samples that are compared with the references in `folder`.

    Raises:
        UserError: fewer samples than FID needs, or the weights that the reference was made with are gone.
    """
    extractors: list[Extractor] = [EfficientNetLite0(precision=config.precision)]
    if config.inception == "require" or (config.inception != "off" and (folder / "fid.npz").exists()):
        each = min(count, config.repeats * config.inception_images) // config.repeats
        if "frechet" in config.measures and each < Inception.dim:
            parts = f" in each of evaluate.repeats = {config.repeats} blocks" if config.repeats > 1 else ""
            raise UserError(
                f"FID needs at least {Inception.dim} samples and there are {each}{parts}: raise sample.num_images, "
                f"{OTHERWISE}"
            )
        extractors.append(Inception(_weights_again(config, answer()), config.precision))
    return extractors


def inception_weights(config: EvaluateConfig) -> Path | None:
    """Inception's weights that the weights stage found; None, loudly, if it found none.

    Raises:
        UserError: they are required and not there, or not what the stage found.
    """
    if config.inception == "off":
        return None
    wanted = answer()
    if wanted is not None:
        return _weights_again(config, wanted)
    if config.inception == "require":
        raise UserError(f"evaluate.inception is require and the weights are not at hand: {put()}")
    click.secho(f"FID IS SKIPPED: no Inception weights; {put()}", fg="yellow", bold=True, err=True)
    return None


def _weights_again(config: EvaluateConfig, wanted: str | None) -> Path:
    """The weights whose digest data/weights.json has."""
    found = at_hand(config)
    if found is None:
        raise UserError(f"Inception's weights are gone: {put()}, or set evaluate.inception: off")
    if sha256(found) != wanted:
        raise UserError(f"{found} is not what {paths.WEIGHTS_CARD} says: run `make weights`, then `dvc repro`")
    return found
