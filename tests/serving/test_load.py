"""The server when many ask, when it is told to stop, and when a model fails."""

import concurrent.futures
import signal
import threading

import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient
from helpers.served import ask, call
from helpers.stores import free_port, wait_for

from diffusion.serving import requests, server


class Slow:
    """A generator that answers when it is told to."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Semaphore(0), threading.Event()

    def check(self, request: requests.Request) -> None:
        """It can answer all."""

    def answer(self, request: requests.Request) -> requests.Answer:
        self.begun.release()
        self.go.wait()
        if request.seed == 13:
            raise torch.OutOfMemoryError
        return requests.Answer(images=[], format="png", seed=0)


def test_when_too_many_wait_the_next_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_WAITING", 0)
    slow = Slow()
    with (
        TestClient(server.application(slow)) as client,  # type: ignore[arg-type]
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        first = pool.submit(ask, client, num_images=1)
        slow.begun.acquire()
        second = client.post("/invocations", json={"inputs": {"num_images": 1}})
        assert second.status_code == 503
        assert second.headers["Retry-After"] == "30"
        assert client.get("/ping").status_code == 200
        slow.go.set()
        assert first.result()["images"] == []
        assert ask(client, num_images=1)["images"] == []


def test_sigterm_lets_it_finish_what_it_has_taken() -> None:
    slow, port = Slow(), free_port()
    running = uvicorn.Server(uvicorn.Config(server.application(slow), port=port, log_level="warning"))  # type: ignore[arg-type]
    thread = threading.Thread(target=running.run)
    thread.start()
    wait_for(lambda: running.started)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        taken = pool.submit(call, port, "POST", "/invocations", '{"inputs": {"num_images": 1}}')
        slow.begun.acquire()
        running.handle_exit(signal.SIGTERM, None)
        slow.go.set()
        assert taken.result().status == 200
    thread.join()


def test_a_failure_is_one_line_without_a_traceback() -> None:
    slow = Slow()
    slow.go.set()
    client = TestClient(server.application(slow), raise_server_exceptions=False)  # type: ignore[arg-type]
    answer = client.post("/invocations", json={"inputs": {"num_images": 1, "seed": 13}})
    assert answer.status_code == 500
    assert answer.json()["detail"].startswith("the GPU's memory is full")
