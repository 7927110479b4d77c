"""`python -m diffusion.metrics compare`: distances between any two sets of images."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import click
import torch

from diffusion import paths
from diffusion.config import EvaluateConfig, Measure
from diffusion.data.download.inception_weights import WeightsUnavailableError, find_inception_weights
from diffusion.data.pictures import MAX_PIXELS, Fit, Form
from diffusion.data.sources import Source, open_source
from diffusion.errors import UserError
from diffusion.metrics import frechet_distance
from diffusion.metrics.extraction import features_of
from diffusion.metrics.features import EfficientNetLite0, Extractor, Inception
from diffusion.metrics.names import INCEPTION, OTHERS, shown
from diffusion.metrics.reference import Reference, holds_statistics, make_reference, read_statistics
from diffusion.metrics.scores import measured, versions
from diffusion.runtime import keep_freed_memory, resolve_device

NAMED = {"cifar10:train": paths.CIFAR10_TRAIN, "cifar10:test": paths.CIFAR10_TEST}
DIMS = {"inception": Inception.dim, "lite0": EfficientNetLite0.dim}
STRANGERS = "real"  # split of images that are not CIFAR-10's: no file name is taken for one of those


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--extractor", type=click.Choice(["inception", "lite0"]), default="inception", show_default=True)
@click.option("--weights", default=None, help="Inception's weights; looked for and fetched if not given.")
@click.option("--measure", "measures", type=click.Choice(get_args(Measure)), multiple=True, default=["frechet"])
@click.option("--count", type=click.IntRange(2), default=None, help="Only the first COUNT images of each.")
@click.option("--image-size", type=click.IntRange(1), default=None, help="Resize pictures to squares of this side.")
@click.option("--fit", type=click.Choice(get_args(Fit)), default="refuse", help="Then: what others become.")
@click.option("--max-pixels", type=click.IntRange(1), default=MAX_PIXELS, show_default=True, help="Of one picture.")
@click.option("--keep", type=click.IntRange(2), default=10_000, show_default=True, help="Most features kept; below.")
@click.option("--batch-size", type=click.IntRange(1, 65_536), default=64, show_default=True)
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line with all that the numbers depend on.")
def compare(a: str, b: str, as_json: bool, **options: Any) -> None:
    """Compare images A (generated) with B (real).

    Each is what data.source may be (a folder or zip of pictures, of one size or with --image-size; an npz, npy or
    parquet file), read as the prepare stage does, in RGB; or cifar10:train, cifar10:test, or an npz file of statistics
    (mu and sigma, of the same extractor). --measure may be given several times; all but frechet are of the first --keep
    images of each, whose features stay in memory. FID and KID are --extractor inception's names alone.
    """
    keep_freed_memory()
    form = Form(options.pop("image_size"), channels=3, fit=options.pop("fit"), max_pixels=options.pop("max_pixels"))
    found = list(compared(a, b, form=form, **options))
    if as_json:
        numbers = {name: value for entry in found for name, value in entry["numbers"].items()}
        click.echo(json.dumps({**numbers, "about": found}))
        return
    for entry in found:
        for name, value in entry["numbers"].items():
            click.echo(f"{name} {shown(value)}")
    key, against = found[0]["reference"], found[0]["against"]
    parts = {**key["extractor"], **found[0]["versions"]}
    of = f"{key['images']} images of {against}" if "images" in key else f"the statistics in {against}"
    click.echo("; ".join([f"against {of}", *(f"{k} {v}" for k, v in parts.items())]))


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
    form: Form = Form(size=None, channels=3),  # noqa: B008
) -> Iterator[dict[str, Any]]:
    """One entry a measure of the images named `a` against those named `b`: numbers and what they depend on.

    Raises:
        UserError: images or weights cannot be used, or there are too few images.
    """
    if "copies" in measures and b == "cifar10:test":
        raise UserError(f"copies are looked for among training images, and {b} are none: give the training images as B")
    statistics = [name for name in (a, b) if holds_statistics(_place(name))]
    _check_statistics(statistics, measures, extractor)
    if len(statistics) == 2:
        yield _of_statistics(a, b, extractor)
        return
    a, b = sorted((a, b), key=statistics.__contains__)  # the distance is the same both ways
    sources = _opened([name for name in (a, b) if name not in statistics], form, count)
    counts = [len(source.images) for source in sources]
    config = _config(weights, measures, batch_size, precision, max(counts))
    network = _extractor(extractor, config)
    if "frechet" in measures:
        _check_enough(network, min(counts))
    yield from _between(a, b, sources, network, config, keep, resolve_device(device))


def _between(
    a: str,
    b: str,
    sources: Sequence[Source],  # of a, and of b if it is no file of statistics
    network: Extractor,
    config: EvaluateConfig,
    keep: int,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    kept, size = keep if set(config.measures) - {"frechet"} else 0, config.batch_size
    if len(sources) == 2:
        split = b.removeprefix("cifar10:") if b in NAMED else STRANGERS
        reference = make_reference(sources[1].images, split, network, size, device, keep=kept)
    else:
        reference = read_statistics(_place(b), network.dim, network.describe())
    found = features_of(sources[0].images, network, size, device, a, keep=kept)
    for source in sources:
        _say(f"{source.name}: {line}" for line in source.report.conversions())
    for one in measured(config, network.metric, found, reference):
        yield {"measure": one.measure, "samples": one.samples, **one.details, **_entry(a, b, one.numbers, reference)}


def _entry(a: str, b: str, numbers: dict[str, float], reference: Reference) -> dict[str, Any]:
    return {"numbers": numbers, "of": a, "against": b, "reference": reference.key, "versions": versions()}


def _place(name: str) -> Path:
    return NAMED.get(name, Path(name).expanduser())


def _opened(names: Sequence[str], form: Form, count: int | None) -> list[Source]:
    """The sources of images, which are described on the terminal.

    Raises:
        UserError: one cannot be used, or their images differ in size.
    """
    sources = [open_source(_place(name), form, labels=None, count=count, name=name) for name in names]
    for source in sources:
        _say(source.lines())
    if len({source.images.shape[1:3] for source in sources}) > 1:
        sizes = " and ".join(f"{s.images.shape[2]} x {s.images.shape[1]} ({s.name})" for s in sources)
        raise UserError(f"images have {sizes} pixels: bring them to one size first, or give --image-size")
    return sources


def _of_statistics(a: str, b: str, extractor: str) -> dict[str, Any]:
    """The Frechet distance of two files of statistics, which needs no network."""
    of, against = (read_statistics(_place(name), DIMS[extractor]) for name in (a, b))
    name = f"{INCEPTION['frechet'] if extractor == 'inception' else OTHERS['frechet'] + '_lite0'}_of_statistics"
    numbers = {name: frechet_distance(of.mean, of.cov, against.mean, against.cov)}
    return {"measure": "frechet", **_entry(a, b, numbers, against)}


def _check_statistics(given: Sequence[str], measures: Sequence[Measure], extractor: str) -> None:
    """Raises UserError if another measure than the Frechet distance is asked for."""
    if not given:
        return
    which = " and ".join(given)
    if others := [measure for measure in measures if measure != "frechet"]:
        raise UserError(f"{which}: mean and covariance alone, and --measure {others[0]} needs images: give the images")
    network = "Inception with the 2015-12-05 weights" if extractor == "inception" else "EfficientNet-Lite0"
    _say([f"{which}: statistics; the features are assumed to be of {network} (--extractor)"])


def _check_enough(network: Extractor, few: int) -> None:
    """Raises UserError, or warns, if a covariance of `few` images says little of their distribution."""
    if few >= network.dim:
        return
    if isinstance(network, Inception):
        raise UserError(
            f"FID needs at least {network.dim} images a side and there are {few}: give --measure kid, which few images "
            "do not bias, or more images"
        )
    _say(
        [
            f"warning: {few} images are fewer than the {network.dim} features of which {network.metric} takes the "
            "covariance: its value is mostly bias, and falls with more images; --measure kid has no such bias"
        ]
    )


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        click.secho(line, fg="yellow" if line.startswith("warning: ") else None, err=True)


def _config(
    weights: str | None, measures: tuple[Measure, ...], batch_size: int, precision: Any, most: int
) -> EvaluateConfig:
    if weights and not Path(weights).is_file():
        raise UserError(f"--weights {weights}: no such file")
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
