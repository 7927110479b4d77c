"""Judging samples: their features against the references of real images, one number or more a measure."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from diffusion import paths
from diffusion.config import EvaluateConfig, Params
from diffusion.data.image_sets import load_samples
from diffusion.distributed import ALONE, World
from diffusion.metrics.extraction import Extracted, features_of
from diffusion.metrics.extractors import for_samples, kept_images, reference_images
from diffusion.metrics.features import Extractor, Inception
from diffusion.metrics.measures import measured, versions
from diffusion.metrics.reference import Reference
from diffusion.runtime import keep_freed_memory, resolve_device


def evaluate(
    params: Params, samples: Path, about: Mapping[str, Any], folder: Path = paths.REFERENCE, world: World = ALONE
) -> dict[str, Any]:
    """`evaluate.measures` of the images in `samples` (npz) against the references in `folder`, shared by `world`.

    {"fd_lite0_2k": value, ..., "about": [{"metric": its name, ...}, ...]}, named by metrics.names; `about` says how the
    samples were made and is copied beside each number. Inception's only if there is a reference for it; it judges the
    first evaluate.repeats times evaluate.inception_images samples. None with `evaluate.inception: off`.

    Raises:
        UserError: the samples are not uint8 images or too few, or a reference does not fit, in shape for example.
    """
    config = params.evaluate
    device = resolve_device(config.device)  # "cuda" is the GPU of this rank
    keep_freed_memory()
    images, judges = world.together(lambda: _judges(config, samples, folder))
    result: dict[str, Any] = {"about": []}  # a list: `dvc metrics` shows the numbers alone
    for extractor, reference in judges:
        chosen = images[: config.repeats * config.inception_images] if isinstance(extractor, Inception) else images
        keep, name = kept_images(config, len(chosen)), extractor.metric
        found = features_of(chosen, extractor, config.batch_size, device, name, world, keep=keep, blocks=config.repeats)
        numbers, entries = world.together(partial(_numbers, config, name, found, reference, about, world))
        result |= numbers
        result["about"] += entries
    shared: dict[str, Any] = world.broadcast(result)
    return shared


def _numbers(
    config: EvaluateConfig,
    extractor: str,
    found: Extracted,
    reference: Reference,
    about: Mapping[str, Any],
    world: World,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """One extractor's numbers by name, and for each measure what they depend on: one process's work."""
    numbers: dict[str, float] = {}
    entries = []
    for one in measured(config, extractor, found, reference) if world.is_main else ():
        numbers |= one.numbers
        identity = {"metric": next(iter(one.numbers)), "measure": one.measure, "samples": one.samples}
        entries.append({**identity, **one.details, "reference": reference.key, "versions": versions(), **about})
    return numbers, entries


def _judges(
    config: EvaluateConfig, samples: Path, folder: Path
) -> tuple[np.ndarray, list[tuple[Extractor, Reference]]]:
    """The samples, and with what they are scored."""
    images, judges = load_samples(samples), []
    for extractor in for_samples(config, len(images), folder):
        real = reference_images(config, extractor)
        kept = {"kept": kept_images(config, real)} if kept_images(config, real) else {}
        reference = Reference.load(
            folder / f"{extractor.metric}.npz",
            extractor.describe(),
            split=config.reference_split,
            images=real,
            image_shape=list(images.shape[1:]),
            **kept,
        )
        judges.append((extractor, reference))
    return images, judges
