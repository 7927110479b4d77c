"""`make ui`: MLflow's pages on the store that the pipeline writes to."""

import os
import sys

import click

from diffusion import paths
from diffusion.tracking.mlflow_store import is_server, prepare_store


@click.command()
@click.option("--port", default=5000, show_default=True, help="Port on 127.0.0.1.")
def main(port: int) -> None:
    """Open MLflow's pages on the pipeline's own store, or say where they are if MLFLOW_TRACKING_URI names a server."""
    server = os.environ.get("MLFLOW_TRACKING_URI", "")
    if is_server(server):
        click.echo(f"Runs are kept on a server (MLFLOW_TRACKING_URI): open {server.rstrip('/')}")
        return
    store = server or prepare_store()
    click.echo(f"Runs of {store}: open http://127.0.0.1:{port}   (Ctrl-C to stop)")
    serve = ["-m", "mlflow", "server", "--backend-store-uri", store, "--host", "127.0.0.1", "--port", str(port)]
    artifacts = ["--default-artifact-root", paths.MLFLOW_ARTIFACTS.absolute().as_uri()]
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")  # one worker, which stops at once
    os.execv(sys.executable, [sys.executable, *serve, *artifacts])
