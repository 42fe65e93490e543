"""One request on its way through the server: who asks, what model, until when, and where the time went."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from random import getrandbits
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fastbert.serve.errors import BadJSON, Invalid, ServeError, WrongContentType, dialect_of
from fastbert.serve.models import Model
from fastbert.serve.security import read_body
from fastbert.serve.series import STAGES
from fastbert.serve.state import State
from fastbert.serve.work import LANES

if TYPE_CHECKING:
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

M = TypeVar("M", bound=BaseModel)

_BRANCHES = {"str", "Document", "texts form", "documents form"}

HEAD = "fastbert.head"  # in a scope whose head was read before
BODY = "fastbert.body"  # and whose body, within the limit, is here
CYCLE = "fastbert.cycle"  # uvicorn's side of the request, where it is uvicorn's


@dataclass(frozen=True)
class Head:
    """What the head of a request says.

    Attributes:
        path: below the root path.
        sent: its headers by their names in lower case.
        given_id: the client's `x-request-id`, or an empty string.
        dialect: of errors.
        media_type: of the body.
        is_json: whether that is JSON.
    """

    path: str
    sent: Mapping[str, str]
    given_id: str
    dialect: str
    media_type: str
    is_json: bool

    @classmethod
    def of(cls, scope: Scope, compat: str) -> Head:
        """The head of an ASGI scope; `compat` is the server's setting."""
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        sent = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = sent.get("x-request-id", "")
        usable = len(given) <= 128 and given.isascii() and given.isprintable()
        kind = sent.get("content-type", "").split(";")[0].strip().lower()
        is_json = kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
        return cls(path, sent, given if usable else "", dialect_of(path, compat), kind, is_json)


class Call(Request):
    """A request, with the server it came to.

    Attributes:
        server: the server's state.
        head: what it said before its body; `path`, `sent` and `dialect` are of it.
        id: of the client's `x-request-id`, or ours.
        stages: seconds by stage.
        tokens, characters: of the inputs.
        num_truncated: inputs that were cut.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, server: State) -> None:
        super().__init__(scope, receive, send)
        self.server = server
        self.started = time.perf_counter()
        self.head: Head = scope.get(HEAD) or Head.of(scope, server.settings.compat)
        self.path, self.sent, self.dialect = self.head.path, self.head.sent, self.head.dialect
        self.id = self.head.given_id or f"{getrandbits(128):032x}"  # no secret, so no system call
        self.stages: dict[str, float] = {}
        self.tokens = self.characters = self.num_truncated = 0

    async def read(self, adapter: TypeAdapter[M]) -> M:
        """The body as a schema's object.

        Raises:
            WrongContentType, BodyTooLarge: before it is parsed.
            BadJSON: it is no JSON, or nested too deep.
            Invalid: JSON of another shape; the first misfit is named.
        """
        if not self.head.is_json:
            given = self.head.media_type or "none"
            raise WrongContentType(f"Expected request with `Content-Type: application/json`, got {given!r}")
        body: bytes | None = self.scope.get(BODY)
        if body is None:
            declared = self.sent.get("content-length", "")
            body = await read_body(self.receive, declared, self.server.settings.payload_limit)
        started = time.perf_counter()
        parsed = parse(adapter, body)
        self.stages["parse"] = time.perf_counter() - started
        return parsed

    def model(self, name: str | None = None) -> Model:
        """The model that the body, else `?model=`, else `x-model` names; without a name the first one.

        Raises:
            ModelNotFound: several models are served and none has this name.
        """
        asked = name or (self.scope["query_string"] and self.query_params.get("model")) or self.sent.get("x-model")
        return self.server.model(asked or None)

    def deadline(self) -> float:
        """When the answer is of no use any more, by the monotonic clock: `x-deadline-ms`, or the server's limit.

        Raises:
            Invalid: the header is no number above 0.
        """
        limit = self.server.settings.request_timeout_s
        if (text := self.sent.get("x-deadline-ms")) is not None:
            try:
                asked = float(text)
            except ValueError:
                asked = 0.0
            if not 0 < asked < float("inf"):
                raise Invalid(f"x-deadline-ms is {text!r:.40}; it is a number of milliseconds above 0", "x-deadline-ms")
            limit = min(limit, asked / 1e3)
        return time.monotonic() + limit - (time.perf_counter() - self.started)

    @property
    def connection(self) -> asyncio.Transport | None:
        """What it came by, where that is known."""
        cycle: RequestResponseCycle | None = self.scope.get(CYCLE)
        return None if cycle is None else cycle.transport

    def lane(self) -> str:
        """The queue of `x-priority`.

        Raises:
            Invalid: an unknown one.
        """
        lane = self.sent.get("x-priority", LANES[0]).lower()
        if lane not in LANES:
            raise Invalid(f"x-priority is {lane!r:.40}; it is one of {', '.join(LANES)}", "x-priority")
        return lane

    def answer(self, content: bytes, media_type: str = "application/json", **headers: str) -> Response:
        """A 200 with TEI's headers and `Server-Timing`; what a stage took stands there in milliseconds, not rounded."""
        total = time.perf_counter() - self.started
        milliseconds = int(total * 1e3)
        timing = "".join([f"{name};dur={self.stages[name] * 1e3:.3f}, " for name in STAGES if name in self.stages])
        more = "".join([f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items()])
        return Answer(
            content,
            f"content-type: {media_type}\r\ncontent-length: {len(content)}\r\n"
            f"x-compute-type: {self.server.compute_type}\r\nx-compute-time: {milliseconds}\r\n"
            f"x-compute-characters: {self.characters}\r\nx-compute-tokens: {self.tokens}\r\n"
            f"x-total-time: {milliseconds}\r\nx-tokenization-time: {self._milliseconds('tokenize')}\r\n"
            f"x-queue-time: {self._milliseconds('queue')}\r\nx-inference-time: {self._milliseconds('compute')}\r\n"
            f"x-truncated-inputs: {self.num_truncated}\r\n"
            f"server-timing: {timing}total;dur={total * 1e3:.3f}\r\n{more}",
        )

    def _milliseconds(self, stage: str) -> int:
        return int(self.stages.get(stage, 0.0) * 1e3)


class Answer(Response):
    """A 200 whose headers are ready: lines with names in lower case, the length among them."""

    def __init__(self, content: bytes, lines: str) -> None:
        self.status_code, self.body, self.background = 200, content, None
        self.lines = lines.encode("latin-1")

    @property
    def raw_headers(self) -> list[tuple[bytes, bytes]]:  # type: ignore[override]
        """The lines, as Starlette and ASGI's messages have them."""
        pairs = [line.partition(b": ") for line in self.lines.split(b"\r\n")[:-1]]
        return [(name, value) for name, _, value in pairs]

    def written(self, cycle: RequestResponseCycle, request_id: str) -> bool:
        """Send head and body in one piece, past ASGI's messages; False = not now, and nothing was sent."""
        if cycle.disconnected or cycle.flow.write_paused or not cycle.keep_alive:
            return False
        date = b"".join([b"%b: %b\r\n" % line for line in cycle.default_headers])
        head = b"HTTP/1.1 200 OK\r\n%b%bx-request-id: %b\r\n\r\n" % (date, self.lines, request_id.encode())
        cycle.transport.write(head + self.body)
        cycle.response_started = cycle.response_complete = True
        cycle.message_event.set()
        cycle.on_response()
        return True


def parse(adapter: TypeAdapter[M], body: bytes) -> M:
    """A schema's object from JSON bytes; see `Call.read` for the errors."""
    try:
        return adapter.validate_json(body)
    except ValidationError as error:
        raise said(error) from None


def said(error: ValidationError) -> ServeError:
    """A misfit in axum's words, with the place and what was expected there; never with the input itself."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    if found[0]["type"] == "json_invalid":
        detail = found[0]["msg"].removeprefix("Invalid JSON: ")
        return BadJSON(f"Failed to parse the request body as JSON: {detail}")
    places: dict[str, list[str]] = {}
    for row in found:
        # Pydantic names the branches of a union too: only keys and indices are places in the body.
        parts = [str(p) for p in row["loc"] if isinstance(p, int) or (p.isidentifier() and p not in _BRANCHES)]
        messages = places.setdefault(".".join(parts), [])
        if row["msg"] not in messages:
            messages.append(row["msg"])
    place, messages = next(iter(places.items()))
    expected = " / ".join(messages)
    what = f"{place}: {expected}" if place else expected
    return Invalid(f"Failed to deserialize the JSON body into the target type: {what}", place or None)
