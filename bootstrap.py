"""Create .venv and install requirements.lock into it, once; `make` calls this before anything else.

Needs nothing but an old Python 3, so that an unfit machine gets a clear line instead of a traceback.
"""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

OLDEST, NEWEST = (3, 11), (3, 13)
NEEDED_GB = 8  # torch with its CUDA libraries takes 6, its download up to 2 more for a while
VENV = Path(".venv")
STAMP = VENV / "installed.sha256"


def main():
    """Install, unless the stamp says that this very set is installed here."""
    digest = hashlib.sha256()
    for name in ("requirements.lock", "pyproject.toml", "bootstrap.py"):
        digest.update(Path(name).read_bytes())
    wanted = f"{digest.hexdigest()} {VENV.absolute()}"  # a virtual environment cannot be moved
    if STAMP.exists() and STAMP.read_text() == wanted:
        return
    python = fit_python()
    free = shutil.disk_usage(".").free / 1e9
    if free < NEEDED_GB and not VENV.is_dir():
        sys.exit(f"error: {free:.1f} GB of disk are free and {NEEDED_GB} are needed: make room, then try again")
    print(f"Setting up {VENV} with {python} (torch and its libraries are about 6 GB; this happens once).", flush=True)
    run([python, "-m", "venv", "--clear", str(VENV)], "install Python's venv module (Debian: apt install python3-venv)")
    pip = [str(VENV / "bin" / "python"), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    advice = "see the lines above; check the network and the disk, then try again"
    run([*pip, "--require-hashes", "-r", "requirements.lock"], advice)
    run([*pip, "--no-deps", "--no-build-isolation", "--editable", "."], advice)
    STAMP.write_text(wanted)


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
