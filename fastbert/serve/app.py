"""The ASGI application: FastAPI's routes and documentation, our gate around them, CORS around both."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp

import fastbert
from fastbert.serve import docs, routes_embed, routes_predict, routes_server, routes_text
from fastbert.serve.errors import MethodNotAllowed, NotFound, ServeError
from fastbert.serve.gate import CALL, DirectRoute, Gate
from fastbert.serve.state import State

if TYPE_CHECKING:
    from fastbert.serve.tracing import Tracer

_ROUTERS = (routes_embed.router, routes_predict.router, routes_text.router, routes_server.router)

_DESCRIPTION = (
    "Encoder models behind the routes of text-embeddings-inference, OpenAI, Cohere and Jina. With several models, "
    "native routes take `?model=` or the header `x-model`. Every request may carry `x-request-id`, `x-deadline-ms` "
    "(give up after so many milliseconds) and `x-priority: bulk` (let others go first)."
)

# What a browser's script may read of an answer from another origin.
_EXPOSED = [
    "x-request-id", "server-timing", "retry-after", "x-compute-type", "x-compute-time", "x-compute-characters",
    "x-compute-tokens", "x-total-time", "x-tokenization-time", "x-queue-time", "x-inference-time", "x-truncated-inputs",
    "x-embedding-shape", "x-embedding-dtype",
]  # fmt: skip


def build_app(state: State, tracer: Tracer | None = None) -> ASGIApp:
    """The application of loaded models; its lifespan warms them up, and finishes their work at the end."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for model in state.models:
            await model.start(state.settings.warmup)
        state.phase = "ready"
        yield
        state.phase = "draining"
        for model in state.models:
            await model.close(state.settings.drain_timeout_s)
        if tracer is not None:
            tracer.close()

    app = FastAPI(
        title="fastbert",
        version=fastbert.__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    routes: list[DirectRoute] = []
    for router in _ROUTERS:
        app.include_router(router)
        routes += [route for route in router.routes if isinstance(route, DirectRoute)]
    described = app.openapi
    app.openapi = lambda: _with_security(described(), bool(state.keys))  # type: ignore[method-assign]
    app.add_api_route("/api-doc/openapi.json", lambda: app.openapi(), include_in_schema=False)
    app.add_api_route(
        "/docs", lambda: HTMLResponse(docs.page(app.openapi()), headers=docs.HEADERS), include_in_schema=False
    )
    gate = Gate(app, state, routes, tracer)

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return gate.failed(request.scope[CALL], _unknown(request, error))

    app.add_exception_handler(HTTPException, unknown)
    origins = state.settings.cors_allow_origin
    if not origins:
        return gate
    return CORSMiddleware(
        gate, allow_origins=list(origins), allow_methods=["GET", "POST"], allow_headers=["*"], expose_headers=_EXPOSED
    )


def _unknown(request: Request, error: HTTPException) -> ServeError:
    path = request.url.path
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return MethodNotAllowed(f"{path} takes {allowed}, not {request.method}", headers={"allow": allowed})
    return NotFound(f"there is no route {path}; /docs lists all")


def _with_security(schema: dict[str, Any], keyed: bool) -> dict[str, Any]:
    """The OpenAPI document with the key where one is asked for."""
    if keyed:
        schema.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
    return schema
