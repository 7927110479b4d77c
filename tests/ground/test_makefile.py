"""The Makefile as a text: each target once, and listed by `make help`."""

import re
import subprocess

from helpers.project import REPO

TEXT = (REPO / "Makefile").read_text()
TARGETS = re.findall(r"^([a-z][a-z-]*):", TEXT, re.M)


def test_each_target_is_there_once_and_declared() -> None:
    """Of two with one name make runs the last, in silence but for a warning."""
    (declared,) = re.findall(r"^\.PHONY: (.*)$", TEXT, re.M)
    assert sorted(TARGETS) == sorted(declared.split())


def test_help_lists_every_target() -> None:
    said = subprocess.run(["make", "-C", str(REPO), "help"], capture_output=True, text=True, check=True)
    assert re.findall(r"^  make ([a-z-]+) ", said.stdout, re.M) == TARGETS
    assert said.stderr == ""
