"""Make sure that .venv has what requirements.lock names; `make` calls this before anything else.

An environment that has it is used as it is, whatever made it and wherever it lies: people share 6 GB by a link. Needs
nothing but an old Python 3, so that an unfit machine gets a clear line instead of a traceback.
"""

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

OLDEST, NEWEST = (3, 11), (3, 13)
NEEDED_GB = 8  # torch with its CUDA libraries takes 6, its download up to 2 more for a while
LOCK = Path("requirements.lock")
VENV = Path(".venv")
STAMP = VENV / "installed.sha256"
# Run by the environment's Python; packaging is one of the locked packages.
HAS_ALL = """
import sys
from importlib.metadata import version
from packaging.requirements import Requirement
lines = [line.rstrip(" \\\\\\n") for line in open(sys.argv[1]) if line[0].isalnum()]
wanted = [Requirement(line) for line in lines]
sys.exit(any(version(r.name) not in r.specifier for r in wanted if r.marker is None or r.marker.evaluate()))
"""


def main():
    """Install what is missing, unless the stamp says that this very set was installed here."""
    wanted = f"{hashlib.sha256(LOCK.read_bytes()).hexdigest()} {VENV.absolute()}"  # an environment cannot be moved
    if not VENV.is_symlink() and STAMP.exists() and STAMP.read_text() == wanted:
        return
    if not has_all():
        if VENV.is_symlink():
            python = VENV.resolve() / "bin" / "python"
            sys.exit(
                f"error: .venv is a link to {VENV.resolve()}, which has not what {LOCK} names: install it there "
                f"({python} -m pip install --require-hashes -r {LOCK}), or remove the link and try again"
            )
        install()
    if not VENV.is_symlink():
        STAMP.write_text(wanted)


def has_all():
    """Whether the environment's Python works and has every locked package in its version."""
    python = VENV / "bin" / "python"
    if not python.exists() or was_moved():
        return False
    return subprocess.call([str(python), "-c", HAS_ALL, str(LOCK)], stderr=subprocess.DEVNULL) == 0


def was_moved():
    """Whether the environment's commands, such as dvc, call the Python of another folder: they name it by its path."""
    script = VENV / "bin" / "dvc"
    named = re.search(r"/[^\n\"']*(?=/python)", script.read_text()) if script.is_file() else None
    folder = Path(named.group()) if named else VENV / "bin"
    return VENV.is_dir() and not (folder.is_dir() and folder.samefile(VENV / "bin"))


def install():
    """Bring .venv up to date; it is made anew only if there is none, or it was moved, or has no pip that runs."""
    pip = [str(VENV / "bin" / "python"), "-m", "pip"]
    usable = (
        not was_moved()
        and shutil.which(pip[0])
        and subprocess.call([*pip, "--version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
    )
    if not usable:
        python = fit_python()
        free = shutil.disk_usage(".").free / 1e9
        if free < NEEDED_GB and not VENV.is_dir():
            sys.exit(f"error: {free:.1f} GB of disk are free and {NEEDED_GB} are needed: make room, then try again")
        print(
            f"Setting up {VENV} with {python} (torch and its libraries are about 6 GB; this happens once).", flush=True
        )
        advice = "install Python's venv module (Debian: apt install python3-venv)"
        run([python, "-m", "venv", "--clear", str(VENV)], advice)
    else:
        print(f"Bringing {VENV} up to date with {LOCK}.", flush=True)
    quiet = [*pip, "install", "-qq", "--disable-pip-version-check"]
    advice = "see the lines above; check the network and the disk, then try again"
    run([*quiet, "--require-hashes", "-r", str(LOCK)], advice)
    run([*quiet, "--no-deps", "--no-build-isolation", "--editable", "."], advice)


def fit_python():
    """A Python that the locked packages support: this one, or another on PATH."""
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        return sys.executable
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        found = shutil.which(f"python3.{minor}")
        if found:
            return found
    return sys.exit(
        f"error: Python 3.{OLDEST[1]} to 3.{NEWEST[1]} is needed and {sys.executable} is {sys.version.split()[0]}: "
        "install one, or name it: make PYTHON=/path/to/python3.12"
    )


def run(command, advice):
    """Run `command`; if it fails, say what to do."""
    if subprocess.call(command) != 0:
        sys.exit(f"error: set-up failed at `{' '.join(command[:4])}`: {advice}")


if __name__ == "__main__":
    main()
