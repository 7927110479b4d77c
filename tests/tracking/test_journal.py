"""The journal of a run, and the Git tags of one."""

import json
import math
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.stores import warnings

from diffusion.config import TrackingConfig
from diffusion.tracking import provenance, runs
from diffusion.tracking.journal import Journal, read_journal, remembered, sessions
from diffusion.tracking.tracker import Event, Tracker

pytest.importorskip("mlflow")


class TestJournal:
    def test_lines_are_ordered_complete_and_json(self, tmp_path: Path) -> None:
        journal = Journal(tmp_path / "runs/x/journal.jsonl")
        journal.params({"train.lr": 1.5e-3, "data.sources": ["local"], "data.path": None})
        journal.metrics({"loss": 0.1 + 0.2, "up": math.inf, "down": -math.inf, "what": math.nan}, 7)
        journal.tags({"a": "ü"})
        journal.artifact(Path("models/model.json"), "model")
        on_disk_before_close = (tmp_path / "runs/x/journal.jsonl").read_bytes()
        journal.close("FAILED", "why")
        journal.metrics({"late": 1.0}, 8)  # ignored
        lines = [json.loads(line, parse_constant=pytest.fail) for line in on_disk_before_close.splitlines()]
        assert [line["kind"] for line in lines] == ["params", "metrics", "tags", "artifact"]
        assert lines[0]["data"] == {"train.lr": 0.0015, "data.sources": ["local"], "data.path": None}
        assert lines[1]["data"] == {
            "step": 7,
            "values": {"loss": 0.1 + 0.2, "up": "inf", "down": "-inf", "what": "nan"},
        }
        assert lines[3]["data"] == {"path": "models/model.json", "folder": "model"}
        assert abs(lines[0]["time"] / 1000 - time.time()) < 3600
        events = read_journal(tmp_path / "runs/x/journal.jsonl")
        assert [event.kind for event in events] == ["params", "metrics", "tags", "artifact", "close"]
        assert events[1].data["values"]["down"] == -math.inf
        assert math.isnan(events[1].data["values"]["what"])
        assert events[4].data == {"status": "FAILED", "message": "why"}

    def test_goes_on_after_a_torn_line(self, tmp_path: Path) -> None:
        path = tmp_path / "journal.jsonl"
        first = Journal(path)
        first.metrics({"loss": 1.0}, 1)
        first.close("KILLED")
        with path.open("ab") as file:
            file.write(b'{"seq": 3, "time": 17, "kind": "metr')
        second = Journal(path)
        second.metrics({"loss": 2.0}, 2)
        assert [(event.kind, event.data.get("step")) for event in read_journal(path)] == [
            ("metrics", 1),
            ("close", None),
            ("metrics", 2),
        ]

    def test_sessions_that_write_at_once_are_told_apart(self, tmp_path: Path) -> None:
        path = tmp_path / "journal.jsonl"
        both = [Journal(path), Journal(path)]
        for journal in both:
            journal.record(Event("open", {"stage": "train", "run_id": None, "asked_run_id": None}, 1))
        for step in range(3):
            both[step % 2].metrics({"loss": float(step)}, step)
        first, second = sessions(path)
        assert [event.data["step"] for event in first.events] == [0, 2]
        assert [event.data["step"] for event in second.events] == [1]

    def test_a_journal_of_version_0_1_is_read(self, tmp_path: Path) -> None:
        """Its lines are numbered, and its sessions have no names."""
        path, opened = tmp_path / "journal.jsonl", {"stage": "train", "asked_run_id": None, "tags": {"host": "h"}}
        lines = [
            ("open", {**opened, "run_id": "r1"}),
            ("metrics", {"step": 1, "values": {"loss": 1.0}}),
            ("open", {**opened, "run_id": "r2"}),
            ("metrics", {"step": 2, "values": {"loss": "nan"}}),
            ("close", {"status": "FINISHED", "message": ""}),
        ]
        rows = [{"seq": n, "time": n, "kind": kind, "data": data} for n, (kind, data) in enumerate(lines, 1)]
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        first, second = sessions(path)
        assert ([e.kind for e in first.events], first.is_closed) == (["metrics"], False)
        assert ([e.kind for e in second.events], second.is_closed) == (["metrics", "close"], True)
        assert math.isnan(second.events[0].data["values"]["loss"])
        assert remembered(path) == "r2"

    def test_unwritable_folder_is_one_warning(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "file").write_text("")
        journal = Journal(tmp_path / "file/journal.jsonl")
        journal.metrics({"loss": 1.0}, 1)
        journal.close("FINISHED")
        assert len(warnings(capsys)) == 1

    def test_disabled_tracking_is_the_journal_alone(self, database: Path, tmp_path: Path) -> None:
        before = database.read_bytes()
        config = TrackingConfig(enabled=False, experiment="test experiment")
        tracker = runs.open_run(config, name="n", run_folder=tmp_path / "run")
        tracker.metrics({"loss": 1.0}, 1)
        tracker.close("FINISHED")
        assert tracker.run_id is None
        assert [e.kind for e in read_journal(tmp_path / "run/journal.jsonl")] == ["open", "metrics", "close"]
        assert database.read_bytes() == before

    def test_the_null_tracker_takes_every_call_and_leaves_nothing(self) -> None:
        """In a process of a rank other than 0, which would write beside the one that keeps the record."""
        picture = Path("picture.png")
        picture.write_bytes(b"png")
        calls: dict[str, tuple[Any, ...]] = {
            "params": ({"a": 1},),
            "metrics": ({"b": 2.0}, 3),
            "tags": ({"c": "x"},),
            "artifact": (picture, "pictures"),
            "image": (picture, "key", 3),
            "dataset": ("cifar10", "0" * 64, "data"),
            "keep": (picture, "pictures"),
            "model": (picture, {"name": "m"}),
            "close": ("FINISHED",),
        }
        inner = {"run_id", "is_new", "record", "finish"}
        assert set(calls) == {name for name in vars(Tracker) if name[0] != "_"} - inner
        tracker = Tracker()
        for name, arguments in calls.items():
            assert getattr(tracker, name)(*arguments) in (None, picture), name
        assert tracker.run_id is None
        assert [*Path().rglob("*")] == [picture]

    def test_what_lies_beside_the_journal_is_replaced_by_what_has_reached_the_disk(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A reader, and whoever comes after a power cut, finds the old file or the new one, never a part."""
        synced: dict[int, int] = {}  # bytes by inode
        real = os.fsync

        def fsync(fd: int) -> None:
            synced[os.fstat(fd).st_ino] = os.fstat(fd).st_size
            real(fd)

        monkeypatch.setattr(os, "fsync", fsync)
        path, file, folder = tmp_path / "run/journal.jsonl", tmp_path / "file", tmp_path / "folder"
        folder.mkdir()
        journal, inodes = Journal(path), []
        for text in ("1", "22"):
            synced.clear()
            for changed in (file, folder / "inner"):
                changed.write_text(text)
            beside = [journal.keep(file, "a"), journal.keep(folder, "b") / "inner"]
            for found in beside:
                assert found.read_text().strip() == text
                assert synced.get(found.stat().st_ino) == found.stat().st_size, f"{found.name} is not on the disk"
            inodes.append([found.stat().st_ino for found in beside])
        for found, before, after in zip(beside, *inodes, strict=True):
            assert before != after, f"{found.name} was written in place"


class TestGit:
    def git(self, folder: Path, *arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
        ).stdout.strip()

    def test_commit_and_dirty_flag(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
        assert provenance.git_tags() == {}
        self.git(tmp_path, "init", "-q")
        assert provenance.git_tags() == {}  # no commit yet
        (tmp_path / "a").write_text("1")
        self.git(tmp_path, "add", "a")
        self.git(tmp_path, "commit", "-q", "-m", "first")
        commit = self.git(tmp_path, "log", "-1", "--format=%H")
        assert provenance.git_tags() == {"git.commit": commit, "git.dirty": "false"}
        (tmp_path / "untracked").write_text("")
        assert provenance.git_tags()["git.dirty"] == "false"
        (tmp_path / "a").write_text("2")
        assert provenance.git_tags() == {"git.commit": commit, "git.dirty": "true"}

    def test_no_git_program(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        assert provenance.git_tags() == {}
