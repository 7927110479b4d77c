"""`make sync`: send MLflow what it lacks of every journal below runs/, as after an outage or on a plane."""

import sys

import click
from tqdm import tqdm

from diffusion import paths, tracking
from diffusion.journal import JOURNAL
from diffusion.mlflow_store import connect


@click.command()
def main() -> None:
    """Send MLflow what it lacks of the local journals; what it has is not sent twice."""
    journals = sorted(paths.RUNS.glob(f"*/{JOURNAL}"))
    if not journals:
        click.echo(f"{paths.RUNS} holds no journals: nothing to send")
        return
    try:
        client = connect()
        for path in tqdm(journals, desc="sync", unit=" journals", disable=len(journals) < 3):
            tqdm.write(f"{path.parent.name}: {tracking.sync(path, client)}")
    except Exception as error:  # not installed, no network, refused
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        click.secho(f"error: no MLflow ({reason})", fg="red", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
