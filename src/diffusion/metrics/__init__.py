"""Measures between sets of features; `python -m diffusion.metrics --help` compares any two sets of images."""

from typing import Any

from diffusion.metrics.frechet import frechet_distance

__all__ = ["Moments", "frechet_distance"]


def __getattr__(name: str) -> Any:
    if name == "Moments":  # torchmetrics takes seconds to import
        from diffusion.metrics.moments import Moments

        return Moments
    raise AttributeError(name)
