"""The one exception that users are meant to read."""


class UserError(Exception):
    """Something the user can put right. The message is one line that says what is wrong and what to do.

    Stages print it without a traceback and exit with status 2.
    """
