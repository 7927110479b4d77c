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


def test_a_store_with_a_password_is_no_argument_of_a_command() -> None:
    """Which every user of the machine could read; a $ in it arrives as it is."""
    store, private = "STORAGE=postgresql://me:p$w$(x)@host/db", "python -m stages.tune"
    shown = ["make", "-C", str(REPO), "-n", "tune", store]
    said = subprocess.run(shown, capture_output=True, text=True, check=True).stdout
    assert private in said
    assert "host/db" not in said
    printed = ["make", "-s", "-f", str(REPO / "Makefile"), "-f", "-", "tune", "setup=", store]
    makefile = "setup:\n\t@:\ntune:\n\t@printenv OPTUNA_STORAGE\n"
    said = subprocess.run(printed, input=makefile, capture_output=True, text=True, check=True).stdout
    assert said == "postgresql://me:p$w$(x)@host/db\n"


def test_help_lists_every_target() -> None:
    said = subprocess.run(["make", "-C", str(REPO), "help"], capture_output=True, text=True, check=True)
    assert re.findall(r"^  make ([a-z-]+) ", said.stdout, re.M) == TARGETS
    assert said.stderr == ""
