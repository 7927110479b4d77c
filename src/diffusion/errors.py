"""The one exception that users are meant to read, and errors of the system that are theirs to put right."""

import errno

OUTSIDE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)  # the machine's fault, not ours


class UserError(Exception):
    """Something the user can put right. The message is one line that says what is wrong and what to do.

    Stages print it without a traceback and exit with status 2.
    """


def outside(error: BaseException) -> str | None:
    """One line about a full disk or a folder that cannot be written; None if `error` is another."""
    if not isinstance(error, OSError) or error.errno not in OUTSIDE:
        return None
    place = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror}{place}: put that right; what is done is kept"
