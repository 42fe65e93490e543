"""Requests that need little: a head that came before is not parsed again, and a coroutine begins without a task."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from fastbert.serve.call import HEAD, Head
from fastbert.serve.gate import Gate

if TYPE_CHECKING:
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

_MOST, _LONGEST = 512, 2048  # heads that are remembered, bytes of each
_UNUSUAL = ("transfer-encoding", "expect", "upgrade", "connection")
_NEVER_AGAIN = ("x-request-id", "traceparent")  # heads that say these are new each time
_OF_A_CONNECTION = ("client", "server", "scheme", "state", HEAD)


class Known(NamedTuple):
    """A head that was parsed before.

    Attributes:
        scope: what ASGI says of it, without what belongs to a connection.
        length: of its body.
    """

    scope: Mapping[str, Any]
    length: int


class Heads:
    """Heads of requests by their very bytes, which say the same each time: a client's differ in little but the body's
    length. Only those of plain requests to a gate's own routes are kept, and not for ever."""

    def __init__(self) -> None:
        self._known: dict[bytes, Known] = {}

    def find(self, data: bytes) -> tuple[Known, bytes] | None:
        """The head and the body, if these bytes are one whole request whose head is known."""
        end = data.find(b"\r\n\r\n") + 4
        known = self._known.get(data[:end])
        if known is None or len(data) != end + known.length:
            return None
        return known, data[end:]

    def learn(self, data: bytes, cycle: RequestResponseCycle, gate: Gate) -> None:
        """Remember the head of bytes that were just parsed, if they are one whole request and it is a plain one."""
        scope: dict[str, Any] = dict(cycle.scope)
        end = data.find(b"\r\n\r\n") + 4
        if end > _LONGEST or scope["http_version"] != "1.1" or scope["method"] != "POST":
            return
        head = Head.of(scope, gate.state.settings.compat)
        length = head.sent.get("content-length", "")
        if not length.isdigit() or len(data) != end + int(length) or int(length) > gate.state.settings.payload_limit:
            return
        if any(name in head.sent for name in (*_UNUSUAL, *_NEVER_AGAIN)) or ("POST", head.path) not in gate.handlers:
            return
        if len(self._known) >= _MOST:
            self._known.clear()
        plain = {name: value for name, value in scope.items() if name not in _OF_A_CONNECTION}
        self._known[data[:end]] = Known({**plain, HEAD: head}, int(length))


class Run:
    """A coroutine under way, as `asyncio.Task` runs one, but for its first step: that is made here and now, without a
    turn of the event loop, and is often the only one. `asyncio.current_task` does not know it."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], runs: set[Any]) -> None:
        self._coroutine, self._runs = coroutine, runs
        self._waits: asyncio.Future[Any] | None = None
        self._cancelled = self._ended = False
        runs.add(self)

    def done(self) -> bool:
        """Whether it has come to its end."""
        return self._ended

    def cancel(self, msg: str | None = None) -> bool:
        """Raise CancelledError where it waits; False = it is done."""
        if self._ended:
            return False
        if self._waits is None or not self._waits.cancel():
            self._cancelled = True
        return True

    def step(self, _: object = None) -> None:
        """Run on until it waits for something."""
        self._waits = None
        try:
            if self._cancelled:
                self._cancelled = False
                waits = self._coroutine.throw(asyncio.CancelledError())
            else:
                waits = self._coroutine.send(None)
        except StopIteration:
            self._end()
        except BaseException:
            self._end()
            raise
        else:
            if waits is None:  # asyncio.sleep(0)
                asyncio.get_running_loop().call_soon(self.step)
                return
            waits._asyncio_future_blocking = False
            self._waits = waits
            waits.add_done_callback(self.step)
            if self._cancelled and waits.cancel():
                self._cancelled = False

    def _end(self) -> None:
        self._ended = True
        self._runs.discard(self)
