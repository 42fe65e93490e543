"""The way in and out of every request: request id, key, admission, the route by its exact path, errors as JSON.

Routes are declared with FastAPI, which documents them; a request whose path is exactly a route's goes straight to its
function, past FastAPI's router and its stack of middlewares. Everything else (docs, redirects, unknown paths) goes on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import typing
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any

from fastapi.routing import APIRoute
from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastbert.serve.call import CYCLE, Answer, Call
from fastbert.serve.errors import InternalError, NotReady, Overload, ServeError, SlowBody, render
from fastbert.serve.records import log_request
from fastbert.serve.state import State

if TYPE_CHECKING:
    from fastbert.serve.tracing import Tracer


logger = logging.getLogger("fastbert.serve")

CALL = "fastbert.call"
TASK = "fastbert.task"  # the connection cancels it when the client leaves
GONE = "fastbert.gone"  # and says so here
LATE = "fastbert.late"  # or when the body takes longer than these seconds
_UNANSWERED = 499


class DirectRoute(APIRoute):
    """A route whose function takes the call and, if it has a `body`, the parsed body."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        """FastAPI's hook: what it would wrap in its own parsing and serialisation."""
        endpoint = self.endpoint
        hints = typing.get_type_hints(endpoint, include_extras=True)
        adapter: TypeAdapter[Any] | None = TypeAdapter(hints["body"]) if "body" in hints else None

        async def handle(request: Request) -> Response:
            call: Call = request.scope[CALL]
            if adapter is None:
                return await endpoint(call)
            return await endpoint(call, await call.read(adapter))

        return handle


class Gate:
    """The ASGI application around FastAPI's."""

    def __init__(self, app: ASGIApp, state: State, routes: Iterable[DirectRoute], tracer: Tracer | None) -> None:
        self.app, self.state, self.tracer = app, state, tracer
        self.handlers: dict[tuple[str, str], Callable[[Request], Awaitable[Response]]] = {}
        for route in routes:
            handler = route.get_route_handler()
            for method in route.methods or ():
                self.handlers[method, route.path] = handler
        for method, path, name in (("POST", "/vertex", "AIP_PREDICT_ROUTE"), ("GET", "/health", "AIP_HEALTH_ROUTE")):
            self.handlers[method, os.environ.get(name, path)] = self.handlers[method, path]  # Vertex AI says where

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass on what is none."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        call = Call(scope, receive, send, self.state)
        scope[CALL] = call
        if TASK not in scope:
            scope[TASK] = asyncio.current_task()
        status = _UNANSWERED

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", call.id.encode())]
                if self.state.phase == "draining":
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        works = scope["method"] == "POST"  # to look at the numbers is no work
        self.state.inflight += works
        span = None if self.tracer is None else self.tracer.begin(call)
        try:
            response = await self._answer(call, scope, receive, send_marked)
            cycle = scope.pop(CYCLE, None) if self.state.phase == "ready" else None
            if isinstance(response, Answer) and cycle is not None and response.written(cycle, call.id):
                status = response.status_code
            elif response is not None:
                await response(scope, receive, send_marked)
        except asyncio.CancelledError:
            if scope.get(GONE):
                self.state.series.cancelled.add()
                self.state.series.request_failure.add(1, "dropped")
            elif self.state.phase == "draining" and status == _UNANSWERED:
                self.state.abandoned += 1
                error = NotReady("the server shut down before this was computed", headers={"retry-after": "1"})
                await self.failed(call, error)(scope, receive, send_marked)
            else:
                raise
        finally:
            self.state.inflight -= works
            self.state.series.ended(status, call.stages)
            if span is not None and self.tracer is not None:
                self.tracer.end(span, call, status)
            log_request(call, status)
            scope.pop(CYCLE, None)
            del scope[CALL], scope[TASK]  # without a circle all of it is freed now, not by the collector

    async def _answer(self, call: Call, scope: Scope, receive: Receive, send: Send) -> Response | None:
        """The response; None where FastAPI has sent it."""
        method = "GET" if call.method == "HEAD" else call.method
        try:
            self.state.keys.check(method, call.path, call.sent.get("authorization"), call.sent.get("x-api-key"))
            handler = self.handlers.get((method, call.path))
            if handler is None:
                await self.app(scope, receive, send)
                return None
            if method == "POST":
                self._admit()
            return await handler(call)
        except ServeError as error:
            return self.failed(call, error)
        except asyncio.CancelledError:
            if LATE not in scope:
                raise
            message = f"the body was not complete after {scope[LATE]:g} s"
            return self.failed(call, SlowBody(message, headers={"connection": "close"}))
        except Exception as error:
            logger.exception("request %s to %s failed", call.id, call.path)
            return self.failed(call, InternalError(f"{type(error).__name__}; the log has it under request {call.id}"))

    def _admit(self) -> None:
        state = self.state
        if state.phase == "starting":
            raise NotReady("the models are being loaded", headers={"retry-after": "1"})
        if state.inflight > state.settings.max_concurrent_requests:
            raise Overload("Model is overloaded", headers={"retry-after": "1"})

    def failed(self, call: Call, error: ServeError) -> Response:
        """An error as the response of its dialect, counted."""
        self.state.series.request_failure.add(1, error.failure)
        answer = render(error, call.dialect)
        return Response(answer.body, answer.status, answer.headers)
