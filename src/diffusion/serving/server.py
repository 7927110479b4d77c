"""`make serve`: the champion behind MLflow's own scoring server, run with the code that the model was logged with.

`mlflow models serve` runs the same server, but its answers to bad requests are tracebacks or status 500 (no content
type, deeply nested JSON); here every one of them is a 4xx with one sentence.
"""

import json
import os
import shutil
import sys
from collections.abc import Awaitable, Callable
from email.message import Message
from pathlib import Path
from typing import Any

import click

from diffusion import paths
from diffusion.errors import UserError
from diffusion.params_file import load
from diffusion.serving import requests
from diffusion.serving.registry import champion, model_name
from diffusion.tracking.mlflow_store import connect

MAX_BODY = 65_536  # bytes; the longest sensible request has a hundredth of it
MODEL = "__pyfunc_model_path__"  # where MLflow's server looks for the folder
SECONDS = "600"  # a request may take


@click.command()
@click.option("--port", default=5001, show_default=True, help="Port to listen on.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--version", type=click.IntRange(1), help="Version to serve.  [default: the champion]")
def main(port: int, host: str, version: int | None) -> None:
    """Serve the champion: POST {"inputs": {"num_images": 16, "seed": 7}} to /invocations."""
    try:
        name = model_name(load(paths.PARAMS).tracking.experiment)
        folder, version = fetch(name, version)
    except UserError as error:
        click.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)
    url = f"http://{host}:{port}/invocations"
    click.echo(f"Serving version {version} of model {name} on {url}   (Ctrl-C to stop). Try:")
    click.echo(
        f'  curl {url} -H \'Content-Type: application/json\' -d \'{{"inputs": {{"num_images": 16, "seed": 7}}}}\''
    )
    sys.stdout.flush()
    os.environ |= {
        MODEL: str(folder),
        "PYTHONPATH": str(folder / "code"),  # the library as it was when the model was logged
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT": os.environ.get("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT", SECONDS),
    }
    server = ["-m", "uvicorn", "--factory", "diffusion.serving:app", "--host", host, "--port", str(port)]
    os.execv(sys.executable, [sys.executable, *server, "--log-level", "warning"])


def fetch(name: str, version: int | None) -> tuple[Path, int]:
    """A copy of the model's folder below runs/served/, and its version; the champion's if none is given.

    Raises:
        UserError: there is no such version, or MLflow does not answer.
    """
    try:
        client = connect()
        if version is None:
            found = champion(client, name)
            if found is None:
                raise UserError(f"model {name} has no champion: run `dvc repro`, or `make promote VERSION=n`")
            version = int(found.version)
        found = client.get_model_version(name, str(version))
        if "identity" not in found.tags:
            raise UserError(
                f"version {version} of model {name} is not of this pipeline: `make promote` lists the others"
            )
        folder = paths.RUNS / "served" / found.tags["identity"]
        if not (folder / "MLmodel").exists():
            from mlflow.artifacts import download_artifacts

            new = folder.with_name(f"{folder.name}.new")
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
            place = client.get_model_version_download_uri(name, str(version))
            got = download_artifacts(artifact_uri=place, dst_path=str(new), tracking_uri=client.tracking_uri)
            Path(got).replace(folder)
            shutil.rmtree(new, ignore_errors=True)
    except UserError:
        raise
    except Exception as error:  # not installed, no network, unknown
        raise UserError(f"model {name} cannot be had from MLflow ({' '.join(str(error).split())[:200]})") from None
    return folder, version


def app() -> Any:
    """MLflow's scoring server for the model in the environment's folder, behind `check`."""
    from fastapi import Request
    from fastapi.responses import JSONResponse, Response
    from mlflow.pyfunc import load_model, scoring_server

    try:
        model = load_model(os.environ[MODEL])
    except UserError as error:
        click.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)
    server, generator = scoring_server.init(model), model.unwrap_python_model().generator

    @server.middleware("http")
    async def guard(request: Request, forward: Callable[[Request], Awaitable[Response]]) -> Response:
        if request.url.path == "/invocations" and request.method == "POST":
            length = request.headers.get("content-length", "")
            if not length.isdecimal() or "transfer-encoding" in request.headers:  # the latter would win
                return JSONResponse({"error": "say how long the body is, with Content-Length"}, 411)
            if int(length) > MAX_BODY:
                return JSONResponse({"error": f"the body is too long: send at most {MAX_BODY} bytes"}, 413)
            if not is_json(request.headers.get("content-type", "")):
                return JSONResponse({"error": "send JSON in UTF-8, with Content-Type: application/json"}, 415)
            others = [pair for pair in request.scope["headers"] if pair[0] != b"content-type"]
            request.scope["headers"] = [*others, (b"content-type", b"application/json")]  # MLflow knows this spelling
            try:
                check(await request.body(), generator.num_classes, guidable=generator.guidable)
            except UserError as error:
                return JSONResponse({"error": str(error)}, 400)
        response = await forward(request)
        if response.status_code < 400:
            return response
        text = b"".join([part async for part in response.body_iterator]).decode(errors="replace")  # type: ignore[attr-defined]
        return JSONResponse({"error": sentence(text)}, response.status_code)

    return server


def is_json(content_type: str) -> bool:
    """Whether a Content-Type means JSON in UTF-8."""
    message = Message()
    message["Content-Type"] = content_type
    charset = str(message.get_param("charset", "utf-8")).lower()
    return bool(content_type) and message.get_content_type() == "application/json" and charset in ("utf-8", "utf8")


def sentence(answer: str) -> str:
    """What an error of MLflow's server says, in one line; its traceback goes to the log."""
    try:
        content = json.loads(answer)
    except ValueError:
        content = answer
    if isinstance(content, dict):
        if "stack_trace" in content:
            print(content["stack_trace"], file=sys.stderr)
        content = content.get("message") or content.get("detail") or answer
    return " ".join(str(content).rpartition("Error: ")[2].split())[:200]


def check(body: bytes, num_classes: int | None, *, guidable: bool = True) -> None:
    """Whether a body is a request that the model can answer.

    Raises:
        UserError: what is wrong, in one sentence.
    """
    try:
        content = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, numbers of thousands of digits, deep nesting
        raise UserError(f"the body is not JSON: {' '.join(str(error).split())[:120]}") from None
    if not isinstance(content, dict) or set(content) != {"inputs"}:
        raise UserError('the body must be an object such as {"inputs": {"num_images": 16, "seed": 7}}')
    inputs = content["inputs"]
    requests.parse(inputs, num_classes, guidable=guidable)
    for name, value in inputs.items():  # MLflow's schema has neither null nor what the model does not know
        if value is None:
            raise UserError(f"{name} must not be null: leave it out")
        if num_classes is None and name in ("labels", "guidance"):
            raise UserError(f"this model knows no classes: leave out {name}")
