"""What the names of pictures say: which are for testing, and which class each one is of."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np

from diffusion.data.files import Entry, Report
from diffusion.data.npz import Unusable

TRAIN = ("train", "training")
TEST = ("test", "testing", "val", "valid", "validation", "dev")  # the first that is there; others are left out
LABELS_FILE = "dataset.json"  # of StyleGAN's and EDM's archives
LARGEST_JSON = 2**28  # bytes

Labels = Literal["auto", "prefix"]


@dataclass(frozen=True)
class Labelled:
    """Pictures, or arrays, with their classes."""

    labels: np.ndarray  # integers (N,)
    classes: tuple[str, ...]  # names by label; none = there are no classes, and all labels are 0

    def counts(self) -> dict[str, int]:
        """How many of each class."""
        counts = np.bincount(self.labels, minlength=len(self.classes))
        return {name: int(counts[label]) for label, name in enumerate(self.classes)}

    def first(self, count: int | None) -> "Labelled":
        """Of the first `count`; None = of all."""
        return replace(self, labels=self.labels[:count])


def unlabelled(count: int) -> Labelled:
    return Labelled(np.zeros(count, dtype=np.uint8), ())


def numbered(labels: np.ndarray) -> Labelled:
    """Labels without names: their numbers are the names.

    Raises:
        Unusable: one is negative, or the classes would be too many.
    """
    if not len(labels) or int(labels.min()) < 0 or int(labels.max()) >= 100_000:
        raise Unusable(f"labels go from {labels.min()} to {labels.max()}: number the classes from 0 to 99,999")
    return Labelled(labels, tuple(str(label) for label in range(int(labels.max()) + 1)))


def splits(pictures: Sequence[Entry], report: Report) -> tuple[list[Entry], list[Entry]]:
    """(training, test): the pictures in folders train and test that lie side by side; else all are for training.

    Raises:
        Unusable: other pictures lie beside these folders.
    """
    firsts = _first_folders(pictures)
    by_word = {folder.lower(): folder for folder in dict.fromkeys(firsts) if folder is not None}
    train = next((by_word[word] for word in TRAIN if word in by_word), None)
    tests = [by_word[word] for word in TEST if word in by_word]
    if train is None or not tests:
        return list(pictures), []
    parts: dict[str | None, list[Entry]] = {}
    for folder, entry in zip(firsts, pictures, strict=True):
        parts.setdefault(folder, []).append(entry)
    if strange := parts.keys() - {train, *tests}:
        example = parts[min(strange, key=str)][0].name
        raise Unusable(
            f"{example} lies beside the folders {train} and {tests[0]}: are these classes, or parts of the data? Give "
            f"{train} alone as data.source, or move the others away"
        )
    for folder in tests[1:]:
        for entry in parts[folder]:
            report.leave_out(f"pictures of {folder}, beside {train} and {tests[0]}", entry.name)
    report.found.append(
        f"{train}/ is for training ({len(parts[train]):,} pictures) and {tests[0]}/ for testing "
        f"({len(parts[tests[0]]):,}); validation images are taken from {train}/"
    )
    return parts[train], parts[tests[0]]


def labelled(pictures: Sequence[Entry], by: Labels | None, files: Sequence[Entry], report: Report) -> Labelled:
    """The classes of pictures: by their names up to the first _ if `by` is prefix, else as dataset.json among `files`
    has them, else by the first folders below what all paths have in common, if every picture lies in one.

    Raises:
        Unusable: names have no _, or dataset.json does not fit the pictures.
    """
    if by is None:
        return unlabelled(len(pictures))
    if by == "prefix":
        if without := [p.name for p in pictures if "_" not in PurePosixPath(p.name).name]:
            raise Unusable(f"data.labels = prefix: {without[0]} has no _ in its name, as cat_01.png has: set auto")
        report.found.append("classes are what file names have before their first _ (data.labels: prefix)")
        return _named([PurePosixPath(p.name).name.split("_")[0] for p in pictures])
    for folder in PurePosixPath(*_common(pictures), "x").parents:
        for entry in files:
            if PurePosixPath(entry.name) == folder / LABELS_FILE:
                return _from_json(pictures, entry, folder, report)
    for entry in files:
        report.leave_out(f"{LABELS_FILE} in a folder of pictures", entry.name)
    firsts = _first_folders(pictures)
    if any(first is None for first in firsts):
        loose = [p.name for p, first in zip(pictures, firsts, strict=True) if first is None]
        report.found.append(f"no classes: {len(loose):,} pictures, such as {loose[0]}, lie in no folder of a class")
        return unlabelled(len(pictures))
    return _named([str(first) for first in firsts])


def _common(pictures: Sequence[Entry]) -> tuple[str, ...]:
    """The folders that all paths begin with."""
    folders = [PurePosixPath(p.name).parent.parts for p in pictures]
    low, high = min(folders), max(folders)
    same = [a == b for a, b in zip(low, high, strict=False)]
    return low[: same.index(False)] if False in same else low[: len(same)]


def _first_folders(pictures: Sequence[Entry]) -> list[str | None]:
    """Of each picture the first folder below what all paths have in common; None = it lies in none."""
    depth = len(_common(pictures))
    folders = [PurePosixPath(p.name).parent.parts for p in pictures]
    return [parts[depth] if len(parts) > depth else None for parts in folders]


def _named(names: Sequence[str]) -> Labelled:
    classes = tuple(sorted(set(names)))
    if len(classes) == 1:
        return unlabelled(len(names))
    numbers = {name: number for number, name in enumerate(classes)}
    kind = np.min_scalar_type(len(classes) - 1)
    return Labelled(np.array([numbers[name] for name in names], dtype=kind), classes)


def _from_json(pictures: Sequence[Entry], entry: Entry, folder: PurePosixPath, report: Report) -> Labelled:
    """{"labels": [[path, number], ...]}, or null for none."""
    if entry.size > LARGEST_JSON:
        raise Unusable(f"{entry.name} takes {entry.size:,} bytes, more than {LARGEST_JSON:,}: leave it out")
    try:
        content: Any = json.loads(entry.read())
        rows = content["labels"]
        found = {} if rows is None else {str(PurePosixPath(folder, name)): label for name, label in rows}
    except Unusable as why:
        raise Unusable(f"{entry.name} {why}") from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Unusable(
            f'{entry.name} has no {{"labels": [[path, number], ...]}} ({error}): mend or remove it'
        ) from None
    if not found:
        report.found.append(f"no classes: {entry.name} has none")
        return unlabelled(len(pictures))
    if missing := [p.name for p in pictures if p.name not in found]:
        raise Unusable(
            f"{entry.name} has no label for {len(missing):,} pictures such as {missing[0]}: add or remove them"
        )
    labels = [found[p.name] for p in pictures]
    if wrong := [label for label in labels if type(label) is not int]:
        raise Unusable(f"{entry.name}: a label is {wrong[0]!r}: give whole numbers")
    report.found.append(f"classes are the numbers in {entry.name}")
    numbers = numbered(np.array(labels))
    return replace(numbers, labels=numbers.labels.astype(np.min_scalar_type(int(numbers.labels.max()))))
