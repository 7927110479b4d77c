"""Judging samples: their features against the references of real images, one number or more a measure."""

import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from diffusion import paths
from diffusion.config import EvaluateConfig, Params
from diffusion.data.npz import load_samples
from diffusion.distributed import SINGLE_PROCESS, World
from diffusion.errors import UserError
from diffusion.metrics.extraction import Extracted, features_of, for_samples, kept_images, reference_images
from diffusion.metrics.features import Extractor, Inception
from diffusion.metrics.frechet import frechet_at_infinity
from diffusion.metrics.names import metric_name
from diffusion.metrics.neighbours import COPY_QUANTILE, KID_SUBSETS, NEIGHBOURHOOD, copies, kid, precision_recall
from diffusion.metrics.reference import Reference
from diffusion.runtime import keep_freed_memory, resolve_device


def evaluate(
    params: Params,
    samples: Path,
    about: Mapping[str, Any],
    folder: Path = paths.REFERENCE,
    world: World = SINGLE_PROCESS,
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


PAIRS = 16  # closest pairs of a sample and a training image that are kept


@dataclass(frozen=True)
class Measured:
    """One measure: its numbers by name, how many samples they are of, and what else there is to say."""

    measure: str
    numbers: dict[str, float]
    samples: int
    details: dict[str, Any]


def measured(config: EvaluateConfig, extractor: str, found: Extracted, reference: Reference) -> Iterator[Measured]:
    """Each of `evaluate.measures`, of the features `found` of samples by the extractor whose `metric` is named.

    Raises:
        UserError: there are too few samples for a measure.
    """
    measures = Measures(config, extractor, reference)
    for measure in dict.fromkeys(config.measures):
        yield from getattr(measures, measure)(found)


@dataclass(frozen=True)
class Measures:
    """The measures, by the words of `evaluate.measures`, against one reference."""

    config: EvaluateConfig
    extractor: str
    reference: Reference

    def frechet(self, found: Extracted) -> Iterator[Measured]:
        """The distance over all samples; of `evaluate.repeats` equal blocks mean, standard deviation and minimum."""
        count, blocks, details = found.moments.count, found.blocks, {}
        numbers = {self._name("frechet", count): found.moments.distance(self.reference)}
        if len(blocks) > 1:
            values = [block.distance(self.reference) for block in blocks]
            name = self._name("frechet", blocks[0].count, blocks=len(blocks))
            spread = {"mean": np.mean(values), "std": np.std(values, ddof=1), "min": np.min(values)}
            numbers |= {f"{name}_{key}": float(value) for key, value in spread.items()}
            details = {"blocks": values}
        yield Measured("frechet", numbers, count, details)

    def infinity(self, found: Extracted) -> Iterator[Measured]:
        """The distance extrapolated to infinitely many samples."""
        rows, reference = found.kept, self.reference
        value = frechet_at_infinity(rows.numpy(), reference.mean, reference.cov)
        yield Measured("infinity", {self._name("infinity", len(rows)): value}, len(rows), {})

    def kid(self, found: Extracted) -> Iterator[Measured]:
        """Mean and standard deviation over random subsets."""
        of = kid(found.kept, self._features())
        name, details = self._name("kid", len(found.kept)), {"subsets": KID_SUBSETS, "subset_size": of["subset_size"]}
        yield Measured("kid", {name: of["mean"], f"{name}_std": of["std"]}, len(found.kept), details)

    def precision_recall(self, found: Extracted) -> Iterator[Measured]:
        """Of as many real images as samples."""
        count = min(len(found.kept), len(self._features()))
        precision, recall = precision_recall(found.kept[:count], self._features()[:count])
        names = [self._name(measure, count) for measure in ("precision", "recall")]
        details = {"real_images": count, "neighbourhood": NEIGHBOURHOOD}
        yield Measured("precision_recall", dict(zip(names, (precision, recall), strict=True)), count, details)

    def copies(self, found: Extracted) -> Iterator[Measured]:
        """Share of samples closer to a training image than those are to each other; nothing against test images."""
        if self.reference.key["split"] == "test":
            return
        of = copies(found.kept, self._features())
        closest = of.distances.argsort(stable=True)[:PAIRS].tolist()
        pairs = [[i, int(of.nearest[i]), round(float(of.distances[i]), 4)] for i in closest]
        details = {
            "training_images": len(self._features()),
            "quantile": COPY_QUANTILE,
            "threshold": round(of.threshold, 4),
            "pairs": pairs,  # [sample, training image, distance]
        }
        yield Measured("copies", {self._name("copies", len(found.kept)): of.share}, len(found.kept), details)

    def _features(self) -> Tensor:
        if self.reference.features is None:
            raise UserError("the reference keeps no features: run `dvc repro -sf reference`")
        return self.reference.features

    def _name(self, measure: str, samples: int, blocks: int = 1) -> str:
        split, precision = self.reference.key["split"], self.config.precision
        return metric_name(measure, self.extractor, samples, split, precision=precision, blocks=blocks)


def versions() -> dict[str, str]:
    """What computed the numbers."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "numpy")}}
