"""`make tune-report`: optuna-dashboard's pages on the study's store, if it is installed; else how to install it."""

import os
import shutil
import sys
from pathlib import Path

import click

from diffusion import paths
from diffusion.errors import UserError
from diffusion.params_file import load
from diffusion.tuning.store import shown, storage_url


@click.command()
@click.option("--port", default=8080, show_default=True, help="Port on 127.0.0.1.")
def main(port: int) -> None:
    """Open optuna-dashboard on the store that `make tune` writes to."""
    url = storage_url(load(paths.PARAMS).tune)
    if url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).exists():
        raise UserError(f"{shown(url)} does not exist yet: run `make tune` first")
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if (command := shutil.which("optuna-dashboard", path=beside)) is None:
        click.echo(f"{paths.TUNING}/ has tables and figures; pages: pip install optuna-dashboard && make tune-report")
        return
    click.echo(f"Studies of {shown(url)}: open http://127.0.0.1:{port}   (Ctrl-C to stop)")
    sys.stdout.flush()
    os.execv(command, [command, url, "--host", "127.0.0.1", "--port", str(port)])
