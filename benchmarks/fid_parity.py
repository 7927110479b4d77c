"""FID by ours, torch-fidelity and torchmetrics: CIFAR-10's first test images against the same ones with noise.

Each extracts its own features once, from the same uint8 images and weights (random ones in the published file's format,
or --weights). Of fewer than 2,048 images the covariances are singular; the three still have to agree. Two times 2,048
images take about ten minutes on two cores. Needs the data: run `dvc repro prepare` once.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from machine import report
from torch import Tensor
from tqdm import tqdm

from diffusion.data.dataset import real_images
from diffusion.metrics.extraction import features_of
from diffusion.metrics.features import Inception
from diffusion.metrics.selftest import noisy, random_weights, torch_fidelitys_fid

CPU, BATCH = torch.device("cpu"), 64

Answer = tuple[float, list[Tensor]]  # the distance, and the features of both sets, (N, 2048)


def ours(weights: Path, sets: tuple[Tensor, Tensor]) -> Answer:
    """As the stages compute it."""
    extractor = Inception(weights)
    a, b = (features_of(x.permute(0, 2, 3, 1).numpy(), extractor, BATCH, CPU, "ours", keep=len(x)) for x in sets)
    distance = a.moments.distance(b.moments)
    return distance, [a.kept, b.kept]


def torch_fidelity(weights: Path, sets: tuple[Tensor, Tensor]) -> Answer:
    """Its extractor and its formula, as its command chains them."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights)).eval()
    with torch.inference_mode():
        found = [torch.cat([network(batch)[0] for batch in batches(x, "torch-fidelity")]) for x in sets]
    return torch_fidelitys_fid(*found), found


def torchmetrics(weights: Path, sets: tuple[Tensor, Tensor]) -> Answer:
    """Its metric without antialiasing, which the definition does not have; its features on their way into it."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(antialias=False, feature_extractor_weights_path=str(weights))
    found: list[list[Tensor]] = []
    metric.inception.register_forward_hook(lambda _, __, features: found[-1].append(features))
    for x, real in zip(sets, (True, False), strict=True):
        found.append([])
        for batch in batches(x, "torchmetrics"):
            metric.update(batch, real=real)
    return float(metric.compute()), [torch.cat(parts) for parts in found]


def batches(images: Tensor, what: str) -> Iterator[Tensor]:
    """With a progress bar called `what`."""
    yield from tqdm(images.split(BATCH), desc=what, unit=" batches")


def compared(weights: Path, sets: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """The distances, and how far the others' features and distances are from ours."""
    distance, features = ours(weights, sets)
    found: dict[str, Any] = {"fid": {"ours": distance}, "relative_difference": {}, "greatest_feature_difference": {}}
    others: tuple[Callable[[Path, tuple[Tensor, Tensor]], Answer], ...] = (torch_fidelity, torchmetrics)
    for other in others:
        name = other.__name__.replace("_", "-")
        theirs, rows = other(weights, sets)
        found["fid"][name] = theirs
        found["relative_difference"][name] = abs(distance - theirs) / theirs
        differences = [float((a - b).abs().max()) for a, b in zip(features, rows, strict=True)]
        found["greatest_feature_difference"][name] = max(differences)
    return found


@click.command()
@click.option("--images", type=click.IntRange(2, 10_000), default=2048, show_default=True, help="Images a side.")
@click.option("--weights", type=click.Path(exists=True, path_type=Path), default=None, help="Default: random ones.")
def main(images: int, weights: Path | None) -> None:
    """Compare, print one JSON line, write results/fid_parity.json."""
    real = torch.from_numpy(real_images("test")[:images].copy()).permute(0, 3, 1, 2).contiguous()
    with tempfile.TemporaryDirectory() as folder:
        path = weights or random_weights(Path(folder) / "inception.pth")
        found = compared(path, (real, noisy(real)))
    result = {"images": images, "weights": weights.name if weights else "random", **found}
    report("fid_parity", result, peers=("torch-fidelity", "torchmetrics"))


if __name__ == "__main__":
    main()
