"""`python -m diffusion.metrics compare`: distances between any two sets of images."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import click

from diffusion.config import EvaluateConfig, Measure
from diffusion.data.download.inception_weights import WeightsUnavailableError, find_inception_weights
from diffusion.data.image_sets import NAMED, open_images
from diffusion.errors import UserError
from diffusion.metrics.extraction import features_of
from diffusion.metrics.features import EfficientNetLite0, Extractor, Inception
from diffusion.metrics.names import shown
from diffusion.metrics.reference import make_reference
from diffusion.metrics.scores import measured, versions
from diffusion.runtime import keep_freed_memory, resolve_device

STRANGERS = "real"  # split of images that are not CIFAR-10's: no file name is taken for one of those


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--extractor", type=click.Choice(["inception", "lite0"]), default="inception", show_default=True)
@click.option("--weights", default=None, help="Inception's weights; looked for and fetched if not given.")
@click.option("--measure", "measures", type=click.Choice(get_args(Measure)), multiple=True, default=["frechet"])
@click.option("--count", type=click.IntRange(2), default=None, help="Only the first COUNT images of each.")
@click.option("--keep", type=click.IntRange(2), default=10_000, show_default=True, help="Most features kept; below.")
@click.option("--batch-size", type=click.IntRange(1, 65_536), default=64, show_default=True)
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line with all that the numbers depend on.")
def compare(a: str, b: str, as_json: bool, **options: Any) -> None:
    """Compare images A (generated) with B (real).

    Each is an npz file with `images`, uint8 (N, H, W, C), a folder of pictures of one size, cifar10:train or
    cifar10:test. --measure may be given several times; all but frechet are of the first --keep images of each, whose
    features stay in memory. FID and KID are --extractor inception's names alone.
    """
    keep_freed_memory()
    found = list(compared(a, b, **options))
    if as_json:
        numbers = {name: value for entry in found for name, value in entry["numbers"].items()}
        click.echo(json.dumps({**numbers, "about": found}))
        return
    for entry in found:
        for name, value in entry["numbers"].items():
            click.echo(f"{name} {shown(value)}")
    key = found[0]["reference"]
    parts = {**key["extractor"], **found[0]["versions"]}
    click.echo("; ".join([f"against {key['images']} images of {b}", *(f"{k} {v}" for k, v in parts.items())]))


def compared(
    a: str,
    b: str,
    *,
    extractor: str,
    weights: str | None,
    measures: tuple[Measure, ...],
    count: int | None,
    keep: int,
    batch_size: int,
    precision: str,
    device: str,
) -> Iterator[dict[str, Any]]:
    """One entry a measure of the images named `a` against those named `b`: numbers and what they depend on.

    Raises:
        UserError: images or weights cannot be used, or there are too few images.
    """
    if "copies" in measures and b == "cifar10:test":
        raise UserError(f"copies are looked for among training images, and {b} are none: give the training images as B")
    sets = [open_images(name, count) for name in (a, b)]
    if (shapes := [images.shape[1:] for images in sets])[0] != shapes[1]:
        what = "number of channels" if shapes[0][:2] == shapes[1][:2] else "size"
        raise UserError(f"{a} has images of {shapes[0]} and {b} of {shapes[1]}: bring them to one {what} first")
    if weights and not Path(weights).is_file():
        raise UserError(f"--weights {weights}: no such file")
    config = _config(weights, measures, batch_size, precision, most=len(sets[1]))
    network = _extractor(extractor, config)
    if isinstance(network, Inception) and "frechet" in measures and (few := min(map(len, sets))) < network.dim:
        raise UserError(
            f"FID needs at least {network.dim} images a side and there are {few}: give --measure kid, which few images "
            "do not bias, or more images"
        )
    kept = keep if set(measures) - {"frechet"} else 0
    where, split = resolve_device(device), b.removeprefix("cifar10:") if b in NAMED else STRANGERS
    reference = make_reference(sets[1], split, network, batch_size, where, keep=kept)
    found = features_of(sets[0], network, batch_size, where, a, keep=kept)
    for one in measured(config, network.metric, found, reference):
        about = {"measure": one.measure, "numbers": one.numbers, "samples": one.samples, "of": a, "against": b}
        yield {**about, **one.details, "reference": reference.key, "versions": versions()}


def _config(
    weights: str | None, measures: tuple[Measure, ...], batch_size: int, precision: Any, most: int
) -> EvaluateConfig:
    return EvaluateConfig(
        reference_split="train",
        reference_images=most,
        inception="require",
        inception_weights=str(Path(weights).resolve()) if weights else None,
        inception_images=most,
        measures=measures,
        repeats=1,
        kept_features=most,
        precision=precision,
        batch_size=batch_size,
        processes=1,
        device="auto",
    )


def _extractor(name: str, config: EvaluateConfig) -> Extractor:
    if name == "lite0":
        return EfficientNetLite0(precision=config.precision)
    try:
        network = Inception(find_inception_weights(config), config.precision)
    except WeightsUnavailableError as error:
        raise UserError(f"no Inception weights ({error}): give --weights FILE, or --extractor lite0") from None
    if not network.published:
        note = "these are not the 2015-12-05 weights: this fid is comparable with no published number"
        click.secho(note, fg="yellow", err=True)
    return network
