"""Create .venv and install requirements.lock into it, once; `make` calls this before anything else.

Runs on any Python 3 with nothing installed, so that an unfit machine gets a clear line instead of a traceback.
"""

import hashlib
import os
import shutil
import subprocess
import sys

OLDEST, NEWEST = (3, 11), (3, 13)
NEEDED_GB = 8  # torch with its CUDA libraries takes 6, its download up to 2 more for a while
VENV = ".venv"
STAMP = os.path.join(VENV, "installed.sha256")


def main():
    digest = hashlib.sha256()
    for name in ("requirements.lock", "pyproject.toml", "bootstrap.py"):
        with open(name, "rb") as file:
            digest.update(file.read())
    wanted = digest.hexdigest() + " " + os.path.abspath(VENV)  # a virtual environment cannot be moved
    if os.path.exists(STAMP):
        with open(STAMP) as file:
            if file.read() == wanted:
                return
    python = fit_python()
    free = shutil.disk_usage(".").free / 1e9
    if free < NEEDED_GB and not os.path.isdir(VENV):
        sys.exit("error: %.1f GB of disk are free and %d are needed: make room, then try again" % (free, NEEDED_GB))
    print("Setting up %s with %s (torch and its libraries are about 6 GB; this happens once)." % (VENV, python))
    run([python, "-m", "venv", "--clear", VENV], "install Python's venv module (Debian: apt install python3-venv)")
    pip = [os.path.join(VENV, "bin", "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    advice = "see the lines above; check the network and the disk, then try again"
    run(pip + ["--require-hashes", "-r", "requirements.lock"], advice)
    run(pip + ["--no-deps", "--no-build-isolation", "--editable", "."], advice)
    with open(STAMP, "w") as file:
        file.write(wanted)


def fit_python():
    """A Python that the locked packages support: this one, or another on PATH."""
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        return sys.executable
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        found = shutil.which("python3.%d" % minor)
        if found:
            return found
    return sys.exit(
        "error: Python 3.%d to 3.%d is needed and %s is %d.%d: install one, or name it: make PYTHON=/path/to/python3.12"
        % (OLDEST[1], NEWEST[1], sys.executable, sys.version_info[0], sys.version_info[1])
    )


def run(command, advice):
    """Run `command`; if it fails, say what to do."""
    if subprocess.call(command) != 0:
        sys.exit("error: set-up failed at `%s`: %s" % (" ".join(command[:4]), advice))


if __name__ == "__main__":
    main()
