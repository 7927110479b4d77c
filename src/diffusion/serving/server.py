"""`make serve`: the champion behind HTTP, run with the code that the model was logged with.

Its addresses are those of `mlflow models serve`; bad requests get one line, and /openapi.json says what can be asked.
"""

import json
import os
import shutil
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import click
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.datastructures import Headers

from diffusion import paths
from diffusion.errors import UserError, brief, outside
from diffusion.params_file import load
from diffusion.serving import requests
from diffusion.serving.registry import holder_of, model_name
from diffusion.tracking.mlflow_store import connect

MAX_BODY = 65_536  # bytes; the longest sensible request has a hundredth of it
MAX_WAITING = 16  # requests beside the one that is answered
RETRY_SECONDS = "30"  # what those beyond are told
MODEL = "__pyfunc_model_path__"  # where the served folder's name stands, also for versions that MLflow's server answers


class Invocation(BaseModel):
    """The body that MLflow's server takes."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {"inputs": {"num_images": 16, "seed": 7}}})

    inputs: requests.Request


class Predictions(BaseModel):
    """The answer as MLflow's server wraps it."""

    predictions: requests.Answer


class Problem(BaseModel):
    """What is wrong, in one line."""

    detail: str


PROBLEMS: dict[int | str, dict[str, Any]] = {status: {"model": Problem} for status in (400, 411, 413, 415, 422, 503)}


@click.command()
@click.option("--port", default=5001, show_default=True, help="Port to listen on.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--version", type=click.IntRange(1), help="Version to serve.  [default: the champion]")
def main(port: int, host: str, version: int | None) -> None:
    """Serve the champion: POST {"inputs": {"num_images": 16, "seed": 7}} to /invocations."""
    name = model_name(load(paths.PARAMS).tracking.experiment)
    folder, version = fetch(name, version)
    url, example = f"http://{host}:{port}", json.dumps({"inputs": {"num_images": 16, "seed": 7}})
    click.echo(f"Serving version {version} of model {name} on {url}/invocations   (Ctrl-C to stop). Try:")
    click.echo(f"  curl {url}/invocations -H 'Content-Type: application/json' -d '{example}'")
    sys.stdout.flush()
    os.environ |= {
        MODEL: str(folder),
        "PYTHONPATH": str(folder / "code"),  # the library as it was when the model was logged
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
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
        found = holder_of(client, name, "champion") if version is None else client.get_model_version(name, str(version))
        if found is None:
            raise UserError(f"model {name} has no champion: run `dvc repro`, or `make promote VERSION=n`")
        version = int(found.version)
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
        raise UserError(f"model {name} cannot be had from MLflow ({brief(error)})") from None
    return folder, version


def app() -> FastAPI:
    """The application for the model in the environment's folder."""
    from mlflow.pyfunc import load_model

    try:
        model = load_model(os.environ[MODEL])
    except UserError as error:
        error.show()
        sys.exit(error.exit_code)
    return application(model.unwrap_python_model().generator)


def application(generator: requests.Generator) -> FastAPI:
    """HTTP for a model: one request is answered at a time, MAX_WAITING wait, the others are sent away."""
    handlers: dict[Any, Any] = {RequestValidationError: _refuse, Exception: _fail}
    app = FastAPI(title="Image generation with a diffusion model", exception_handlers=handlers)
    turn = anyio.CapacityLimiter(1)

    @app.post("/invocations", responses=PROBLEMS, response_model_exclude_none=True)
    async def invocations(call: Invocation) -> Predictions:
        """Generate images."""
        try:
            generator.check(call.inputs)
        except UserError as error:
            raise HTTPException(422, str(error)) from None
        if (now := turn.statistics()).borrowed_tokens + now.tasks_waiting > MAX_WAITING:
            raise HTTPException(503, "too many requests wait: try again later", {"Retry-After": RETRY_SECONDS})
        return Predictions(predictions=await anyio.to_thread.run_sync(generator.answer, call.inputs, limiter=turn))

    @app.get("/ping")
    @app.get("/health")
    async def ping() -> Response:
        """Status 200 once the model is loaded."""
        return Response("\n", media_type="application/json")

    @app.get("/version")
    async def version() -> Response:
        """The version of MLflow."""
        from mlflow.version import VERSION

        return Response(VERSION, media_type="application/json")

    app.middleware("http")(_guard)
    return app


async def _guard(request: Request, forward: Callable[[Request], Awaitable[Response]]) -> Response:
    if (request.method, request.url.path) == ("POST", "/invocations"):
        status, problem = _unfit(request.headers)
        if status:
            return JSONResponse({"detail": problem}, status)
    return await forward(request)


def _unfit(headers: Headers) -> tuple[int | None, str]:
    """Status and reason if the body had better not be read."""
    length = headers.get("content-length", "")
    if not length.isdecimal() or "transfer-encoding" in headers:  # the latter would win
        return 411, "say how long the body is, with Content-Length"
    if int(length) > MAX_BODY:
        return 413, f"the body is too long: send at most {MAX_BODY} bytes"
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return 415, "send JSON, with Content-Type: application/json"
    return None, ""


async def _refuse(_: Request, error: Any) -> Response:
    return JSONResponse({"detail": requests.explained(error.errors())}, 422)


async def _fail(_: Request, error: Exception) -> Response:  # uvicorn logs the traceback
    known = str(error) if isinstance(error, UserError) else outside(error)
    return JSONResponse({"detail": known or "the server failed: its log says why"}, 500)
