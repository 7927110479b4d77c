"""A server of one file that answers each request in a way of its own, most of them wrong; `serve` is a fixture."""

import hashlib
import random
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers the n-th request in the n-th of the server's modes; the last mode goes on for ever."""

    server: "Server"

    def do_GET(self) -> None:
        self.server.ranges.append(self.headers.get("Range"))
        mode = self.server.modes[min(len(self.server.ranges), len(self.server.modes)) - 1]
        mode(self)

    def body(self, content: bytes = CONTENT, *, honour_range: bool = True, only: int | None = None) -> None:
        """A correct answer's headers, and its first `only` bytes."""
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(match[1]) if match and honour_range else 0
        if start and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"no.\n")
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][:only])
        self.wfile.flush()
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


Mode = Callable[[Handler], None]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, *modes: Mode) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.modes, self.ranges, self.over = modes, list[str | None](), threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/file.bin"


def fine(handler: Handler) -> None:
    handler.body()


def cut_after(count: int) -> Mode:
    return lambda handler: handler.body(only=count)


def status(code: int) -> Mode:
    return lambda handler: handler.send_error(code)


def silent(handler: Handler) -> None:
    handler.server.over.wait()


def stall(handler: Handler) -> None:
    handler.body(only=1000)
    handler.server.over.wait()


def drip(handler: Handler) -> None:
    handler.body(only=1000)
    while not handler.server.over.wait(0.02):
        handler.wfile.write(b"x" * 20)  # about 1 kB/s


def ignores_range(handler: Handler) -> None:
    handler.body(honour_range=False)


def piece(start: int, stop: int) -> Mode:
    """These bytes of the file to every question for a range."""

    def answer(handler: Handler) -> None:
        if "Range" not in handler.headers:
            handler.body()
            return
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(CONTENT)}")
        handler.send_header("Content-Length", str(stop - start))
        handler.end_headers()
        handler.wfile.write(CONTENT[start:stop])

    return answer


def refuses_range(code: int) -> Mode:
    return lambda handler: handler.send_error(code) if "Range" in handler.headers else handler.body()


def redirect(handler: Handler) -> None:
    if handler.path == "/elsewhere":
        handler.body()
        return
    handler.send_response(302)
    handler.send_header("Location", "/elsewhere")
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def chunked(content: bytes, *, complete: bool) -> Mode:
    def answer(handler: Handler) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(content), content) + (b"0\r\n\r\n" if complete else b""))
        handler.close_connection = True

    return answer


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers: list[Server] = []

    def start(*modes: Mode) -> Server:
        servers.append(Server(*modes))
        return servers[-1]

    yield start
    for server in servers:
        server.over.set()
        server.shutdown()
        server.server_close()
