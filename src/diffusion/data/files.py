"""The files of a folder or an archive: which are pictures, and a count of all that becomes of them."""

import lzma
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from PIL import Image

from diffusion.data.npz import Unusable

Image.init()
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "QOI")
SUFFIXES = frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS)


@dataclass
class Report:
    """What a source holds and what became of it; reasons with how many files they are true of, and one of these."""

    found: list[str] = field(default_factory=list)  # sentences: what was understood, or guessed
    left_out: dict[str, tuple[int, str]] = field(default_factory=dict)
    converted: dict[str, tuple[int, str]] = field(default_factory=dict)  # complete once the pictures were read

    def leave_out(self, reason: str, example: str) -> None:
        add(self.left_out, reason, example)

    def omissions(self) -> list[str]:
        """What was left out, for the terminal."""
        return [f"left out: {told}" for told in _told(self.left_out)]

    def conversions(self) -> list[str]:
        """What was converted, for the terminal."""
        return [f"converted: {told}" for told in _told(self.converted)]

    def card(self) -> dict[str, object]:
        """The same as JSON types."""
        told = [
            {reason: {"count": count, "example": example} for reason, (count, example) in reasons.items()}
            for reasons in (self.left_out, self.converted)
        ]
        return {"found": self.found, "left_out": told[0], "converted": told[1]}


def _told(counts: dict[str, tuple[int, str]]) -> Iterator[str]:
    for reason, (count, example) in counts.items():
        yield f"{count:,} {reason} (such as {example})"


def add(counts: dict[str, tuple[int, str]], reason: str, example: str) -> None:
    """Count one more `example` of a reason; the first one is kept."""
    count, first = counts.get(reason, (0, example))
    counts[reason] = (count + 1, first)


@dataclass(frozen=True)
class Entry:
    """A file of a source."""

    name: str  # path inside the source, with slashes
    size: int  # bytes
    read: Callable[[], bytes]


def files_of(folder: Path) -> Iterator[Entry]:
    """Every regular file below `folder`; what else lies there is an Entry that cannot be read.

    Raises:
        OSError: a folder below cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise error

    for where, folders, files in os.walk(folder, onerror=refuse):
        for name in files + [name for name in folders if Path(where, name).is_symlink()]:
            path = Path(where, name)
            size = path.stat().st_size if path.is_file() else -1
            yield Entry(path.relative_to(folder).as_posix(), size, path.read_bytes)


def members_of(archive: zipfile.ZipFile) -> Iterator[Entry]:
    """Every file of a zip; backslashes, which some programs write, are slashes."""
    for info in archive.infolist():
        parts = info.filename.replace("\\", "/").split("/")
        if parts[-1]:
            name = "/".join(part for part in parts if part not in ("", ".", ".."))
            yield Entry(name, info.file_size, lambda info=info: _member(archive, info))  # type: ignore[misc]


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.flag_bits & 1:
        raise Unusable("is encrypted: unpack the zip with its password first")
    try:
        return archive.read(info)  # never more than info.file_size, whatever is compressed there
    except NotImplementedError as error:
        raise Unusable(f"cannot be unpacked ({error}): zip it again with Deflate") from None
    except (RuntimeError, lzma.LZMAError) as error:
        raise ValueError(str(error)) from None


def sorted_out(entries: Iterator[Entry], report: Report) -> list[Entry]:
    """The pictures among `entries`, by name; the report has the others, by reason."""
    taken = {}
    for entry in entries:
        path = PurePosixPath(entry.name)
        suffix = path.suffix.lower()
        if any(part.startswith((".", "__MACOSX")) for part in path.parts):
            report.leave_out("hidden files", entry.name)
        elif entry.size < 0:
            report.leave_out("links to folders or to nothing, pipes and the like", entry.name)
        elif suffix not in SUFFIXES:
            report.leave_out(f"{suffix} files" if suffix else "files without a suffix", entry.name)
        elif entry.name in taken:
            report.leave_out("files whose name another has too", entry.name)
        else:
            taken[entry.name] = entry
    return [taken[name] for name in sorted(taken)]
