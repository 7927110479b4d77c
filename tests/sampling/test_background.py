import errno
import threading
from pathlib import Path

import pytest

from diffusion.errors import UserError
from diffusion.sampling.background import Background


def test_calls_are_made_in_order_and_all_before_the_end() -> None:
    made: list[int] = []
    with Background(made.append) as background:
        for i in range(50):
            background.put(i)
    assert made == list(range(50))


def test_no_more_than_the_given_number_waits() -> None:
    gate, begun = threading.Event(), []

    def work(i: int) -> None:
        begun.append(i)
        gate.wait(30)

    def feed() -> None:
        with Background(work, waiting=2) as background:
            for i in range(5):
                background.put(i)
                put.append(i)

    put: list[int] = []
    feeder = threading.Thread(target=feed)
    feeder.start()
    feeder.join(0.3)
    assert put == [0, 1]  # the third waits
    gate.set()
    feeder.join(30)
    assert begun == [0, 1, 2, 3, 4]


def test_what_cannot_be_written_comes_out_as_one_line() -> None:
    def work(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def feed(calls: int) -> None:
        with Background(work) as background:
            for _ in range(calls):
                background.put(Path("samples/a.png"))

    with pytest.raises(UserError, match=r"^samples/a\.png: No space left on device: ") as caught:
        feed(10)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError):
        feed(1)  # nobody asks for its result before the end


def test_other_errors_come_out_as_they_are() -> None:
    with pytest.raises(ZeroDivisionError), Background(lambda: 1 // 0) as background:  # type: ignore[arg-type,return-value]
        background.put()


@pytest.mark.parametrize(("error", "kept"), [(KeyboardInterrupt, [0, 1]), (ValueError, [0])])
def test_an_interruption_loses_nothing_that_was_put(error: type[BaseException], kept: list[int]) -> None:
    gate, made = threading.Event(), []

    def work(i: int) -> None:
        gate.wait(30)
        made.append(i)

    timer = threading.Timer(0.2, gate.set)
    timer.start()

    def feed() -> None:
        with Background(work) as background:
            background.put(0)
            background.put(1)
            raise error

    with pytest.raises(error):
        feed()
    assert made == kept
