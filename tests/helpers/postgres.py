"""A private Postgres of Debian's packages for tests: a folder of data, a free port on 127.0.0.1, gone afterwards."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from helpers.stores import free_port

SECONDS = 60.0  # a start that takes longer has failed
DEBIAN = Path("/usr/lib/postgresql")


def binaries() -> Path | None:
    """Folder of the newest Postgres on this machine: Debian keeps it off PATH."""
    found = sorted(DEBIAN.glob("*/bin/postgres"), key=lambda path: float(path.parts[-3]))
    on_path = shutil.which("postgres")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


def why_not() -> str:
    """Why `server` cannot work here, in words; empty if it can."""
    if binaries() is None:
        return "Postgres is not installed (Debian: apt install postgresql)"
    if find_spec("psycopg2") is None:
        return "psycopg2 is not installed (extra dev)"
    return ""


needs_postgres = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """Start an empty Postgres; yields its URL, postgresql://USER@127.0.0.1:PORT/postgres.

    Its log is written to `folder`; its data lie in a folder of its own below the system's temporary one, because it
    refuses to run as root and the user that takes root's place could not enter a folder of pytest's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    bin_folder, user = binaries(), _user()
    assert bin_folder, why_not()
    with (
        tempfile.TemporaryDirectory(prefix="postgres-", dir="/tmp") as home,
        (folder / "postgres.log").open("wb") as log,
    ):
        data = Path(home, "data")
        if user:
            shutil.chown(home, user)
        command = {"stdout": log, "stderr": log, "user": user, "cwd": home, "env": {**os.environ, "LC_ALL": "C"}}
        initdb = [bin_folder / "initdb", "-D", data, "-U", "postgres", "--auth=trust", "-E", "UTF8", "--no-sync"]
        subprocess.run(initdb, check=True, **command)
        port = free_port()
        options = ["-h", "127.0.0.1", "-p", str(port), "-k", home, "-F"]  # -F: no fsync, the data live for one test
        process = subprocess.Popen([bin_folder / "postgres", "-D", data, *options], **command)
        try:
            _wait(process, [bin_folder / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)], log.name)
            yield f"postgresql://postgres@127.0.0.1:{port}/postgres"
        finally:
            process.send_signal(signal.SIGINT)  # "fast": it hangs up on its clients
            process.wait(SECONDS)


def _user() -> str | None:
    """Whom Postgres runs as: this user, or for root one of those that every Debian has."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"


def _wait(process: "subprocess.Popen[Any]", asks: list[Any], log: str) -> None:
    end = time.monotonic() + SECONDS
    while subprocess.run(asks, check=False).returncode != 0:
        assert process.poll() is None, Path(log).read_text()
        assert time.monotonic() < end, Path(log).read_text()
        time.sleep(0.05)
