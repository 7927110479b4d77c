"""What `evaluate.measures` names, of the features of samples against a reference: numbers, and what they depend on."""

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from torch import Tensor

from diffusion.config import EvaluateConfig
from diffusion.errors import UserError
from diffusion.metrics import Moments
from diffusion.metrics.extraction import Extracted
from diffusion.metrics.frechet import frechet_at_infinity
from diffusion.metrics.names import metric_name
from diffusion.metrics.neighbours import COPY_QUANTILE, KID_SUBSETS, NEIGHBOURHOOD, copies, kid, precision_recall
from diffusion.metrics.reference import Reference

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
    judge = Judge(config, extractor, reference)
    for measure in dict.fromkeys(config.measures):
        yield from getattr(judge, measure)(found)


@dataclass(frozen=True)
class Judge:
    """The measures, by the words of `evaluate.measures`, against one reference."""

    config: EvaluateConfig
    extractor: str
    reference: Reference

    def frechet(self, found: Extracted) -> Iterator[Measured]:
        """The distance over all samples; of `evaluate.repeats` equal blocks mean, standard deviation and minimum."""
        count, blocks, details = found.moments.count, found.blocks, {}
        numbers = {self._name("frechet", count): self._distance(found.moments)}
        if len(blocks) > 1:
            values = [self._distance(block) for block in blocks]
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

    def _distance(self, moments: Moments) -> float:
        return moments.distance(self.reference)

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
