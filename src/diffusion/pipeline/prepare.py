"""The prepare stage: the images of `data.source` as arrays that are read through memory maps, their split and card."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from diffusion import paths
from diffusion.atomic import replacing, write_json
from diffusion.config import Params
from diffusion.data.dataset import digest, split
from diffusion.data.sources import Source, open_source


def prepare(params: Params) -> None:
    """Write data/images/ (arrays), data/prepared/split.npz and data.json (digest, counts, channel statistics).

    Raises:
        UserError: the source cannot be used, or has too few images for data.val_images.
    """
    source = open_source(Path(params.data.source), params.model.image_size, params.model.image_channels)
    train, val = split(source.labels, params.data.val_images)
    channels = Channels(source.shape[3], len(source.labels), train)
    sha256 = digest(source.shape, channels.counted(written(source, paths.TRAIN_IMAGES)), source.labels)
    with replacing(paths.TRAIN_LABELS) as file:
        np.save(file, source.labels)
    paths.TEST_IMAGES.unlink(missing_ok=True)
    if source.test:
        for _ in written(source.test, paths.TEST_IMAGES):
            pass
    card = {
        "source": params.data.source,
        "digest": sha256,
        "train_images": len(train),
        "val_images": len(val),
        "image_shape": source.shape[1:],
        "channel_mean": channels.mean.round(6).tolist(),
        "channel_std": channels.std.round(6).tolist(),
    }
    with replacing(paths.SPLIT) as file:
        np.savez(file, train=train, val=val)
    write_json(paths.DATA_CARD, card)


def written(source: Source, path: Path) -> Iterator[np.ndarray]:
    """Write the npy file `path` chunk by chunk, each yielded on the way; whole, or not at all."""
    header = {"descr": "|u1", "fortran_order": False, "shape": source.shape}
    pace = 0.5 if sys.stderr.isatty() else 30
    bar = tqdm(total=source.shape[0], unit=" images", desc=f"prepare {path.stem}", mininterval=pace)
    with bar, replacing(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in source.chunks():
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
