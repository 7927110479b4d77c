"""Parquet files of encoded pictures, as the Hugging Face hub keeps CIFAR-10, against the arrays that were encoded."""

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion.data import grids
from diffusion.data.pictures import Form
from diffusion.data.sources import Source, open_source
from diffusion.errors import UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ARRAY = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
HUB = {"info": {"features": {"label": {"names": ["airplane", "automobile", "bird"], "_type": "ClassLabel"}}}}


def table(path: Path, array: np.ndarray, column: str = "img", *, struct: bool = True, **columns: Any) -> Path:
    encoded = [grids.png(picture) for picture in array]
    cells = [{"bytes": content, "path": None} for content in encoded] if struct else encoded
    content = pa.table({column: cells, **columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(content.replace_schema_metadata({"huggingface": json.dumps(HUB)}), path, row_group_size=3)
    return path


def opened(path: Path) -> Source:
    return open_source(path, Form(8, 3))


@pytest.mark.parametrize(("column", "struct"), [("img", True), ("image", True), ("image", False)])
def test_pictures_labels_and_names_of_classes(tmp_path: Path, column: str, struct: bool) -> None:
    source = opened(table(tmp_path / "a.parquet", ARRAY, column, struct=struct, label=[2, 0, 0, 1, 2, 2, 0]))
    for rows in (slice(0, 7), slice(5, 7), slice(1, 4)):
        np.testing.assert_array_equal(source.images[rows], ARRAY[rows])
    assert source.labelled.labels.tolist() == [2, 0, 0, 1, 2, 2, 0]
    assert source.labelled.counts() == {"airplane": 3, "automobile": 1, "bird": 3}


def test_a_folder_of_shards_has_its_test_images(tmp_path: Path) -> None:
    for i, rows in enumerate((slice(0, 3), slice(3, 5))):
        table(tmp_path / f"plain_text/train-0000{i}-of-00002.parquet", ARRAY[rows], label=[0] * len(ARRAY[rows]))
    table(tmp_path / "plain_text/test-00000-of-00001.parquet", ARRAY[5:], label=[1, 1])
    (tmp_path / "README.md").write_text("")
    source = opened(tmp_path)
    np.testing.assert_array_equal(source.images[:], ARRAY[:5])
    assert source.test is not None
    np.testing.assert_array_equal(source.test.images[:], ARRAY[5:])
    assert source.report.left_out == {".md files": (1, "README.md")}


def test_what_cannot_be_used_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(tmp_path / "a.parquet", ARRAY, "jpg", label=[0] * 7)
    with pytest.raises(UserError, match="columns jpg, label: name the one with the pictures img or image"):
        opened(path)
    table(path, ARRAY, label=["cat"] * 7)
    with pytest.raises(UserError, match=r"a\.parquet: labels are .*: give whole numbers"):
        opened(path)
    pq.write_table(pa.table({"img": [b"x", None]}), path)
    with pytest.raises(UserError, match=r"2 of 2 .*parquet:0 is damaged .*parquet:1 holds no bytes of a picture"):
        opened(path).images[:]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"a\.parquet cannot be used"):
        opened(path)
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"a\.parquet needs pyarrow to be read: pip install pyarrow"):
        opened(path)
