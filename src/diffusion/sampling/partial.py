"""Finished batches of images on disk, until the whole set is there: what a stopped sampling goes on from."""

import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from diffusion.atomic import replacing
from diffusion.data.npz import UNREADABLE, read_npz
from diffusion.errors import UserError


class PartialSamples:
    """Files <first>-<end>.npz in a folder that all ranks see, each with the images first .. end - 1 of a set."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, indices: range, images: np.ndarray) -> None:
        """Keep uint8 (N, H, W, C) images: whole, or not at all."""
        with replacing(self._path(indices)) as file:
            np.savez(file, images=images)

    def found(self) -> Iterator[tuple[range, np.ndarray]]:
        """Every batch that is whole, in order; a damaged one is left out, and so generated again."""
        names = [re.fullmatch(r"(\d+)-(\d+)\.npz", path.name) for path in self.folder.glob("*.npz")]
        for first, end in sorted((int(name[1]), int(name[2])) for name in names if name):
            path = self._path(range(first, end))
            try:
                (images,) = read_npz(path, "images")
            except UNREADABLE as error:
                print(f"sample: {path} is damaged ({error}) and generated again", file=sys.stderr)
                continue
            if len(images) == end - first:
                yield range(first, end), images

    def collect(self, count: int) -> np.ndarray:
        """uint8 (count, H, W, C): the whole set.

        Raises:
            UserError: a batch is missing.
        """
        batches = list(self.found())
        gaps = missing([indices for indices, _ in batches], count)
        if gaps:
            raise UserError(
                f"{self.folder} lacks images {gaps[0].start} to {gaps[0].stop - 1}: all machines of a run need to see "
                "this folder; run `dvc repro` again"
            )
        whole = np.empty((count, *batches[0][1].shape[1:]), np.uint8)
        for indices, images in batches:
            whole[indices.start : indices.stop] = images
        return whole

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, indices: range) -> Path:
        return self.folder / f"{indices.start:08d}-{indices.stop:08d}.npz"


def missing(done: Sequence[range], count: int) -> list[range]:
    """The gaps that `done`, in order of their starts, leaves in 0 .. count - 1."""
    gaps, end = [], 0
    for batch in [*done, range(count, count)]:
        if batch.start > end:
            gaps.append(range(end, batch.start))
        end = max(end, batch.stop)
    return gaps
