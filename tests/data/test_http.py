"""fetch.download against a local server that misbehaves in every way a server can."""

import hashlib
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.misbehaving import (
    CONTENT,
    SHA256,
    Mode,
    Server,
    chunked,
    cut_after,
    drip,
    fine,
    ignores_range,
    piece,
    redirect,
    refuses_range,
    silent,
    stall,
    status,
)

from diffusion.data.download import http
from diffusion.data.download.http import FetchError, Limits

PATIENT = Limits(connect_seconds=5, min_bytes_per_second=0, patience_seconds=20)
HASTY = replace(PATIENT, patience_seconds=0.3)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "downloads" / "file.bin"


def part_of(target: Path, content: bytes | None = None) -> Path:
    part = target.with_name("file.bin.part")
    if content is not None:
        target.parent.mkdir(exist_ok=True)
        part.write_bytes(content)
    return part


def assert_complete(target: Path) -> None:
    assert target.read_bytes() == CONTENT
    assert {path.name for path in target.parent.iterdir()} <= {"file.bin", ".lock"}


@pytest.mark.parametrize("mode", [fine, redirect, ignores_range, chunked(CONTENT, complete=True)])
def test_whole_file(serve: Callable[..., Server], target: Path, mode: Mode) -> None:
    assert http.download(serve(mode).url, target, sha256=SHA256, limits=PATIENT) == target
    assert_complete(target)


def test_md5_in_capitals(serve: Callable[..., Server], target: Path) -> None:
    http.download(serve(fine).url, target, md5=hashlib.md5(CONTENT).hexdigest().upper(), limits=PATIENT)
    assert_complete(target)


def test_empty_file(serve: Callable[..., Server], target: Path) -> None:
    empty = serve(lambda handler: handler.body(b""))
    http.download(empty.url, target, sha256=hashlib.sha256(b"").hexdigest(), limits=PATIENT)
    assert target.read_bytes() == b""


def test_verified_target_is_kept_without_a_request(serve: Callable[..., Server], target: Path) -> None:
    server = serve(fine)
    http.download(server.url, target, sha256=SHA256, limits=PATIENT)
    http.download(server.url, target, sha256=SHA256, limits=PATIENT)
    assert server.ranges == [None]


@pytest.mark.parametrize("sha256", [SHA256, None])
def test_target_that_does_not_verify_is_replaced(
    serve: Callable[..., Server], target: Path, sha256: str | None
) -> None:
    target.parent.mkdir()
    target.write_bytes(b"damaged")
    http.download(serve(fine).url, target, sha256=sha256, limits=PATIENT)
    assert_complete(target)


@pytest.mark.parametrize("first", [cut_after(1000), chunked(CONTENT[:1000], complete=False)])
def test_answer_that_ends_early_is_continued(serve: Callable[..., Server], target: Path, first: Mode) -> None:
    server = serve(first, fine)
    http.download(server.url, target, sha256=SHA256, limits=PATIENT)
    assert server.ranges == [None, "bytes=1000-"]
    assert_complete(target)


def test_answers_that_always_end_early_fail_and_leave_the_part(serve: Callable[..., Server], target: Path) -> None:
    server = serve(cut_after(1000))
    with pytest.raises(FetchError, match="ended early 4 times"):
        http.download(server.url, target, sha256=SHA256, limits=PATIENT)
    assert server.ranges == [None, "bytes=1000-", "bytes=2000-", "bytes=3000-"]
    assert part_of(target).read_bytes() == CONTENT[:4000]
    assert not target.exists()


def test_part_is_continued_by_another_server(serve: Callable[..., Server], target: Path) -> None:
    first, second = serve(stall), serve(fine)
    with pytest.raises(FetchError, match=r"no data for 0\.3 s"):
        http.download(first.url, target, sha256=SHA256, limits=HASTY)
    http.download(second.url, target, sha256=SHA256, limits=PATIENT)
    assert second.ranges == ["bytes=1000-"]
    assert_complete(target)


def test_interrupt_keeps_the_part(serve: Callable[..., Server], target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: object, received: int) -> None:
        raise KeyboardInterrupt

    server = serve(fine)
    with monkeypatch.context() as patch:
        patch.setattr(http._Pace, "check", interrupt)
        with pytest.raises(KeyboardInterrupt):
            http.download(server.url, target, sha256=SHA256, limits=PATIENT)
    have = part_of(target).stat().st_size
    assert {path.name for path in target.parent.iterdir()} == {"file.bin.part", ".lock"}
    assert 0 < have <= len(CONTENT)
    http.download(server.url, target, sha256=SHA256, limits=PATIENT)
    assert server.ranges == [None, f"bytes={have}-"]
    assert_complete(target)


@pytest.mark.parametrize("mode", [ignores_range, refuses_range(416), refuses_range(501), refuses_range(403)])
def test_server_without_range_starts_anew(serve: Callable[..., Server], target: Path, mode: Mode) -> None:
    part_of(target, b"x" * 1000)
    http.download(serve(mode).url, target, sha256=SHA256, limits=PATIENT)
    assert_complete(target)


def test_range_answer_from_another_offset_starts_anew(serve: Callable[..., Server], target: Path) -> None:
    server = serve(cut_after(1000), piece(500, len(CONTENT)))
    http.download(server.url, target, limits=PATIENT)  # without a digest that would notice
    assert server.ranges == [None, "bytes=1000-", None]
    assert_complete(target)


def test_range_answer_of_fewer_bytes_than_asked_is_continued(serve: Callable[..., Server], target: Path) -> None:
    part_of(target, CONTENT[:1000])
    server = serve(piece(1000, 2000), fine)
    http.download(server.url, target, sha256=SHA256, limits=PATIENT)
    assert server.ranges == ["bytes=1000-", "bytes=2000-"]
    assert_complete(target)


@pytest.mark.parametrize("part", [CONTENT + b"more", b"x" * 1000, b"x" * len(CONTENT)])
def test_part_of_something_else_is_fetched_anew(serve: Callable[..., Server], target: Path, part: bytes) -> None:
    part_of(target, part)
    server = serve(fine)
    http.download(server.url, target, sha256=SHA256, limits=PATIENT)
    assert server.ranges == [f"bytes={len(part)}-", None]
    assert_complete(target)


def test_complete_part_needs_no_second_transfer(serve: Callable[..., Server], target: Path) -> None:
    part_of(target, CONTENT)
    server = serve(fine)
    http.download(server.url, target, sha256=SHA256, limits=PATIENT)
    assert server.ranges == [f"bytes={len(CONTENT)}-"]
    assert_complete(target)


def test_without_a_digest_an_old_part_is_not_trusted(serve: Callable[..., Server], target: Path) -> None:
    part_of(target, b"x" * 1000)
    http.download(serve(fine).url, target, limits=PATIENT)
    assert_complete(target)


def test_wrong_bytes_that_were_continued_twice_are_not_kept(serve: Callable[..., Server], target: Path) -> None:
    part_of(target, b"x" * 1000)
    wrong = b"y" * 5000
    server = serve(*[lambda handler: handler.body(wrong), lambda handler: handler.body(wrong, only=1000)] * 2)
    with pytest.raises(FetchError, match=f"not {SHA256}"):
        http.download(server.url, target, sha256=SHA256, limits=PATIENT)
    assert server.ranges == ["bytes=1000-", None, "bytes=1000-"]
    assert {path.name for path in target.parent.iterdir()} == {".lock"}


@pytest.mark.parametrize("part", [None, b"x" * 1000])
def test_wrong_bytes_are_not_kept(serve: Callable[..., Server], target: Path, part: bytes | None) -> None:
    part_of(target, part)
    server = serve(lambda handler: handler.body(b"y" * 5000))
    with pytest.raises(FetchError, match=f"sha256 {hashlib.sha256(b'y' * 5000).hexdigest()}, not {SHA256}"):
        http.download(server.url, target, sha256=SHA256, limits=PATIENT)
    assert server.ranges == ([None] if part is None else ["bytes=1000-", None])
    assert {path.name for path in target.parent.iterdir()} == {".lock"}


@pytest.mark.parametrize(
    ("mode", "limits", "reason"),
    [
        (status(404), PATIENT, "HTTP 404 Not Found"),
        (status(503), PATIENT, "HTTP 503"),
        (silent, HASTY, "no answer within 0.3 s"),
        (stall, HASTY, "no data for 0.3 s"),
        (drip, replace(HASTY, min_bytes_per_second=50_000), "too slow: .* under 50 kB/s"),
        (fine, replace(PATIENT, max_bytes=10_000), "offers 0 MB, more than"),
        (lambda handler: handler.close_connection, PATIENT, "Remote end closed connection"),
    ],
    ids=["404", "503", "silent", "stall", "drip", "offers too much", "hangs up"],
)
def test_source_is_left(serve: Callable[..., Server], target: Path, mode: Mode, limits: Limits, reason: str) -> None:
    with pytest.raises(FetchError, match=reason) as caught:
        http.download(serve(mode).url, target, sha256=SHA256, limits=limits)
    assert "\n" not in str(caught.value)
    assert not target.exists()


def test_rubbish_without_end_is_not_kept(serve: Callable[..., Server], target: Path) -> None:
    endless, few = serve(chunked(CONTENT, complete=False)), replace(PATIENT, max_bytes=10_000)
    with pytest.raises(FetchError, match="sends more than"):
        http.download(endless.url, target, sha256=SHA256, limits=few)
    assert part_of(target).stat().st_size == 0


def test_failing_server_leaves_the_part_to_the_next_one(serve: Callable[..., Server], target: Path) -> None:
    part = part_of(target, CONTENT[:1000])
    with pytest.raises(FetchError, match="HTTP 404"):
        http.download(serve(status(404)).url, target, sha256=SHA256, limits=PATIENT)
    assert part.read_bytes() == CONTENT[:1000]


def test_nobody_listens(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(FetchError, match=r"^Connection refused$"):
        http.download(f"http://127.0.0.1:{port}/", target, sha256=SHA256, limits=PATIENT)


def test_host_that_never_accepts(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dropped(*_: object, **__: object) -> None:
        raise TimeoutError("timed out")

    monkeypatch.setattr("urllib3.util.connection.create_connection", dropped)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(FetchError, match=r"^no connection within 5 s$"):
        http.download("http://127.0.0.1:9/", target, sha256=SHA256, limits=PATIENT)


def test_unknown_host_and_bad_address_are_one_line(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(FetchError, match=r"^Name or service not known$"):
        http.download("http://nowhere.invalid/file", target, sha256=SHA256, limits=PATIENT)
    with pytest.raises(FetchError, match="Invalid URL"):
        http.download("nowhere", target, sha256=SHA256, limits=PATIENT)


def test_folder_that_cannot_be_written(serve: Callable[..., Server], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FetchError, match="cannot write"):
        http.download(serve(fine).url, tmp_path / "file" / "below.bin", sha256=SHA256, limits=PATIENT)


def test_two_downloads_of_one_file_make_one_request(serve: Callable[..., Server], target: Path) -> None:
    server = serve(fine)
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(http.download, server.url, target, sha256=SHA256, limits=PATIENT) for _ in range(2)]
    assert [one.result() for one in both] == [target, target]
    assert server.ranges == [None]
    assert_complete(target)


@pytest.mark.parametrize(
    ("rates", "said", "end"),
    [
        ([3000] * 60, None, 60),
        ([2000] * 60, r"^too slow: 2 kB/s over 20 s, under 3 kB/s$", 20),
        ([1_000_000] * 60 + [0] * 30, r"^too slow: 0 kB/s", 82),  # a fast minute hides nothing of a standstill
    ],
    ids=["enough", "slow", "standstill"],
)
def test_the_rate_of_the_last_seconds_decides(
    rates: list[int], said: str | None, end: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes in each second; what is said, and by when."""
    clock = [0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    pace = http._Pace(Limits(min_bytes_per_second=3000, patience_seconds=20))
    with pytest.raises(FetchError, match=said) if said else nullcontext():
        for clock[0] in range(1, len(rates) + 1):
            pace.check(sum(rates[: clock[0]]))
    assert clock[0] <= end
