"""Measures by neighbours in feature space: KID, improved precision and recall, copies of training images.

KID and precision/recall are torch-fidelity's, which is imported when they are asked for.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion.errors import UserError

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # Binkowski et al. 2018, as torch-fidelity and torchmetrics have it
NEIGHBOURHOOD = 3  # k of Kynkaanniemi et al. 2019
COPY_QUANTILE = 0.01
BLOCK = 1024  # rows whose distances are in memory at once


@dataclass(frozen=True)
class Copies:
    """Nearest training neighbours of samples; `share` is COPY_QUANTILE for fresh images of the same distribution."""

    share: float
    threshold: float  # distance below which a sample counts as a copy
    distances: Tensor  # float32 (N,): of each sample to its nearest training image
    nearest: Tensor  # int64 (N,): which one that is


def kid(samples: Tensor, reference: Tensor, *, seed: int = 0) -> dict[str, Any]:
    """Kernel distance of features float32 (N, d) and (M, d): {"mean", "std"} over random subsets, "subset_size".

    The unbiased squared MMD with the kernel (x.y / d + 1)^3. A subset is at most half of the smaller set: of subsets
    that are the whole set `std` would be rounding.

    Raises:
        UserError: fewer than four rows, or widths that differ.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    _check("KID", samples, reference, 4)
    size = min(KID_SUBSET_SIZE, min(len(samples), len(reference)) // 2)
    found = kid_features_to_metric(
        samples, reference, kid_subsets=KID_SUBSETS, kid_subset_size=size, rng_seed=seed, verbose=False
    )
    return {"mean": found[KEY_METRIC_KID_MEAN], "std": found[KEY_METRIC_KID_STD], "subset_size": size}


def precision_recall(samples: Tensor, reference: Tensor) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eqs. 1-3), each 0 to 1, of features (N, d) and (M, d).

    Both grow with the number of images on the other side: give the same number of each.

    Raises:
        UserError: not more rows than neighbours, or widths that differ.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    _check("precision_recall", samples, reference, NEIGHBOURHOOD + 1)
    found = prc_features_to_metric(
        samples, reference, prc_neighborhood=NEIGHBOURHOOD, prc_batch_size=BLOCK, save_cpu_ram=True, verbose=False
    )
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]


def copies(samples: Tensor, training: Tensor) -> Copies:
    """How many samples are closer to a training image than training images are to each other; features (N, d), (M, d).

    The threshold is the COPY_QUANTILE quantile of the distances of each training image to its nearest other one. A
    sample is counted if its distance to its nearest training image is below it, or 0: where more of the training images
    than that have a twin the threshold is 0 itself.

    Raises:
        UserError: fewer than two training rows, or widths that differ.
    """
    _check("copies", samples, training, 1, 2)
    between, _ = nearest(training, training, other=True)
    threshold = float(torch.quantile(between.double(), COPY_QUANTILE))
    distances, index = nearest(samples, training)
    return Copies(float(((distances < threshold) | (distances == 0)).double().mean()), threshold, distances, index)


def nearest(rows: Tensor, among: Tensor, *, other: bool = False) -> tuple[Tensor, Tensor]:
    """Euclidean distance of each row (N, d) to the nearest of `among` (M, d), and that one's index: (N,), (N,).

    `other`: both are the same rows, and none is its own neighbour. Exact distances of the winners: equal rows have 0.
    """
    indices = []
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        found = torch.cdist(block, among)  # by products: fast, but squares that cancel leave rounding
        if other:
            own = torch.arange(len(block))
            found[own, own + start] = torch.inf
        indices.append(found.argmin(dim=1))
    index = torch.cat(indices)
    return (rows - among[index]).norm(dim=1), index


def _check(measure: str, samples: Tensor, reference: Tensor, least: int, least_reference: int | None = None) -> None:
    if samples.shape[1:] != reference.shape[1:]:
        shapes = f"{tuple(samples.shape)} and {tuple(reference.shape)}"
        raise UserError(f"features of shapes {shapes} cannot be compared: were they made by one extractor?")
    real = least_reference or least
    if len(samples) < least or len(reference) < real:
        there = f"there are {len(samples)} and {len(reference)}"
        raise UserError(f"{measure} needs at least {least} samples and {real} real images, and {there}: give more")
