"""Inception features a second on this machine: ours against torch-fidelity and pytorch-fid as they ship.

Random weights in the published file's format, CIFAR-10's test images, in turns, each in a process of its own.
Every contestant computes in float32 but the one that says bf16. Memory is the peak of a process that streams 2,000 or
50,000 samples through 2,048 features, with moments alone and with as many features kept as params.yaml says.
Needs the data: run `dvc repro prepare` once.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from machine import report
from torch import Tensor
from turns import compete

from diffusion.data.dataset import real_images
from diffusion.data.npz import load_samples
from diffusion.metrics.extraction import features_of, moments_of
from diffusion.metrics.features import EfficientNetLite0, Extractor, Inception
from diffusion.metrics.selftest import random_weights
from diffusion.params_file import load
from diffusion.runtime import keep_freed_memory

CPU = torch.device("cpu")
FEW, MANY = 2_000, 50_000  # samples whose memory is compared


class Projection(torch.nn.Module):
    """2,048 features at next to no cost."""

    metric, dim = "projection", 2048

    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.randn(3 * 32 * 32, self.dim, generator=torch.Generator().manual_seed(0)) / 1000

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, 32, 32) -> float32 (N, 2048)."""
        return images.flatten(1).float() @ self.matrix


def ours(weights: Path, batch_size: int, precision: str) -> Callable[[], object]:
    """As the evaluate stage computes them."""
    keep_freed_memory()
    return partial(Inception(weights, precision), pictures(batch_size))


def torch_fidelity(weights: Path, batch_size: int) -> Callable[[], object]:
    """Its extractor, as its command uses it."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights)).eval()
    batch = pictures(batch_size)
    return torch.inference_mode()(lambda: network(batch))


def pytorch_fid(weights: Path, batch_size: int) -> Callable[[], object]:
    """Its network, as its command uses it; it would fetch its weights."""
    from pytorch_fid import inception

    inception.load_state_dict_from_url = lambda *_, **__: torch.load(weights, weights_only=True)
    network, batch = inception.InceptionV3().eval(), pictures(batch_size).float().div(255)
    return torch.no_grad()(lambda: network(batch)[0])


def pictures(count: int) -> Tensor:
    """uint8 (N, 3, 32, 32)."""
    return torch.from_numpy(real_images("test")[:count].copy()).permute(0, 3, 1, 2).contiguous()


@click.command()
@click.option("--batch-size", default=64, show_default=True)
@click.option("--turns", default=5, show_default=True, help="Turns of each contestant.")
@click.option("--seconds", default=20.0, show_default=True, help="Length of a turn.")
@click.option("--images", default=512, show_default=True, help="Images a side for the effect of bf16.")
@click.option("--memory", type=int, default=None, hidden=True)
@click.option("--keep", type=int, default=0, hidden=True)
def main(batch_size: int, turns: int, seconds: float, images: int, memory: int | None, keep: int) -> None:
    """Measure, print one JSON line, write results/inception_speed.json."""
    if memory:
        print(peak(memory, keep))
        return
    with tempfile.TemporaryDirectory() as folder:
        weights = random_weights(Path(folder) / "inception.pth")
        found = compete(
            {
                "ours (fp32)": partial(ours, weights, batch_size, "fp32"),
                "torch-fidelity as shipped (fp32)": partial(torch_fidelity, weights, batch_size),
                "pytorch-fid as shipped (fp32)": partial(pytorch_fid, weights, batch_size),
                "ours (bf16)": partial(ours, weights, batch_size, "bf16"),
            },
            batch_size,
            turns=turns,
            seconds=seconds,
        )
        effect = {"fid's features (random weights)": moved(lambda precision: Inception(weights, precision), 16)}
    effect["fd_lite0's features"] = moved(lambda precision: EfficientNetLite0(precision=precision), 64)
    result = {
        "unit": "images a second",
        "batch_size": batch_size,
        "images_per_second": found,
        "features_moved_by_bf16": effect,
        "fd_lite0": distances(images),
        "peak_memory_mb": memories(),
    }
    report("inception_speed", result, peers=("torch-fidelity", "pytorch-fid"))


def moved(extractor: Callable[[str], Extractor], count: int) -> float:
    """Relative change of the features, as a norm, of `count` images."""
    full, half = (extractor(precision)(pictures(count)) for precision in ("fp32", "bf16"))
    return round(float((half - full).norm() / full.norm()), 4)


def distances(count: int) -> dict[str, Any]:
    """fd_lite0 of test images against training images, in both precisions."""
    values: dict[str, Any] = {"images": count}
    for precision in ("fp32", "bf16"):
        extractor = EfficientNetLite0(precision=precision)
        a, b = (moments_of(real_images(split)[:count], extractor, 64, CPU, split) for split in ("test", "train"))
        values[precision] = round(a.distance(b), 2)
    return values


def memories() -> dict[str, dict[str, Any]]:
    """Peak memory with FEW and MANY samples, and how many times more the latter is."""
    kept, found = load("params.yaml").evaluate.kept_features, {}
    for name, keep in (("moments alone", 0), (f"and {kept} features kept", kept)):
        few, many = (
            int(subprocess.check_output([sys.executable, __file__, "--memory", str(count), "--keep", str(keep)]))
            for count in (FEW, MANY)
        )
        found[name] = {str(FEW): few, str(MANY): many, "times": round(many / few, 3)}
    return found


def peak(count: int, keep: int) -> int:
    """Peak memory in MB of this process after the features of `count` samples from a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npz"
        images = f"np.resize(np.arange(251, dtype=np.uint8), ({count}, 32, 32, 3))"
        code = f"import numpy as np; np.savez({str(path)!r}, images={images})"
        subprocess.run([sys.executable, "-c", code], check=True)  # its memory is not ours
        features_of(load_samples(path), Projection(), 64, CPU, "samples", keep=keep)  # type: ignore[arg-type]
    lines = Path("/proc/self/status").read_text().splitlines()  # getrusage would count the parent's memory before exec
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024


if __name__ == "__main__":
    main()
