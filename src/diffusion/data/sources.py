"""What a path holds, whatever kind it is of, as equal uint8 arrays: the one reader of `data.source` and of compare."""

import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np

from diffusion import paths
from diffusion.data.files import FORMATS, SUFFIXES, Entry, Report, files_of, members_of, sorted_out
from diffusion.data.layout import LABELS_FILE, Labelled, Labels, labelled, numbered, splits, unlabelled
from diffusion.data.npz import UNREADABLE, Stream, Unusable, checked, headers, labels_for, name_of_images, open_array
from diffusion.data.parquet import read_tables
from diffusion.data.pictures import Form, Pictures
from diffusion.errors import UserError

KINDS = "a folder or zip of pictures, an npz or npy file of uint8 images, or a parquet file"
SHOWN = 20  # classes that are named on the terminal
STATISTICS = (("mu", "sigma"), ("mean", "cov"))  # of features, as pytorch-fid and EDM save them, and reference/ here


@dataclass(frozen=True)
class Source:
    """Images that are read slice by slice, so that a million need no more memory than a thousand."""

    name: str  # in messages
    images: np.ndarray | Stream  # uint8 (N, H, W, C)
    labelled: Labelled
    report: Report = field(default_factory=Report)
    test: "Source | None" = None

    def lines(self) -> Iterator[str]:
        """What was found here, for the terminal; what is converted is known once all was read: report.conversions."""
        count, height, width, _ = self.images.shape
        yield f"{self.name}: {count:,} images of {width} x {height} pixels"
        yield from (f"  {line}" for line in [*self.report.found, *self.report.omissions()])
        named = [f"{name} ({count:,})" for name, count in self.labelled.counts().items()]
        if named:
            more = f" and {len(named) - SHOWN:,} more" if len(named) > SHOWN else ""
            yield f"  {len(named):,} classes: {', '.join(named[:SHOWN])}{more}"

    def card(self) -> dict[str, object]:
        """The same as JSON types."""
        return {**self.report.card(), "classes": self.labelled.counts()}


def open_source(
    path: Path,
    form: Form,
    *,
    labels: Labels | None = "auto",  # None = classes are not wanted
    count: int | None = None,  # only the first; None = all
    name: str | None = None,  # in messages; None = the path
) -> Source:
    """What `path` holds: KINDS, or a folder with train.npz and test.npz, as the download stage writes.

    Pictures lie in any depth, are taken in the order of their paths and become as `form` says; arrays stay as they are.
    Hidden files and __MACOSX are left out, and so is whatever else is no picture; the report counts it all. Memory: a
    list of the files (about 1 kB each), and Pictures' bounds; of a parquet file one row group.

    Raises:
        UserError: nothing usable is there (while it is read: a picture cannot be used); the line says where and why.
    """
    opening = _Opening(name or str(path), path, form, labels, count)
    with explained(opening.name, path):
        return opening.source()


@dataclass(frozen=True)
class _Opening:
    """A source that is being opened, by the kind of what lies there."""

    name: str
    path: Path
    form: Form
    labels: Labels | None
    count: int | None
    report: Report = field(default_factory=Report)

    def source(self) -> Source:
        path, suffix = self.path, self.path.suffix.lower()
        if path.is_dir():
            return self._folder(list(files_of(path)))
        if suffix == ".npy":
            return self._array(path, np.load(path, mmap_mode="c", allow_pickle=False), None)
        if suffix == ".parquet":
            return self._tables([path], [])
        if suffix == ".npz" or _holds_arrays(path):
            return self._archive(path)
        if zipfile.is_zipfile(path) or suffix == ".zip":
            return self._pictures(members_of(zipfile.ZipFile(path)))
        path.stat()  # FileNotFoundError
        one = ", and one picture is none: name its folder" if suffix in SUFFIXES else ": unpack or convert it"
        raise UserError(f"{self.name} is not {KINDS}{one}")

    def _folder(self, files: list[Entry]) -> Source:
        if (self.path / "train.npz").exists():
            for entry in files:
                if entry.name not in ("train.npz", "test.npz"):
                    self.report.leave_out("files beside train.npz", entry.name)
            train, test = self._archive(self.path / "train.npz"), self.path / "test.npz"
            return replace(train, test=self._of_test()._archive(test) if test.exists() else train.test)
        tables = [Path(entry.name) for entry in files if entry.name.lower().endswith(".parquet")]
        if not tables or sorted_out(iter(files), Report()):
            return self._pictures(iter(files))
        sorted_out((entry for entry in files if Path(entry.name) not in tables), self.report)
        test_tables = [self.path / table for table in tables if "test" in table.name]
        train_tables = [self.path / table for table in tables if "test" not in table.name]
        return self._tables(train_tables, test_tables) if train_tables else self._tables(test_tables, [])

    # --- pictures

    def _pictures(self, entries: Iterator[Entry]) -> Source:
        label_files: list[Entry] = []
        others: list[Entry] = []
        for entry in entries:
            (label_files if PurePosixPath(entry.name).name == LABELS_FILE else others).append(entry)
        pictures = sorted_out(iter(others), self.report)
        if not pictures:
            found = "; ".join(self.report.omissions()) or "nothing at all"
            hint = "run `dvc repro download`" if self.path == paths.CIFAR10 else f"give {KINDS}"
            raise UserError(f"{self.name} holds no pictures ({', '.join(FORMATS)}), but {found}: {hint}")
        train, test = splits(pictures, self.report)
        return self._decoded(train, labelled(train, self.labels, label_files, self.report), test)

    def _tables(self, train: Sequence[Path], test: Sequence[Path]) -> Source:
        entries, classes = read_tables(train)
        if test:
            self.report.found.append(f"{', '.join(path.name for path in test)} for testing")
        if self.labels is None:
            classes = unlabelled(len(entries))
        return self._decoded(entries, classes, read_tables(test)[0] if test else [])

    def _decoded(self, train: Sequence[Entry], classes: Labelled, test: Sequence[Entry]) -> Source:
        images = Pictures(self.name, train[: self.count], self.form, self.report)
        rest = None
        if test and self.form.size is not None:  # else only the training images are asked for
            rest = self._of_test()._decoded(test, unlabelled(len(test)), [])
        return Source(self.name, images, classes.first(self.count), self.report, rest)

    # --- arrays

    def _archive(self, path: Path) -> Source:
        found = headers(path)
        if statistics_in(found) and not any(header.are_images for header in found.values()):
            raise UserError(
                f"{self.name} holds statistics of features ({', '.join(found)}), not images: give the images"
            )
        name = name_of_images(found)
        images = open_array(path, name)
        labels_name, labels = labels_for(path, name, images.shape[0], found) if self.labels else (None, None)
        used = {name, labels_name}
        if name != "images":
            self.report.found.append(f"the images are the array {name}")
        source = self._array(path, images, labels)
        if name == "x_train" and "x_test" in found:
            self.report.found.append("x_test is for testing")
            used |= {"x_test", "y_test"}
            source = replace(source, test=self._of_test()._array(path, open_array(path, "x_test"), None))
        for other in [other for other in found if other not in used and self.labels]:
            self.report.leave_out("arrays of the file", other)
        return source

    def _array(self, path: Path, images: np.ndarray | Stream, labels: np.ndarray | None) -> Source:
        """Raises UserError if `images` are not uint8 (N, H, W, C), or (N, H, W)."""
        if isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim == 3 and images.shape[2] > 4:
            images = images[..., None]
            self.report.found.append("the array has no channels: its images are grey")
        images = checked(images, path)
        classes = unlabelled(len(images)) if labels is None else numbered(labels)
        if self.count is not None:
            images = images.first(self.count) if isinstance(images, Stream) else images[: self.count]
        return Source(self.name, images, classes.first(self.count), self.report)

    def _of_test(self) -> "_Opening":
        return replace(self, name=f"{self.name} (test images)", count=None)


def _holds_arrays(path: Path) -> bool:
    """Whether it is an npz file under another name."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return bool(names) and all(name.endswith(".npy") for name in names)


def statistics_in(names: Iterable[str]) -> tuple[str, str] | None:
    """The names of mean and covariance among the arrays of a file; None = it has none."""
    return next((pair for pair in STATISTICS if set(pair) <= set(names)), None)


@contextmanager
def explained(name: str, path: Path) -> Iterator[None]:
    """Errors of reading `path` as one line."""
    try:
        yield
    except FileNotFoundError as error:
        hint = "run `dvc repro download`" if path.is_relative_to(paths.CIFAR10) else f"give {KINDS}"
        raise UserError(f"{name}: {error.filename} is not there: {hint}") from None
    except Unusable as why:
        raise UserError(f"{name}: {why}") from None
    except UNREADABLE as error:
        raise UserError(f"{name} cannot be used ({error}): is it whole? give {KINDS}") from None
