"""The tests' own walls: a folder each, and a look at the repository before and after."""

import os
from pathlib import Path

from helpers import isolation
from helpers.project import REPO

from diffusion import paths


def test_a_test_works_in_its_own_folder(tmp_path: Path) -> None:
    assert Path.cwd() == tmp_path
    anchored = [path for path in vars(paths).values() if isinstance(path, Path) and path.is_absolute()]
    assert len(anchored) >= 7
    assert all(path.is_relative_to(tmp_path) for path in anchored)
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_what_changed_is_seen(tmp_path: Path) -> None:
    for name in ("kept", "edited", "removed"):
        Path(name).write_text("before")
    before = isolation.snapshot(tmp_path)
    assert isolation.differences(before, isolation.snapshot(tmp_path)) == []
    Path("edited").write_text("afterw")
    os.utime("edited", ns=(1, 1))
    Path("removed").unlink()
    Path("new").mkdir()
    Path("new/__pycache__").mkdir()
    Path("new/file").touch()
    seen = isolation.differences(before, isolation.snapshot(tmp_path))
    expected = [("changed", "edited"), ("created", "new"), ("created", "new/file"), ("removed", "removed")]
    assert seen == [f"{kind}: {tmp_path / name}" for kind, name in expected]


def test_the_repository_is_looked_at() -> None:
    assert str(REPO / "src/diffusion/paths.py") in isolation.snapshot()
