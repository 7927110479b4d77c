"""`python -m diffusion runs`: what is needed is never removed."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.locked import locked

from diffusion import paths
from diffusion.pipeline.run_folders import main
from diffusion.tracking.journal import Journal, note
from diffusion.tracking.tracker import Event

NAMES = {letter: letter * 16 for letter in "abcdef"}


def training(letter: str, *, step: int = 8, lr: float = 0.1, known: bool = True) -> Path:
    folder = paths.RUNS / NAMES[letter]
    folder.mkdir(parents=True)
    (folder / f"step_{step:08d}-0123456789abcdef.pt").write_bytes(bytes(1_500_000))
    if known:
        record = {"config": {"seed": 0, "train": {"steps": 8, "lr": lr}}, "data": "d", "code": {}, "torch": "2"}
        (folder / "identity.json").write_text(json.dumps(record))
    return folder


def card(path: Path, letter: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"fingerprint": NAMES[letter]}))


def journal(folder: Path) -> Journal:
    made = Journal(folder / "journal.jsonl")
    made.record(Event("open", {"run_id": None, "tags": {}}, 1))
    made.finish()
    return made


def said(*arguments: str, answer: str = "") -> str:
    result = CliRunner().invoke(main, arguments, input=answer, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def left() -> set[str]:
    return {path.name[0] for path in paths.RUNS.iterdir()}


def test_what_lies_there_is_listed_with_what_differs(workspace: Path) -> None:
    training("a", lr=0.1)
    training("b", step=4, lr=0.2)
    training("c", step=600, known=False)
    (paths.RUNS / f"{NAMES['d']}-0001-1201-010101-000000").mkdir()
    card(paths.MODEL_CARD, "a")
    output = said()
    lines = {line[0]: " ".join(line.split()) for line in output.splitlines()}
    assert lines["a"].startswith(f"{NAMES['a']} step 8 of 8 1.5 MB 20")
    assert lines["a"].endswith("models/ train.lr=0.1")
    assert f"{NAMES['b']} step 4 of 8" in lines["b"]
    assert lines["b"].endswith("unfinished train.lr=0.2")
    assert lines["c"].endswith("unfinished of an earlier version")
    assert "1 folders of searches and served models" in output
    assert "seed" not in output
    assert "0 of 3 trainings are not needed" in output


def test_what_a_result_needs_stays(workspace: Path) -> None:
    for letter in "abcdef":
        training(letter, step=4 if letter == "c" else 8)
    card(paths.MODEL_CARD, "a")
    card(paths.SAMPLES_CARD, "b")
    journal(paths.RUNS / NAMES["d"])
    sent = journal(paths.RUNS / NAMES["f"])
    note(paths.RUNS / NAMES["f"] / "journal.jsonl", "sent", [sent.session])
    assert "unsent: make sync" in said()
    with locked(paths.RUNS / NAMES["e"] / "lock", seconds=2):
        assert "removed ffffffffffffffff\n" in said("--remove", "--yes")
        assert left() == set("abcde")
    assert "removed cccccccccccccccc, eeeeeeeeeeeeeeee\n" in said("--remove", "--unfinished", "--yes")
    assert left() == set("abd")


@pytest.mark.parametrize(("answer", "stays"), [("n\n", {"a"}), ("\n", {"a"}), ("y\n", set())])
def test_it_asks_first(workspace: Path, answer: str, stays: set[str]) -> None:
    training("a")
    assert "Remove 1 of 1 trainings (1.5 MB)?" in said("--remove", answer=answer)
    assert left() == stays


def test_a_card_that_cannot_be_read_keeps_all(workspace: Path) -> None:
    training("a")
    card(paths.MODEL_CARD, "b")
    paths.MODEL_CARD.write_text("{torn")
    said("--remove", "--yes")
    assert left() == {"a"}
