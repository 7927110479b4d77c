"""One script a DVC stage: read params, call one library function, write the declared outputs."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from diffusion import paths
from diffusion.code_digest import LIBRARY
from diffusion.config import Params
from diffusion.errors import UserError, outside
from diffusion.params_file import allowed, load, read_value, schema

KEYS = {key.replace(".", "__"): key for key in schema()}  # names that click takes -> keys of params.yaml


def stage(work: Callable[[Params], None]) -> click.Command:
    """Make `work` a command: --params, an option for each key of params.yaml, and errors that a person can read.

    Exit status 2: something the user can put right. 130: stopped by Ctrl-C or SIGTERM.
    """

    def command(params: Path, **given: Any) -> None:
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            _check_library()
            overrides = {KEYS[name]: read_value(KEYS[name], text) for name, text in given.items() if text is not None}
            work(load(params, overrides))
        except UserError:
            raise
        except Exception as error:
            if line := outside(error):
                raise UserError(line) from None
            raise
        except KeyboardInterrupt as error:
            click.secho(str(error) or "stopped; the same command starts this stage anew", fg="yellow", err=True)
            sys.exit(130)

    file = click.Path(dir_okay=False, path_type=Path)
    made = click.Command("stage", help=work.__doc__, callback=command)
    made.params = [
        click.Option(["--params"], type=file, default=paths.PARAMS, show_default=True, help="Params file to read."),
        *(click.Option([f"--{key}", name], metavar="VALUE", help=allowed(schema()[key])) for name, key in KEYS.items()),
    ]
    return made


def arguments() -> list[str]:
    """The running command's own arguments, for the processes that share its work."""
    given = {KEYS.get(name, name): value for name, value in click.get_current_context().params.items()}
    return [text for key, value in given.items() if value is not None for text in (f"--{key}", str(value))]


def _check_library() -> None:
    """Refuse the library of another clone, whose environment this one shares."""
    ours = Path(__file__).resolve().parents[1] / "src/diffusion"
    if LIBRARY.resolve() != ours:
        raise UserError(f"this is a stage of {ours.parents[1]} and the library of {LIBRARY}: set PYTHONPATH=src")


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
