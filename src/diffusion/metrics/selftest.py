"""Does this machine compute what the reference implementations compute? Everything here runs offline.

The golden number: with the published weights at hand,

    python -m diffusion.metrics compare cifar10:test cifar10:train

gives fid10k_train of CIFAR-10's 10,000 test images against its 50,000 training images. Whoever has run it, and
torch-fidelity on the same images (`fidelity --fid --input1 ... --input2 ...`) to the same three digits, writes the
number into GOLDEN; from then on the self-test compares with it.
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from diffusion import paths
from diffusion.data.download.inception_weights import INCEPTION_NAMES, sha256, torch_cache
from diffusion.data.download.inception_weights import INCEPTION_SHA256 as PUBLISHED
from diffusion.errors import UserError
from diffusion.metrics.compare import compared
from diffusion.metrics.features import INCEPTION_SIZE, Inception, resize_as_tensorflow1
from diffusion.metrics.frechet import frechet_distance

GOLDEN: float | None = None  # fid10k_train of cifar10:test against cifar10:train; not measured yet
FEATURES = 1e-4  # most that a feature may differ from torch-fidelity's
DISTANCE = 1e-3  # and a distance, relative to theirs

Check = tuple[str, bool | None]  # what was compared and found, whether that is right; None = not compared


def checks(images: int) -> Iterator[Check]:
    """One line a comparison; the features of `images` images a side."""
    yield from frechet()
    with tempfile.TemporaryDirectory() as folder:
        yield from inception(random_weights(Path(folder) / "inception.pth"), pictures(images))
    yield from golden()


def frechet() -> Iterator[Check]:
    """The distance against its closed form, and against scipy's matrix root."""
    import scipy.linalg

    rng = np.random.default_rng(0)
    mu1, mu2, s1, s2 = rng.normal(size=(4, 64))
    expected = ((mu1 - mu2) ** 2 + (abs(s1) - abs(s2)) ** 2).sum()
    found = frechet_distance(mu1, np.diag(s1**2), mu2, np.diag(s2**2))
    yield f"Frechet distance {found:.9g}, closed form {expected:.9g}", bool(np.isclose(found, expected, rtol=1e-9))
    a, b = rng.normal(size=(500, 64)) @ rng.normal(size=(64, 64)), rng.normal(size=(500, 64))
    cov1, cov2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * scipy.linalg.sqrtm(cov1 @ cov2).real)
    found = frechet_distance(mu1, cov1, mu2, cov2)
    yield f"Frechet distance {found:.9g}, scipy's sqrtm {expected:.9g}", bool(np.isclose(found, expected, rtol=1e-6))


def inception(weights: Path, batch: Tensor) -> Iterator[Check]:
    """Resize, features and FID against torch-fidelity's, features against torchmetrics' too, of uint8 (N, 3, H, W)."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
    from torchmetrics.image.fid import NoTrainInceptionV3

    size = (INCEPTION_SIZE, INCEPTION_SIZE)
    theirs = interpolate_bilinear_2d_like_tensorflow1x(batch.float(), size=size, align_corners=False)
    difference = float((resize_as_tensorflow1(batch, INCEPTION_SIZE) - theirs).abs().max())
    yield f"resize differs from torch-fidelity's by {difference:.2g} of 255", difference < 1e-3
    ours = Inception(weights)
    reference = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights))
    metrics = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights), antialias=False)
    with torch.no_grad():
        sets = [(ours(x), reference(x)[0]) for x in (batch, noisy(batch))]
        found = {"torch-fidelity": sets[0][1], "torchmetrics": metrics(batch)}
    for name, features in found.items():
        difference, scale = float((sets[0][0] - features).abs().max()), float(features.std())
        line = f"Inception features (random weights, deviation {scale:.2g}) differ from {name}'s by {difference:.2g}"
        yield line, difference < FEATURES and scale > 100 * FEATURES
    yield _fid([mine for mine, _ in sets], [theirs for _, theirs in sets])


def _fid(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Check:
    """Distances of images from the same ones with noise, each by its own features and formula."""
    from diffusion.metrics.moments import Moments

    moments = [Moments(rows.shape[1]) for rows in ours]
    for one, rows in zip(moments, ours, strict=True):
        one.update(rows)
    found = moments[0].distance(moments[1])
    expected = torch_fidelitys_fid(*theirs)
    line = f"FID of {len(ours[0])} images and noisy ones {found:.6g}, torch-fidelity's {expected:.6g}"
    return line, abs(found - expected) < DISTANCE * expected


def torch_fidelitys_fid(samples: Tensor, reference: Tensor) -> float:
    """Its Frechet distance of features (N, d) and (M, d)."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    moments = (fid_features_to_statistics(rows.cpu()) for rows in (samples, reference))
    return float(fid_statistics_to_metric(*moments, verbose=False)[KEY_METRIC_FID])


def golden() -> Iterator[Check]:
    """CIFAR-10's number, if it is known and the published weights are on this machine."""
    places = [folder / name for folder in (paths.WEIGHTS, torch_cache()) for name in INCEPTION_NAMES]
    at_hand = next((p for p in places if p.is_file() and sha256(p) == PUBLISHED), None)
    if GOLDEN is None or at_hand is None:
        why = "nobody has measured it yet" if GOLDEN is None else "the published weights are not at hand"
        yield f"golden number not compared: {why} (diffusion/metrics/selftest.py says how)", None
        return
    try:
        (entry,) = compared(
            "cifar10:test",
            "cifar10:train",
            extractor="inception",
            weights=str(at_hand),
            measures=("frechet",),
            count=None,
            keep=2,
            batch_size=64,
            precision="fp32",
            device="auto",
        )
    except UserError as error:
        yield f"golden number not compared: {error}", None
        return
    (value,) = entry["numbers"].values()
    yield f"fid10k_train of CIFAR-10's test images {value:.4f}, expected {GOLDEN}", abs(value - GOLDEN) < 1e-3 * GOLDEN


def pictures(count: int) -> Tensor:
    """Smooth random pictures, uint8 (N, 3, 32, 32)."""
    coarse = torch.rand((count, 3, 5, 5), generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic").clamp(0, 1).mul(255).to(torch.uint8)


def noisy(images: Tensor, deviation: float = 20.0) -> Tensor:
    """The same uint8 images with Gaussian noise of so many of 255 grey levels."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return (images + deviation * noise).round().clamp(0, 255).to(torch.uint8)


def random_weights(path: Path, seed: int = 0) -> Path:
    """A state dict of FID's Inception in the published file's format, whose activations neither vanish nor explode."""
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    class Bare(fidelity.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: object, **__: object) -> None:
            """Keep the random start."""

    original, fidelity.torch.load = fidelity.torch.load, lambda *_, **__: {}
    try:
        net = Bare("inception-v3-compat", ["2048"], "none")
    finally:
        fidelity.torch.load = original
    generator = torch.Generator().manual_seed(seed)
    state = net.state_dict()
    for key, value in state.items():
        if key.endswith("conv.weight"):
            value.normal_(generator=generator).mul_((2 / value[0].numel()) ** 0.5)
        elif key.endswith("running_mean"):
            value.normal_(0, 0.1, generator=generator)
    torch.save(state, path)
    return path


@click.command()
@click.option("--images", type=click.IntRange(2), default=16, show_default=True, help="Images a side for the features.")
def selftest(images: int) -> None:
    """Check Frechet distance, Inception features and FID against torch-fidelity, torchmetrics and closed forms."""
    failed, words = 0, {True: "ok", False: "FAILED", None: "skipped"}
    for line, passed in checks(images):
        click.secho(f"{words[passed]}  {line}", fg="red" if passed is False else None)
        failed += passed is False
    sys.exit(1 if failed else 0)
