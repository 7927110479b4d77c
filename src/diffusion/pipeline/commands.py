"""Commands that are no stages: `make sync`, `python -m diffusion lineage`."""

from pathlib import Path

import click
from tqdm import tqdm

from diffusion import paths
from diffusion.errors import UserError, brief
from diffusion.model.card import read_card
from diffusion.serving.registry import register
from diffusion.tracking.journal import JOURNAL
from diffusion.tracking.lineage import of_model, of_run
from diffusion.tracking.mlflow_copy import sync as send
from diffusion.tracking.mlflow_store import connect


@click.command()
def sync() -> None:
    """Send MLflow what it lacks of the local journals below runs/, as after an outage or on a plane."""
    journals = sorted(paths.RUNS.glob(f"*/{JOURNAL}"))
    if not journals:
        click.echo(f"{paths.RUNS} holds no journals: nothing to send")
        return
    try:
        client = connect()
        for path in tqdm(journals, desc="sync", unit=" journals", disable=len(journals) < 3):
            tqdm.write(f"{path.parent.name}: {send(path, client, register)}")
    except UserError:
        raise
    except Exception as error:  # not installed, no network, refused
        raise UserError(f"no MLflow ({brief(f'{type(error).__name__}: {error}')})") from None


@click.command()
@click.argument("what", default=str(paths.MODEL), metavar="[MODEL | RUN_ID]")
def lineage(what: str) -> None:
    """Print what made MODEL (a safetensors file with its card), or the files of an MLflow run."""
    path = Path(what)
    rows = of_model(path, read_card(path)) if path.suffix == ".safetensors" else of_run(what)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}")
