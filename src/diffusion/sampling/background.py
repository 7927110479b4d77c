"""Work that a loop hands to a thread, so that files are written while the next batch is generated."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, ParamSpec

from diffusion.errors import UserError

P = ParamSpec("P")


class Background(Generic[P]):
    """Calls `work` in a thread, in order, with what `put` is given; leaving the `with` block waits for all of it.

    What `work` raises comes out of a later `put` or of the end of the block, an OSError as a UserError.
    """

    def __init__(
        self,
        work: Callable[P, None],
        *,
        waiting: int = 2,  # calls that may be under way or wait; `put` blocks for more, which bounds the memory
    ) -> None:
        self._work, self._waiting = work, waiting
        self._pool = ThreadPoolExecutor(1)
        self._calls: deque[Future[None]] = deque()

    def put(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Queue a call.

        Raises:
            UserError: an earlier call could not write.
        """
        while self._calls and (self._calls[0].done() or len(self._calls) >= self._waiting):
            self._finish(self._calls.popleft())
        self._calls.append(self._pool.submit(self._work, *args, **kwargs))

    def __enter__(self) -> "Background[P]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """An interruption too waits for the calls that were queued, so that nothing finished is lost."""
        try:
            while self._calls and (kind is None or isinstance(error, KeyboardInterrupt)):
                self._finish(self._calls.popleft())
        finally:
            self._pool.shutdown(cancel_futures=True)

    def _finish(self, call: Future[None]) -> None:
        try:
            call.result()
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            raise UserError(
                f"{place}{error.strerror or error}: put that right; what is finished is kept, and `dvc repro` goes on"
            ) from None
