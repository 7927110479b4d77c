"""The prepare stage: the images of `data.source` as arrays that are read through memory maps, their split and card."""

import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from diffusion import paths
from diffusion.atomic import replacing, write_json
from diffusion.config import Params
from diffusion.data.dataset import digest, split
from diffusion.data.pictures import Form
from diffusion.data.sources import Source, open_source
from diffusion.errors import UserError

CHUNK = 2048  # images in memory at once, at most
CHUNK_BYTES = 2**26  # of these


def prepare(params: Params) -> None:
    """Write data/images/ (arrays), data/prepared/split.npz and data.json: digest, counts, channel statistics, and what
    of the source was taken, left out and converted, which is printed too.

    Raises:
        UserError: the source cannot be used, or has too few images for data.val_images.
    """
    data, model = params.data, params.model
    form = Form(model.image_size, model.image_channels, data.fit, data.max_pixels)
    source = open_source(Path(data.source), form, labels=data.labels, name=f"data.source = {data.source}")
    _say(source.lines())
    for part in (source, source.test):
        _check_shape(part, (model.image_size, model.image_size, model.image_channels))
    _check_classes(source, model.num_classes)
    labels = source.labelled.labels
    train, val = split(_split_by(labels, params), data.val_images)
    channels = Channels(source.images.shape[3], len(labels), train)
    sha256 = digest(source.images.shape, channels.counted(written(source, paths.TRAIN_IMAGES)), labels)
    with replacing(paths.TRAIN_LABELS) as file:
        np.save(file, labels)
    paths.TEST_IMAGES.unlink(missing_ok=True)
    if source.test:
        for _ in written(source.test, paths.TEST_IMAGES):
            pass
    _say(source.report.conversions())
    card = {
        "source": data.source,
        "digest": sha256,
        "train_images": len(train),
        "val_images": len(val),
        "image_shape": source.images.shape[1:],
        "channel_mean": channels.mean.round(6).tolist(),
        "channel_std": channels.std.round(6).tolist(),
        **source.card(),
    }
    with replacing(paths.SPLIT) as file:
        np.savez(file, train=train, val=val)
    write_json(paths.DATA_CARD, card)


def _check_shape(source: Source | None, wanted: tuple[int, int, int]) -> None:
    """Raises UserError if arrays, which stay as they are, are not what the network is to see."""
    height, width, channels = shape = source.images.shape[1:] if source else wanted
    if source and shape != wanted:
        keys = f"set model.image_size: {height} and model.image_channels: {channels}"
        advice = keys if height == width else "crop them to squares"
        raise UserError(f"{source.name}: images are {shape}, not {wanted}: {advice}")


def _check_classes(source: Source, wanted: int | None) -> None:
    """Raises UserError if a network of `wanted` classes cannot be trained on the source; None = it knows no classes."""
    found = len(source.labelled.classes)
    if wanted is None:
        return
    if not found:
        raise UserError(
            f"{source.name} has no classes, and model.num_classes = {wanted}: put the pictures of each class into a "
            "folder, set data.labels: prefix if file names begin with them (cat_01.png), or model.num_classes: null"
        )
    if found > wanted:
        raise UserError(f"{source.name} has {found} classes: set model.num_classes: {found}")
    if found < wanted:
        _say([f"warning: model.num_classes = {wanted}, and there are images of {found}: nothing is learnt of the rest"])


def _split_by(labels: np.ndarray, params: Params) -> np.ndarray:
    """The labels, of which each keeps its share; or zeros, if classes are too small and nobody asks for them."""
    if params.model.num_classes or params.data.val_images <= len(labels) - len(np.unique(labels)):
        return labels
    _say(["validation images are chosen whatever their class: there are too few images a class"])
    return np.zeros_like(labels)


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        tqdm.write(line, file=sys.stderr)


def written(source: Source, path: Path) -> Iterator[np.ndarray]:
    """Write the npy file `path` chunk by chunk, each yielded on the way; whole, or not at all."""
    images = source.images
    header = {"descr": "|u1", "fortran_order": False, "shape": images.shape}
    pace = 0.5 if sys.stderr.isatty() else 30
    step = max(1, min(CHUNK, CHUNK_BYTES // math.prod(images.shape[1:])))
    bar = tqdm(total=len(images), unit=" images", desc=f"prepare {path.stem}", mininterval=pace)
    with bar, replacing(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(images), step):
            chunk = np.ascontiguousarray(images[start : start + step])
            file.write(chunk.data)
            bar.update(len(chunk))
            yield chunk


class Channels:
    """Mean and standard deviation of each channel over the `chosen` of `count` images; exact, from histograms."""

    def __init__(self, channels: int, count: int, chosen: np.ndarray) -> None:
        self._counts = np.zeros((channels, 256), dtype=np.int64)
        self._chosen = np.zeros(count, dtype=bool)
        self._chosen[chosen] = True

    def counted(self, chunks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The same chunks; their images are counted."""
        start = 0
        for chunk in chunks:
            images = chunk[self._chosen[start : start + len(chunk)]]
            for channel, counts in enumerate(self._counts):
                counts += np.bincount(images[..., channel].ravel(), minlength=256)
            start += len(chunk)
            yield chunk

    @property
    def mean(self) -> np.ndarray:
        """float64 (C,) of values in [0, 1]."""
        return self._moment(np.arange(256) / 255.0)

    @property
    def std(self) -> np.ndarray:
        """float64 (C,) of values in [0, 1]."""
        return np.sqrt(self._moment((np.arange(256)[None] / 255.0 - self.mean[:, None]) ** 2))

    def _moment(self, values: np.ndarray) -> np.ndarray:
        moment: np.ndarray = (self._counts * values).sum(axis=1) / self._counts.sum(axis=1)
        return moment
