"""Download one file over HTTP: verified by digest, continued after an interruption, abandoned when slow or stuck.

It is our own because pooch and torch.hub begin anew after an interruption, huggingface_hub continues only files of its
own hub, and none of them leaves a source that is slow.
"""

import hashlib
import os
import re
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import requests
import urllib3
from filelock import AcquireReturnProxy, FileLock, Timeout
from tqdm import tqdm

_CHUNK = 1 << 20


class FetchError(Exception):
    """A download that failed. The message is one line: the reason, without the address."""


@dataclass(frozen=True)
class Limits:
    """When a source is left."""

    connect_seconds: float = 5.0
    min_bytes_per_second: float = 300_000
    patience_seconds: float = 20.0  # this long under the minimum rate, or without an answer
    attempts: int = 4  # requests for one file: an answer that ends early is continued
    max_bytes: int = 1 << 30


def download(
    url: str,
    target: Path,
    *,
    sha256: str | None = None,
    md5: str | None = None,
    limits: Limits = Limits(),
) -> Path:
    """Fetch `url` to `target`; a target that already has the digest is kept as it is.

    The bytes gather in `<target>.part`, which outlives an interruption: the next call, also with another address of the
    same file, continues it by HTTP Range. A continued file with a wrong digest is fetched once more from the start.
    Without a digest nothing could vouch for an old part, so the download starts anew. One process at a time downloads
    into a folder; others wait.

    Returns:
        `target`, complete, verified and renamed into place.

    Raises:
        FetchError: no such file, no connection, too slow, cut short, too large, or a wrong digest.
    """
    digests = {name: value for name, value in (("sha256", sha256), ("md5", md5)) if value}
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive_in(target.parent):
            if digests and target.is_file() and not _mismatch(target, digests):
                return target
            if not digests:
                part.unlink(missing_ok=True)
            _fill_verified(url, part, digests, limits)
            part.replace(target)
    except requests.RequestException as error:  # an OSError too, so it comes first
        raise FetchError(_reason(error, limits)) from None
    except OSError as error:
        raise FetchError(f"cannot write {target}: {error.strerror or error}") from None
    return target


def _exclusive_in(folder: Path) -> AcquireReturnProxy:
    lock = FileLock(folder / ".lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        tqdm.write(f"waiting for another process that downloads into {folder}", file=sys.stderr)
        return lock.acquire()


def _fill_verified(url: str, part: Path, digests: Mapping[str, str], limits: Limits) -> None:
    for final in (False, True):
        continued = _fill(url, part, limits)
        wrong = _mismatch(part, digests)
        if not wrong:
            return
        part.unlink()
        if final or not continued:
            raise FetchError(wrong)
        tqdm.write(f"{part.name}: the continued file has a wrong digest; starting anew", file=sys.stderr)


def _fill(url: str, part: Path, limits: Limits) -> bool:
    """Complete `part`; True if its first bytes are from an earlier request."""
    with requests.Session() as session:
        for _ in range(limits.attempts):
            have = part.stat().st_size if part.exists() else 0
            response, start, total = _request(session, url, have, limits)
            with response:
                if 0 < start == total or _receive(response, part, start, total, limits):
                    return start > 0
    raise FetchError(f"the answer ended early {limits.attempts} times, at {part.stat().st_size / 1e6:.1f} MB")


def _request(
    session: requests.Session, url: str, start: int, limits: Limits
) -> tuple[requests.Response, int, int | None]:
    """An open answer, the offset of its first byte in the file, and the file's size if known."""
    response = session.get(
        url,
        headers={"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {}),
        stream=True,
        timeout=(limits.connect_seconds, limits.patience_seconds),
    )
    first, total = _content_range(response)
    if response.status_code == 200:
        first, total = 0, response.raw.length_remaining
    usable = response.status_code == 200 or (response.status_code == 206 and first == start)
    complete = response.status_code == 416 and start > 0 and total == start
    if usable or complete:
        if total is not None and total > limits.max_bytes:
            response.close()
            raise FetchError(f"offers {total / 1e6:.0f} MB, more than the {limits.max_bytes / 1e6:.0f} MB allowed")
        return response, start if complete else first, total
    response.close()
    if start:  # Range is refused, or the part is no beginning of this file; it is given up only when a 200 arrives
        return _request(session, url, 0, limits)
    raise FetchError(f"HTTP {response.status_code} {response.reason}".strip())


def _content_range(response: requests.Response) -> tuple[int, int | None]:
    """First byte (-1 if not said) and size of the whole file, as a 206 or 416 answer gives them (RFC 9110, 14.4)."""
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    if not match:
        return -1, None
    first, total = match.groups()
    return int(first) if first else -1, None if total == "*" else int(total)


def _receive(response: requests.Response, part: Path, start: int, total: int | None, limits: Limits) -> bool:
    """Append the answer's body from offset `start`; False if it ended early."""
    pace = _Pace(limits)
    size, whole = start, True
    bar = tqdm(
        desc=part.name.removesuffix(".part"),
        total=total,
        initial=start,
        unit="B",
        unit_scale=True,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
    )
    with bar, part.open("ab" if start else "wb") as file:
        try:
            # read1 returns what has come; read would wait for the whole chunk, however slowly it comes
            while chunk := response.raw.read1(_CHUNK, decode_content=False):
                size += len(chunk)
                if size > limits.max_bytes:
                    file.truncate(0)
                    raise FetchError(f"sends more than the {limits.max_bytes / 1e6:.0f} MB allowed")
                file.write(chunk)
                bar.update(len(chunk))
                pace.check(size - start)
        except urllib3.exceptions.ReadTimeoutError:
            raise FetchError(f"no data for {limits.patience_seconds:g} s, after {size / 1e6:.1f} MB") from None
        except urllib3.exceptions.HTTPError:
            whole = False
        file.flush()
        os.fsync(file.fileno())
    return whole if total is None else size == total


class _Pace:
    """Rate over the last `patience_seconds`, from a mark every tenth of them."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._marks = deque([(time.monotonic(), 0)])

    def check(self, received: int) -> None:
        now, patience = time.monotonic(), self._limits.patience_seconds
        if now - self._marks[-1][0] >= patience / 10:
            self._marks.append((now, received))
        while len(self._marks) > 1 and now - self._marks[1][0] >= patience:
            self._marks.popleft()
        since, before = self._marks[0]
        elapsed = now - since
        if elapsed >= patience and received - before < self._limits.min_bytes_per_second * elapsed:
            rate, minimum = (received - before) / elapsed / 1e3, self._limits.min_bytes_per_second / 1e3
            raise FetchError(f"too slow: {rate:.0f} kB/s over {elapsed:.0f} s, under {minimum:.0f} kB/s")


def _mismatch(path: Path, digests: Mapping[str, str]) -> str | None:
    """What is wrong with the digest of the file, in words."""
    for name, expected in digests.items():
        with path.open("rb") as file:
            actual = hashlib.file_digest(file, partial(hashlib.new, name, usedforsecurity=False)).hexdigest()
        if actual != expected.lower():
            return f"wrong file: {name} {actual}, not {expected}"
    return None


def _reason(error: requests.RequestException, limits: Limits) -> str:
    if isinstance(error, requests.ConnectTimeout):
        return f"no connection within {limits.connect_seconds:g} s"
    if isinstance(error, requests.Timeout):
        return f"no answer within {limits.patience_seconds:g} s"
    root: BaseException = error
    while cause := root.__cause__ or root.__context__:  # the system's own words lie at the bottom of requests' chain
        root = cause
    words = root.strerror if isinstance(root, OSError) and root.strerror else str(root) or type(root).__name__
    return " ".join(words.split())[:200]
