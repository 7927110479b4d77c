"""Pictures as arrays: how each becomes pixels of one size and one number of channels, and what is converted for it."""

import io
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from diffusion.data.files import FORMATS, Entry, Report, add
from diffusion.data.npz import Stream, Unusable
from diffusion.data.pixels import on_white
from diffusion.errors import UserError

EIGHT_BIT = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"})
ORIENTATION = 0x0112  # EXIF's tag
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # Pillow's, by number of channels
MAX_PIXELS = 200_000_000  # of one picture, unless data.max_pixels says otherwise
LARGE = 64 * 2**20  # bytes of a file or of its pixels: larger ones are read one at a time
NAMED = 10  # unusable files that are named in a message

Fit = Literal["refuse", "crop", "pad", "stretch"]


@dataclass(frozen=True)
class Form:
    """What pictures become."""

    size: int | None  # side of a square, to which they are resized; None = that of the first, which all must have
    channels: int  # 1 grey | 3 RGB; with alpha: 2 | 4
    fit: Fit = "refuse"  # of pictures that are not square
    max_pixels: int = MAX_PIXELS


class Pictures(Stream):
    """Pictures as equal arrays, decoded when a slice asks for them.

    Memory: the slice's arrays, and while they are decoded up to 8 pictures of at most LARGE bytes as file and as
    pixels, beside one larger one, of at most max_pixels pixels and 4 bytes each as a file. Time: of each file at most
    as many bytes are unpacked.
    """

    def __init__(self, where: str, entries: Sequence[Entry], form: Form, report: Report) -> None:
        """`where` names the source in messages; conversions are counted in `report`.

        Raises:
            UserError: of the first picture's size all others are to be, and it is damaged.
        """
        self._where, self._entries, self._form, self._report = where, entries, form, report
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        self._large = threading.RLock()
        self._counted = 0
        self._size = (form.size, form.size) if form.size else None
        if self._size is None:
            first = self._decoded(entries[0])
            if isinstance(first, Unusable):
                raise self._refusal(0)
            self._size = first[0].shape[:2]
        super().__init__((len(entries), *self._size, form.channels))

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Raises UserError if a picture cannot be used; it names those after it too."""
        start, stop, _ = rows.indices(len(self))
        arrays = []
        for entry, decoded in zip(self._entries[start:stop], self._decode(start, stop), strict=True):
            if isinstance(decoded, Unusable):
                raise self._refusal(start)
            array, conversions = decoded
            arrays.append(array)
            for conversion in conversions if start >= self._counted else ():
                add(self._report.converted, conversion, entry.name)
        self._counted = max(self._counted, stop)
        return np.stack(arrays) if arrays else np.empty((0, *self.shape[1:]), np.uint8)

    def _decode(self, start: int, stop: int) -> Iterator["tuple[np.ndarray, list[str]] | Unusable"]:
        return self._pool.map(self._decoded, self._entries[start:stop])

    def _decoded(self, entry: Entry) -> "tuple[np.ndarray, list[str]] | Unusable":
        try:
            with self._large if entry.size > LARGE else nullcontext():
                image = opened(entry, self._form.max_pixels)
                with self._large if 4 * image.width * image.height > LARGE else nullcontext():
                    return self._array(image)
        except Unusable as why:
            return why
        except Exception as error:  # what a torn or forged file raises is not to be foreseen
            return Unusable(f"is damaged ({error}): repair or remove it")

    def _array(self, image: Image.Image) -> tuple[np.ndarray, list[str]]:
        form = self._form
        image, conversions = upright(image)
        image, made = recoloured(image, form.channels)
        conversions += made
        if form.size is None and self._size not in (None, (image.height, image.width)):
            height, width = self._size or (0, 0)
            raise Unusable(
                f"has {image.width} x {image.height} pixels and {self._entries[0].name} {width} x {height}: bring all "
                "to one size first, or give --image-size"
            )
        if form.size is not None:
            image, made = resized(image, form.size, form.fit)
            conversions += made
        return np.asarray(image).reshape(image.height, image.width, form.channels), conversions

    def _refusal(self, start: int) -> UserError:
        """Of all pictures from `start` on that cannot be used."""
        failed = [f"{self._entries[start + i].name} {why}" for i, why in self._failures(start)]
        named = "; ".join(failed[:NAMED])
        if len(failed) == 1:
            return UserError(f"{self._where}: {named}")
        more = f"; and {len(failed) - NAMED:,} more" if len(failed) > NAMED else ""
        count = f"{len(failed):,} of {len(self._entries):,} pictures cannot be used"
        return UserError(f"{self._where}: {count}: {named}{more}")

    def _failures(self, start: int) -> Iterator[tuple[int, Unusable]]:
        step = 256  # whose arrays are in memory at once
        for first in range(start, len(self._entries), step):
            for i, decoded in enumerate(self._decode(first, first + step), first - start):
                if isinstance(decoded, Unusable):
                    yield i, decoded


def opened(entry: Entry, max_pixels: int) -> Image.Image:
    """The picture, whose header was read.

    Raises:
        Unusable: it is damaged, too large, or has more than 8 bits a channel.
    """
    limit = f"more than data.max_pixels = {max_pixels:,} allows: raise it (--max-pixels), or make the picture smaller"
    if entry.size > 4 * max_pixels + 2**20:
        raise Unusable(f"takes {entry.size:,} bytes, {limit}")
    Image.MAX_IMAGE_PIXELS = None  # the limit is the one below; Pillow decodes nothing before
    try:
        image = Image.open(io.BytesIO(entry.read()), formats=FORMATS)
    except UnidentifiedImageError:
        raise Unusable("is damaged (no picture): repair or remove it") from None
    if image.width * image.height > max_pixels:
        raise Unusable(f"has {image.width:,} x {image.height:,} pixels, {limit}")
    if image.mode not in EIGHT_BIT:
        raise Unusable(f"does not have 8 bits a channel, grey or RGB (mode {image.mode}): scale it to 0..255")
    return image


def upright(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """The first frame, turned as the camera says, and what was done."""
    done = ["with several frames or pages, of which the first is taken"] if getattr(image, "n_frames", 1) > 1 else []
    if any(";16" in str(tile) for tile in getattr(image, "tile", ())):
        done.append("of 16 bits a channel, of which the upper 8 are taken")
    if image.getexif().get(ORIENTATION, 1) in range(2, 9):
        done.append("turned or mirrored as their EXIF orientation says")
    ImageOps.exif_transpose(image, in_place=True)  # else a copy, of 4 bytes a pixel
    return image, done


def recoloured(image: Image.Image, channels: int) -> tuple[Image.Image, list[str]]:
    """With 1 to 4 channels; what is transparent may have any colour, and is shown on white where alpha goes."""
    done = []
    if channels in (1, 3) and image.has_transparency_data:
        image = on_white(image)
        done.append("with transparency, shown on white")
    mode = MODES[channels]
    if image.mode != mode and not done:
        done.append(f"of mode {image.mode}, converted to {mode}")
    return image if image.mode == mode else image.convert(mode), done


def resized(image: Image.Image, size: int, fit: Fit) -> tuple[Image.Image, list[str]]:
    """`size` x `size` pixels: cut around the centre, on a white square, or stretched, if it is not square.

    Raises:
        Unusable: it is not square, and `fit` is refuse.
    """
    width, height = image.size
    done = []
    if width != height:
        if fit == "refuse":
            raise Unusable(
                f"has {width} x {height} pixels: crop it to a square, or set data.fit (--fit) to crop, pad or stretch"
            )
        done = [{"crop": "cropped to a square", "pad": "padded to a square", "stretch": "stretched to a square"}[fit]]
    if width != height and fit == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    elif width != height and fit == "pad":
        side = max(width, height)
        square = Image.new(image.mode, (side, side), (255,) * len(image.getbands()))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
        done.append(f"resized to {size} x {size} pixels")
    return image, done
