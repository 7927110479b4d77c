"""What ends a stage: the exception that users are meant to read, errors of the system that are theirs, Ctrl-C."""

import errno
import re
import signal
from types import FrameType
from typing import IO, Any

import click

MEMORY = ("train.micro_batch", "sample.batch_size", "evaluate.batch_size")  # keys that say how much of a GPU is used
FULL = (errno.ENOSPC, errno.EDQUOT)
OUTSIDE = (*FULL, errno.EACCES, errno.EROFS)  # the machine's fault, not ours
CREDENTIALS = re.compile(r"(?<=://)[^\s'\"<>]*@|(?<=[?&]password=)[^\s'\"<>&]*")


class UserError(click.ClickException):
    """Something the user can put right. The message is one line that says what is wrong and what to do.

    Click prints it without a traceback and exits with status 2, whichever command raised it. Passwords in URLs are
    masked, whoever wrote the words.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(masked(message))

    def show(self, file: IO[Any] | None = None) -> None:
        click.secho(f"error: {self.message}", file=file, fg="red", err=True)


def masked(text: str) -> str:
    """`text` without the users and passwords of the URLs in it."""
    return CREDENTIALS.sub(lambda found: "***@" if found[0].endswith("@") else "***", text)


def brief(error: object, length: int = 200) -> str:
    """What a library said, in one line of at most `length` characters, without passwords."""
    text = masked(" ".join(str(error).split()))
    return text if len(text) <= length else f"{text[: length - 3]}..."


def checked_url(name: str, url: str) -> str:
    """`url`, the value of `name`, where user and password can be told from the host.

    Raises:
        UserError: they cannot: libraries would take a part of the password for the host, and print it.
    """
    rest = url.partition("://")[2]
    host = re.split("[/?#]", rest)[0]
    if host and (rest.count("@") > 1 or ("@" in rest and "@" not in host)):
        raise UserError(
            f"{name}: the @ in it is ambiguous; in users and passwords write @ as %40, / as %2F, : as %3A, # as %23, "
            "? as %3F"
        )
    return url


def outside(error: BaseException | None) -> str | None:
    """One line about a full disk, a folder that cannot be written, or a full GPU; None if `error` is about none.

    Libraries raise errors of their own after the system's, which is then what they were raised from.
    """
    wanted: tuple[int, ...] = OUTSIDE
    while error:
        if isinstance(error, OSError) and error.errno in wanted:
            place = f" ({error.filename})" if error.filename else ""
            return f"{error.strerror}{place}: put that right; what is done is kept"
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which stages import late
            return f"the GPU's memory is full: lower {', '.join(MEMORY)}, or stop what else uses it"
        error, wanted = error.__cause__ or error.__context__, FULL  # what could not be opened may have been coped with
    return None


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a flag that is read between two steps; the second one interrupts."""

    def __init__(self, again: str = "dvc repro") -> None:
        """`again` is the command that goes on."""
        self.asked, self.again = False, again

    def __enter__(self) -> "StopRequest":
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt(f"stopped at once; `{self.again}` goes on from the last checkpoint")
        self.asked = True


class DivergedError(UserError):
    """The losses are not finite, and rollbacks do not help."""
