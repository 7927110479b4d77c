"""Best values into params.yaml; with a search before it also in test_search_report.py."""

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.project import REPO
from helpers.studies import TUNE, fast_trials_at_once

from diffusion import config, params_file, paths
from diffusion.errors import UserError
from diffusion.tuning import apply, search
from diffusion.tuning.storage import storage_url


def test_a_link_and_other_keys_spellings_stay(tmp_path: Path) -> None:
    """Lists in block style, a linked file, and what is not named."""
    file, best = tmp_path / "mine/params.yaml", tmp_path / "best.yaml"
    file.parent.mkdir()
    text = (REPO / "params.yaml").read_text().replace("multipliers: [1, 2, 2]  #", "multipliers:  #")
    text = text.replace("  num_blocks:", "  - 1\n  - 2\n  - 2\n  num_blocks:")
    file.write_text(text)
    (tmp_path / "params.yaml").symlink_to(file)
    best.write_text("train:\n  lr: 1.0e-05\n  flip: false\nmodel:\n  head_channels: null\n")
    difference = apply.apply(best, tmp_path / "params.yaml")
    assert (tmp_path / "params.yaml").is_symlink()
    changed = [line for line in difference.splitlines() if line.startswith("+ ")]
    assert [line.split("  #")[0] for line in changed] == ["+  head_channels: null", "+  lr: 1e-05", "+  flip: false"]
    params = params_file.load(file)
    assert (params.train.lr, params.train.flip, params.model.head_channels) == (1e-5, False, None)


def test_line_endings_stay(tmp_path: Path) -> None:
    file, best = tmp_path / "params.yaml", tmp_path / "best.yaml"
    before = (REPO / "params.yaml").read_bytes().replace(b"\n", b"\r\n")
    file.write_bytes(before)
    best.write_text("train:\n  lr: 1.0e-05\n")
    apply.apply(best, file)
    lines = zip(before.split(b"\n"), file.read_bytes().split(b"\n"), strict=True)
    changed = [new for old, new in lines if old != new]
    assert len(changed) == 1
    assert changed[0].startswith(b"  lr: 1e-05")
    assert changed[0].endswith(b"\r")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- 1\n", "cannot be read"),
        ("train: 3\n", "cannot be read"),
        ("train: [", "cannot be read"),
        ("trian:\n  lr: 1\n", "trian.lr, which is no key"),
    ],
)
def test_best_values_that_are_none_are_one_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "best.yaml").write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        apply.apply(tmp_path / "best.yaml", REPO / "params.yaml")
    assert "\n" not in str(caught.value)


def test_values_that_params_do_not_allow_are_not_applied(tmp_path: Path) -> None:
    file, best = tmp_path / "params.yaml", tmp_path / "best.yaml"
    file.write_text((REPO / "params.yaml").read_text())
    with pytest.raises(UserError, match="run `make tune` first"):
        apply.apply(best, file)
    best.write_text("{}\n")
    with pytest.raises(UserError, match="no values yet"):
        apply.apply(best, file)
    best.write_text("train:\n  lr: 7\n")
    with pytest.raises(UserError, match=r"params\.yaml: train\.lr = 7"):
        apply.apply(best, file)
    assert file.read_text() == (REPO / "params.yaml").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.yaml", "params.yaml"]


def test_best_values_of_another_recipe_are_warned_of(
    place: Path, tiny: Callable[..., config.Params], capsys: pytest.CaptureFixture[str]
) -> None:
    file = place / "params.yaml"
    file.write_text((REPO / "params.yaml").read_text())
    params = params_file.load(file, TUNE | {"tune.space": params_file.load(file).tune.space})
    search.search("0" * 16, params, storage_url(params.tune), fast_trials_at_once)
    capsys.readouterr()
    for _ in range(2):  # applying them does not make it another recipe
        apply.apply(paths.BEST_YAML, file)
        assert capsys.readouterr().err == ""
    file.write_text((REPO / "params/gpu.yaml").read_text())
    apply.apply(paths.BEST_YAML, file)
    assert "was found for another recipe" in capsys.readouterr().err
