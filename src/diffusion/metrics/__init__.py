"""Measures between sets of features; `python -m diffusion.metrics --help` compares any two sets of images."""

from diffusion.metrics.frechet import Moments, frechet_distance

__all__ = ["Moments", "frechet_distance"]
