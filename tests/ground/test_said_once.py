"""An error that does not stop the pipeline is in the log, once."""

import ast
import errno
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.project import REPO

from diffusion import paths
from diffusion.sampling.partial import PartialSamples
from diffusion.tracking import lineage, provenance
from diffusion.tracking.journal import Journal, note

SOURCES = [*REPO.glob("src/diffusion/**/*.py"), *REPO.glob("stages/*.py"), REPO / "bootstrap.py"]


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_handler_just_passes(path: Path) -> None:
    handlers = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ExceptHandler)]
    for handler in handlers:
        assert not all(isinstance(line, ast.Pass) for line in handler.body), f"{path.name}:{handler.lineno}"
        assert handler.type is not None, f"{path.name}:{handler.lineno} catches everything"


@pytest.mark.parametrize(("number", "count"), [(errno.EIO, 1), (errno.EINVAL, 0)])
def test_a_journal_that_does_not_reach_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, count: int
) -> None:
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    journal = Journal(tmp_path / "journal.jsonl")
    journal.metrics({"loss": 1.0}, 1)
    monkeypatch.setattr(os, "fsync", fail)
    journal.close("FINISHED")
    assert len(lines(capsys)) == count  # a file system without fsync has done what it can


def test_a_mark_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "journal.jsonl").mkdir()
    note(tmp_path / "journal.jsonl", "sent", ["a"])
    (line,) = lines(capsys)
    assert "is sent again" in line


def test_a_git_that_hangs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def hang(command: list[str], **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, 5)

    monkeypatch.setattr(subprocess, "run", hang)
    assert provenance.git_tags() == {}
    assert {line.split(":")[0] for line in lines(capsys)} == {"warning"}


def test_a_damaged_part_and_a_damaged_card(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = PartialSamples(workspace / "parts")
    parts.save(range(2), np.zeros((2, 4, 4, 3), dtype=np.uint8))
    next((workspace / "parts").glob("*.npz")).write_bytes(b"torn")
    assert list(parts.found()) == []
    (line,) = lines(capsys)
    assert "generated again" in line

    assert lineage._json(paths.SAMPLES_CARD) == {}
    assert lines(capsys) == []  # nothing sampled yet is no error
    paths.SAMPLES.mkdir()
    paths.SAMPLES_CARD.write_text("{torn")
    assert lineage._json(paths.SAMPLES_CARD) == {}
    (line,) = lines(capsys)
    assert str(paths.SAMPLES_CARD) in line
    paths.SAMPLES_CARD.write_text(json.dumps({"a": 1}))
    assert lineage._json(paths.SAMPLES_CARD) == {"a": 1}
