"""The name of a training: what would change its weights changes it, and nothing else; the same of a set of samples."""

import ast
import json
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from diffusion.code_digest import HARMLESS, HARMLESS_ROOMS, LIBRARY, code_digests
from diffusion.config import TrainedConfig, trained
from diffusion.pipeline import sample
from diffusion.training import identity
from diffusion.training.identity import NOT_IN_WEIGHTS, begin, fingerprint


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A copy to edit."""
    return Path(shutil.copytree(LIBRARY, tmp_path / "edited/diffusion", ignore=shutil.ignore_patterns("__pycache__")))


def changed(config: TrainedConfig, library: Path) -> set[str]:
    """Of `train` and `sample`, what the edited library gives another name than this one."""
    new = {"train": fingerprint(config, "a", library), "sample": sample.sampling_code(library)}
    old = {"train": fingerprint(config, "a"), "sample": sample.sampling_code()}
    return {name for name in old if new[name] != old[name]}


def test_the_fingerprint_changes_with_params_and_data(tiny) -> None:
    config = trained(tiny())
    names = {
        fingerprint(config, "a"),
        fingerprint(config, "b"),
        fingerprint(trained(tiny(**{"train.lr": 0.1})), "a"),
        fingerprint(trained(tiny(seed=1)), "a"),
    }
    assert len(names) == 4
    for same_training in (
        "sample.num_images",
        "train.processes",
        "train.micro_batch",
        "train.preview_every",
        "train.preview_images",
        "train.preview_steps",
    ):
        assert fingerprint(trained(tiny(**{same_training: 3})), "a") == fingerprint(config, "a")
    assert fingerprint(trained(tiny(**{"train.compile": "on"})), "a") == fingerprint(config, "a")


def test_what_scores_are_made_of_counts_where_they_are_computed(tiny) -> None:
    names = {
        fingerprint(trained(tiny(**{"train.evaluate_every": every, "train.preview_steps": steps})), "a")
        for every in (0, 4)
        for steps in (3, 5)
    }
    assert len(names) == 3


def test_comments_docstrings_and_layout_count_nowhere(tiny, library: Path) -> None:
    """All of them in all files at once: the code as Python prints it, with other docstrings."""
    for file in library.rglob("*.py"):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                node.value.value = "Other words."
        file.write_text(f"# a comment\n\n{ast.unparse(tree)}\n\n\n# another\n")
    scored = trained(tiny(**{"train.evaluate_every": 4}))
    assert changed(trained(tiny()), library) == changed(scored, library) == set()


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("training/loss.py", "train"),
        ("training/loop.py", "train"),
        ("training/ema.py", "train"),
        ("training/optim.py", "train"),
        ("training/augment.py", "train"),
        ("data/dataset.py", "train"),
        ("distributed.py", "train"),
        ("model/unet.py", "train sample"),
        ("model/layers.py", "train sample"),
        ("model/schedules.py", "train sample"),
        ("model/parameterization.py", "train sample"),
        ("model/denoiser.py", "train sample"),
        ("runtime.py", "train sample"),
        ("data/pixels.py", "train sample"),
        ("model/model_file.py", "sample"),
        ("sampling/samplers.py", "sample"),
        ("sampling/noise.py", "sample"),
        ("sampling/spacings.py", "sample"),
        ("sampling/generation.py", "sample"),
        ("training/checkpoint.py", ""),
        ("training/identity.py", ""),
        ("training/previews.py", ""),
        ("training/scoring.py", ""),
        ("sampling/panels.py", ""),
        ("sampling/partial.py", ""),
        ("metrics/frechet.py", ""),
        ("data/grids.py", ""),
        ("report/figures.py", ""),
        ("tracking/mlflow_writer.py", ""),
        ("tracking/journal.py", ""),
        ("serving/registry.py", ""),
        ("pipeline/train.py", ""),
        ("pipeline/sample.py", ""),
        ("tuning/search.py", ""),
        *((file, "") for file in HARMLESS),
    ],
)
def test_code_changes_the_names_of_what_depends_on_it(tiny, library: Path, file: str, what: str) -> None:
    with (library / file).open("a") as text:
        text.write("\n_EDITED = True\n")
    assert changed(trained(tiny()), library) == set(what.split())


@pytest.mark.parametrize(
    "file", ["sampling/samplers.py", "sampling/generation.py", "metrics/features.py", "training/scoring.py"]
)
def test_a_training_that_is_scored_depends_on_sampling_and_scores(tiny, library: Path, file: str) -> None:
    with (library / file).open("a") as text:
        text.write("\n_EDITED = True\n")
    assert "train" in changed(trained(tiny(**{"train.evaluate_every": 4})), library)


def test_no_other_file_is_left_out(tiny) -> None:
    """The loop's imports, walked by modulefinder, less the files and rooms that are named as harmless."""
    loop = code_digests("training/loop.py")
    assert not {*HARMLESS} & loop.keys()
    assert not {path for path in loop if path.split("/")[0] in HARMLESS_ROOMS}
    assert loop.keys() - identity.identity(trained(tiny()), "a")["code"].keys() == {*NOT_IN_WEIGHTS}


def test_torchs_version_changes_both_names(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(trained(tiny()), "a"), sample.samples_identity(tiny(), "model", "torch.float32", "cpu")
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    after = fingerprint(trained(tiny()), "a"), sample.samples_identity(tiny(), "model", "torch.float32", "cpu")
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_another_split_of_the_same_images_is_other_data(tiny_data) -> None:
    """Else a changed data.val_images would find the old training finished, or go on with it on other images."""
    moved = replace(tiny_data, train=tiny_data.train[1:], val=torch.cat([tiny_data.train[:1], tiny_data.val]))
    swapped = replace(tiny_data, train=tiny_data.val, val=tiny_data.train)
    relabelled = replace(tiny_data, digest="other labels")
    assert len({data.identity for data in (tiny_data, moved, swapped, relabelled)}) == 4
    assert replace(tiny_data, train=tiny_data.train.clone()).identity == tiny_data.identity


CODE = {"training/loss.py": "1", "model/unet.py": "2"}
KNOWN = {"config": {"lr": 1}, "data": "d", "code": CODE, "torch": "2.14.0"}


class TestBegin:
    """What is said when a training begins, and what is recorded."""

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        Path("requirements.lock").write_text("torch==2.14.0\n")
        self.runs = tmp_path / "runs"

    def begin(self, name: str, **changes: object) -> list[str]:
        return list(begin(self.runs / (name * 16), {**KNOWN, **changes}))

    def test_the_record_is_written_once_and_whole(self) -> None:
        assert self.begin("a") == []
        file = self.runs / f"{'a' * 16}/identity.json"
        before = file.read_bytes()
        record = json.loads(before)
        assert {key: record[key] for key in KNOWN} == KNOWN
        Path("requirements.lock").write_text("torch==2.14.0\nscipy==2\n")
        assert self.begin("a") == [
            f"requirements.lock changed since runs/{'a' * 16} began, torch 2.14.0 is the same: it is used"
        ]
        assert file.read_bytes() == before

    def test_a_known_training_that_starts_anew_says_why(self) -> None:
        self.begin("a")
        assert self.begin("b", code={"training/loss.py": "9", "model/unet.py": "2"}) == [
            f"starts anew: since runs/{'a' * 16} the code changed: training/loss.py"
        ]
        assert self.begin("c", code={"training/loss.py": "9"}, torch="2.15.0") == [
            f"starts anew: since runs/{'b' * 16} the code changed: model/unet.py and torch 2.14.0 -> 2.15.0"
        ]
        assert self.begin("d", config={"lr": 2}) == self.begin("e", data="e") == []

    def test_trainings_of_an_earlier_version_are_named(self) -> None:
        for name in ("1" * 16, "2" * 16, f"{'3' * 16}-0001-1201-010101-000000", "notes"):  # a trial is no training
            (self.runs / name).mkdir(parents=True)
            (self.runs / name / "step_00000600-0123456789abcdef.pt").touch()
        (line,) = self.begin("a")
        assert line.startswith("2 of an earlier version in runs/, whose code is not recorded, cannot be resumed: ")
        assert {word.strip(",") for word in line.split()[-2:]} == {"1" * 16, "2" * 16}
        assert self.begin("a") == []

    def test_a_damaged_record_is_written_anew(self) -> None:
        self.begin("a")
        file = self.runs / f"{'a' * 16}/identity.json"
        whole = file.read_bytes()
        file.write_bytes(whole[:-40])
        self.begin("a")
        assert file.read_bytes() == whole


def test_the_record_is_of_what_names_the_folder(tiny, tmp_path: Path) -> None:
    known = identity.identity(trained(tiny()), "a")
    list(begin(tmp_path / "x", known))
    record = json.loads((tmp_path / "x/identity.json").read_text())
    del record["requirements"]
    name = sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    assert name.startswith(fingerprint(trained(tiny()), "a"))
