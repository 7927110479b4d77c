"""Tables of encoded pictures: parquet files with an image and a label column, as on the Hugging Face hub."""

import json
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.data.files import Entry
from diffusion.data.layout import Labelled, numbered, unlabelled
from diffusion.data.npz import Unusable
from diffusion.errors import UserError

IMAGES = ("img", "image")
LABELS = ("label", "labels", "fine_label")


class Table:
    """One parquet file; of its pictures a row group at a time is in memory."""

    def __init__(self, path: Path, parquet: Any) -> None:
        self._file = parquet.ParquetFile(path)
        self._path = path
        names = self._file.schema_arrow.names
        self.image = next((name for name in IMAGES if name in names), None)
        self.label = next((name for name in LABELS if name in names), None)
        if self.image is None:
            wanted = " or ".join(IMAGES)
            raise Unusable(f"{path.name} has the columns {', '.join(names)}: name the one with the pictures {wanted}")
        self._lock = threading.Lock()
        self._group: tuple[int, list[bytes]] = (-1, [])

    def entries(self) -> Iterator[Entry]:
        """Its pictures in order."""
        row = 0
        for group in range(self._file.num_row_groups):
            for i in range(self._file.metadata.row_group(group).num_rows):
                yield Entry(f"{self._path.name}:{row}", 0, partial(self._read, group, i))
                row += 1

    def labels(self) -> np.ndarray | None:
        """Integers, a label a row."""
        if self.label is None:
            return None
        return np.asarray(self._file.read(columns=[self.label]).column(0).to_numpy())

    def class_names(self) -> list[str]:
        """As the hub's metadata have them; else none."""
        about = json.loads((self._file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        names: list[str] = about.get("info", {}).get("features", {}).get(self.label, {}).get("names", [])
        return names

    def _read(self, group: int, row: int) -> bytes:
        with self._lock:
            if self._group[0] != group:
                cells = self._file.read_row_group(group, columns=[self.image]).column(0).to_pylist()
                self._group = group, [cell["bytes"] if isinstance(cell, dict) else cell for cell in cells]
            content = self._group[1][row]
        if not isinstance(content, bytes):
            raise Unusable("holds no bytes of a picture: save encoded pictures")
        return content


def read_tables(files: Sequence[Path]) -> tuple[list[Entry], Labelled]:
    """The pictures of parquet files in the order of their names, and their labels.

    Raises:
        UserError: pyarrow is not installed.
        Unusable: a file has no such columns, or labels are not integers.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{files[0]} needs pyarrow to be read: pip install pyarrow") from None
    tables = [Table(path, pyarrow.parquet) for path in sorted(files)]
    entries = [entry for table in tables for entry in table.entries()]
    parts = [labels for table in tables if (labels := table.labels()) is not None]
    if len(parts) < len(tables):
        return entries, unlabelled(len(entries))
    labels = np.concatenate(parts)
    if labels.dtype.kind not in "iu":
        raise Unusable(f"labels are {labels.dtype}: give whole numbers")
    found = numbered(labels)
    names = tables[0].class_names()
    return entries, Labelled(
        labels.astype(np.min_scalar_type(int(labels.max()))),
        tuple(names) if len(names) >= len(found.classes) else found.classes,
    )
