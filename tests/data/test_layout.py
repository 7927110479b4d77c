"""Which class and which part of the data a picture is of, by its path; what is not understood is refused or said."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion.data import grids
from diffusion.data.files import Entry, Report, sorted_out
from diffusion.data.layout import labelled, splits
from diffusion.data.npz import Unusable
from diffusion.data.pictures import Form
from diffusion.data.sources import Source, open_source
from diffusion.errors import UserError


def entries(*names: str, **contents: Any) -> list[Entry]:
    found = [Entry(name, 1, bytes) for name in names]
    return found + [Entry(f"{name}.json", 1, json.dumps(value).encode) for name, value in contents.items()]


def classes(names: list[str], by: Any = "auto", labels: Any = None, place: str = "dataset.json") -> dict[str, str]:
    """The class of each picture by its name; {} = there are none."""
    files = [] if labels is None else [Entry(place, 1, lambda: json.dumps({"labels": labels}).encode())]
    found = labelled(entries(*names), by, files, Report())
    if not found.classes:
        assert not found.labels.any()
        return {}
    return {name: found.classes[label] for name, label in zip(names, found.labels, strict=True)}


def test_folders_are_classes_if_every_picture_lies_in_one() -> None:
    assert classes(["cat/1.png", "cat/deep/2.png", "dog/1.png"]) == {
        "cat/1.png": "cat",
        "cat/deep/2.png": "cat",
        "dog/1.png": "dog",
    }
    assert classes(["a/b/cat/1.png", "a/b/dog/1.png"])["a/b/dog/1.png"] == "dog"
    assert classes(["1.png", "2.png"]) == {}
    assert classes(["cat/1.png", "cat/2.png"]) == {}
    report = Report()
    assert labelled(entries("cat/1.png", "dog/2.png", "3.png"), "auto", [], report).classes == ()
    assert report.found == ["no classes: 1 pictures, such as 3.png, lie in no folder of a class"]


def test_names_are_classes_when_asked() -> None:
    names = ["cat_0001.png", "dog_0001.png", "deep/cat_2_b.png"]
    assert classes(names, "prefix") == dict(zip(names, ["cat", "dog", "cat"], strict=True))
    with pytest.raises(Unusable, match=r"photo\.png has no _ in its name.*: set auto"):
        classes([*names, "photo.png"], "prefix")


@pytest.mark.parametrize("top", ["", "set/", "a/b/"])
def test_numbers_of_dataset_json_are_classes(top: str) -> None:
    """EDM's archives have chunks of 1,000 pictures as folders, which say nothing."""
    names = [f"{top}0000{i // 2}/img0000000{i}.png" for i in range(4)]
    rows = [[name.removeprefix(top), 3 - i // 3] for i, name in enumerate(names)]
    assert classes(names, labels=rows, place=f"{top}dataset.json") == dict(zip(names, "3332", strict=True))
    rows[0][0] = "./" + rows[0][0]
    assert classes(names[:1], labels=rows, place=f"{top}dataset.json") == {names[0]: "3"}


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([["a/1.png", 0]], r"has no label for 1 pictures such as b/1\.png: add"),
        ([["a/1.png", 0], ["b/1.png", 0.5]], "a label is 0.5: give whole numbers"),
        ([["a/1.png", 0], ["b/1.png", [0, 1]]], r"a label is \[0, 1\]: give whole numbers"),
        ([["a/1.png", 0], ["b/1.png", -1]], "labels go from -1 to 0"),
        ([1, 2], r'has no {"labels": \[\[path, number\], ...\]}'),
        ("cat", r'has no {"labels": \[\[path, number\], ...\]}'),
    ],
)
def test_another_dataset_json_is_refused(labels: Any, words: str) -> None:
    with pytest.raises(Unusable, match=words):
        classes(["a/1.png", "b/1.png"], labels=labels)


def test_dataset_json_without_labels_means_no_classes() -> None:
    report = Report()
    files = entries(dataset={"labels": None})
    assert labelled(entries("00000/1.png", "00001/2.png"), "auto", files, report).classes == ()
    assert report.found == ["no classes: dataset.json has none"]


@pytest.mark.parametrize(
    ("train", "test", "other"),
    [("train", "test", None), ("train", "val", None), ("Training", "Testing", None), ("train", "test", "valid")],
)
def test_folders_train_and_test_are_parts_of_the_data(train: str, test: str, other: str | None) -> None:
    names = [f"top/{part}/{kind}/1.png" for part in (train, test, other) if part for kind in "xy"]
    report = Report()
    found = splits(entries(*names), report)
    assert [[e.name for e in part] for part in found] == [names[:2], names[2:4]]
    assert report.found == [
        f"{train}/ is for training (2 pictures) and {test}/ for testing (2); validation images are taken from {train}/"
    ]
    assert report.left_out == ({f"pictures of {other}, beside {train} and {test}": (2, names[4])} if other else {})


def test_other_pictures_beside_train_and_test_are_refused() -> None:
    for stray in ("cat/1.png", "1.png"):
        with pytest.raises(Unusable, match=f"{stray} lies beside the folders train and test: .*train alone"):
            splits(entries("train/x/1.png", "test/x/1.png", stray), Report())
    for names in (["train/1.png", "bus/1.png"], ["test/1.png", "quiz/1.png"]):  # classes
        assert splits(entries(*names), Report())[1] == []


def test_what_is_left_out_is_counted_by_reason() -> None:
    report = Report()
    names = ["a.png", "b.txt", "c/d.txt", ".git/e.png", "f", "g.heic", "a.png"]
    taken = sorted_out(iter([*entries(*names), Entry("gone.png", -1, bytes)]), report)
    assert [entry.name for entry in taken] == ["a.png"]
    assert report.left_out == {
        ".txt files": (2, "b.txt"),
        "hidden files": (1, ".git/e.png"),
        "files without a suffix": (1, "f"),
        ".heic files": (1, "g.heic"),
        "files whose name another has too": (1, "a.png"),
        "links to folders or to nothing, pipes and the like": (1, "gone.png"),
    }
    assert report.omissions()[0] == "left out: 2 .txt files (such as b.txt)"


def opened(path: Path) -> Source:
    return open_source(path, Form(8, 3))


def test_a_folder_with_all_of_it(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    for i, part in enumerate(("train/x", "train/y", "test/x")):
        grids.save_all(pictures[4 * i : 4 * i + 4], tmp_path / part)
    (tmp_path / "train/notes.md").write_text("")
    (tmp_path / "linked").symlink_to(tmp_path / "train")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.png")
    source = opened(tmp_path)
    np.testing.assert_array_equal(source.images[:], pictures[:8])
    assert source.test is not None
    np.testing.assert_array_equal(source.test.images[:], pictures[8:])
    assert source.labelled.counts() == {"x": 4, "y": 4}
    assert list(source.lines()) == [
        f"{tmp_path}: 8 images of 8 x 8 pixels",
        "  train/ is for training (8 pictures) and test/ for testing (4); validation images are taken from train/",
        "  left out: 3 links to folders or to nothing, pipes and the like (such as broken.png)",
        "  left out: 1 .md files (such as train/notes.md)",
        "  2 classes: x (4), y (4)",
    ]


def test_nothing_usable_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_text("")
    (tmp_path / "photo.png").write_text("")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/c.npz").write_text("")
    with pytest.raises(UserError, match=r"holds no pictures .*: 1 \.npz files \(such as c\.npz\): give a"):
        opened(tmp_path / "b")
    with pytest.raises(UserError, match=r"photo\.png is not a folder.*one picture is none: name its folder"):
        opened(tmp_path / "photo.png")
    (tmp_path / "own.tar").write_bytes(bytes(1024))
    with pytest.raises(UserError, match=r"own\.tar is not a folder.*: unpack or convert it"):
        opened(tmp_path / "own.tar")
