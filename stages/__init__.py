"""One script a DVC stage: read params, call one library function, write the declared outputs."""

import errno
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import click

from diffusion import paths
from diffusion.config import Params, load
from diffusion.errors import UserError

OUTSIDE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)  # the machine's fault, not ours


def stage(work: Callable[[Params], None]) -> click.Command:
    """Make `work` a command: --params, --help, and errors that a person can read.

    Exit status 2: something the user can put right. 130: stopped by Ctrl-C or SIGTERM.
    """

    def command(params: Path) -> None:
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            work(load(params))
        except UserError as error:
            click.secho(f"error: {error}", fg="red", err=True)
            sys.exit(2)
        except OSError as error:
            if error.errno not in OUTSIDE:
                raise
            place = f" ({error.filename})" if error.filename else ""
            click.secho(f"error: {error.strerror}{place}: put that right; what is done is kept", fg="red", err=True)
            sys.exit(2)
        except KeyboardInterrupt as error:
            click.secho(str(error) or "stopped; `dvc repro` starts this stage anew", fg="yellow", err=True)
            sys.exit(130)

    option = click.option(
        "--params",
        type=click.Path(dir_okay=False, path_type=Path),
        default=paths.PARAMS,
        show_default=True,
        help="Params file to read.",
    )
    return click.command(help=work.__doc__)(option(command))


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
