"""Files that are whole or not there at all, whatever kills the process or cuts the power."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

UNABLE = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # fsync on file systems that have none


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file to write, which takes the place of `path` once the block ends; an error leaves `path` as it was.

    `path` may be a link into DVC's cache: what it links to stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            sync(file)
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A small file of UTF-8 text, as `replacing` writes it."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, content: Any) -> None:
    """A small file of JSON that a person can read, as `replacing` writes it."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def publish(temporary: Path, path: Path) -> None:
    """Rename a file that is on the disk to `path`, in the same folder, and have the disk know of it."""
    temporary.replace(path)
    if os.name == "posix":  # a folder is no file elsewhere
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            fsync(folder)
        finally:
            os.close(folder)


def sync(file: BinaryIO) -> None:
    """Have all that was written to `file` on the disk."""
    file.flush()
    fsync(file.fileno())


def fsync(descriptor: int) -> None:
    """os.fsync, where the file system has it."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNABLE:
            raise
