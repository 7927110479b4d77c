"""`make ui`: MLflow's pages on the store that the pipeline writes to."""

import os
import sys

import click

from diffusion import paths
from diffusion.errors import masked
from diffusion.tracking.mlflow_store import is_server, prepare_store, tracking_uri


@click.command()
@click.option("--port", default=5000, show_default=True, help="Port on 127.0.0.1.")
def main(port: int) -> None:
    """Open MLflow's pages on the pipeline's own store, or say where they are if MLFLOW_TRACKING_URI names a server."""
    store = tracking_uri()
    if is_server(store):
        click.echo(f"Runs are kept on a server (MLFLOW_TRACKING_URI): open {masked(store.rstrip('/'))}")
        return
    store = store or prepare_store()
    click.echo(f"Runs of {masked(store)}: open http://127.0.0.1:{port}   (Ctrl-C to stop)")
    os.environ["MLFLOW_BACKEND_STORE_URI"] = store  # arguments can be read by everyone on the machine
    os.environ.setdefault("MLFLOW_DEFAULT_ARTIFACT_ROOT", paths.MLFLOW_ARTIFACTS.absolute().as_uri())
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")  # one worker, which stops at once
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)])
