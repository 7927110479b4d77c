"""The registry of models, the model as MLflow logs it, and the HTTP server. Needs sampling and tracking."""

from typing import Any


def app() -> Any:
    """The HTTP server as an ASGI application; versions that are registered start by this name."""
    from diffusion.serving.server import app as build

    return build()
