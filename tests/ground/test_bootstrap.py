"""bootstrap.py: an environment that has the locked packages is used as it is, and nothing is wiped through a link."""

import importlib.util
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
from helpers.project import REPO

ENVIRONMENT = Path(sys.prefix)
pytestmark = pytest.mark.skipif(not (ENVIRONMENT / "pyvenv.cfg").exists(), reason="runs in a virtual environment alone")


@pytest.fixture
def bootstrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script in a clone; `ran` has the commands that it would have run."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(REPO / "requirements.lock", tmp_path)
    spec = importlib.util.spec_from_file_location("bootstrap", REPO / "bootstrap.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.ran = []  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "run", lambda command, advice: module.ran.append(command))
    return module


def outdated() -> None:
    lock = Path("requirements.lock")
    lock.write_text(re.sub(r"^click==\S+", "click==1.2.3", lock.read_text(), flags=re.M))


def own_environment() -> None:
    """A real folder with the packages of the environment that runs the tests."""
    shutil.copytree(
        ENVIRONMENT,
        ".venv",
        ignore=lambda _, names: {*names} - {"bin", "pyvenv.cfg", "python", "python3"},
        symlinks=True,
    )
    Path(".venv/lib").symlink_to(ENVIRONMENT.resolve() / "lib")


def test_a_linked_environment_that_fits_is_used_as_it_is(bootstrap: ModuleType) -> None:
    Path(".venv").symlink_to(ENVIRONMENT)
    before = sorted(path.name for path in ENVIRONMENT.iterdir())
    bootstrap.main()
    assert bootstrap.ran == []
    assert Path(".venv").is_symlink()
    assert sorted(path.name for path in ENVIRONMENT.iterdir()) == before


def test_a_linked_environment_that_does_not_fit_is_named_and_left_alone(bootstrap: ModuleType) -> None:
    Path(".venv").symlink_to(ENVIRONMENT)
    outdated()
    with pytest.raises(SystemExit, match=r"\.venv is a link to .* remove the link"):
        bootstrap.main()
    assert bootstrap.ran == []
    assert (ENVIRONMENT / "bin/python").exists()


def test_an_environment_of_ones_own_that_fits_is_used_and_not_asked_again(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_environment()
    bootstrap.main()
    assert bootstrap.ran == []
    monkeypatch.setattr(bootstrap, "has_all", lambda: pytest.fail("the stamp says it"))
    bootstrap.main()


@pytest.mark.parametrize("header", ["#!{}/python", '#!/bin/sh\n\'\'\'exec\' "{}/python3" "$0" "$@"'])
def test_an_environment_whose_folder_was_moved_is_made_anew(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, header: str
) -> None:
    """Its commands call the Python of the place where it was, which may be another clone's by now."""
    monkeypatch.setattr(bootstrap, "NEEDED_GB", 0)
    own_environment()
    for folder, commands in ((Path(".venv/bin").absolute(), []), (ENVIRONMENT / "bin", ["venv", "pip", "pip"])):
        Path(".venv/installed.sha256").unlink(missing_ok=True)
        Path(".venv/bin/dvc").write_text(header.format(folder) + "\nimport re\n")
        bootstrap.main()
        assert [command[2] for command in bootstrap.ran] == commands


def test_an_outdated_environment_is_brought_up_to_date_and_not_wiped(bootstrap: ModuleType) -> None:
    own_environment()
    outdated()
    bootstrap.main()
    assert [command[2:4] for command in bootstrap.ran] == [["pip", "install"]] * 2
    assert not any("--clear" in command for command in bootstrap.ran)


def test_without_an_environment_one_is_made(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "NEEDED_GB", 0)
    monkeypatch.setattr(bootstrap, "STAMP", Path("stamp"))
    bootstrap.main()
    assert [command[2] for command in bootstrap.ran] == ["venv", "pip", "pip"]
