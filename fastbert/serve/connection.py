"""One HTTP connection: uvicorn's, with limits for clients that send or read too slowly, and an end to their work."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from fastbert.serve.call import BODY, CYCLE
from fastbert.serve.express import Heads, Known, Run
from fastbert.serve.gate import GONE, LATE, TASK, Gate

MAX_HEADER_BYTES = 64 * 1024
_TICK_S = 1e-3  # of the event loop's timers


class Connection(HttpToolsProtocol):
    """uvicorn's connection that

    * closes when a request's headers are not complete in time, or longer than 64 KiB;
    * gives a request up when its body is not complete in time;
    * closes when the client reads nothing of an answer for too long;
    * cancels the work of a client that left;
    * begins at once with a request whose head came before; see `fastbert.serve.express`.
    """

    def __init__(
        self, *args: Any, heads: Heads, header_timeout_s: float, body_timeout_s: float, write_timeout_s: float,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        self.heads = heads
        self.gate = self.app if isinstance(self.app, Gate) and self.app.tracer is None else None
        self.header_timeout_s, self.body_timeout_s = header_timeout_s, body_timeout_s
        self.write_timeout_s = write_timeout_s
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._header_bytes = 0
        self._in_body = False
        self._fresh = True  # no byte of a next request was parsed
        self._idle_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The client has connected: its first headers are awaited."""
        super().connection_made(transport)
        self._await_headers()

    def _await_headers(self) -> None:
        self._reading = self.loop.call_later(self.header_timeout_s, self._give_up, 408, "headers took too long")

    def data_received(self, data: bytes) -> None:
        """Bytes came; while they are headers they are counted. A request that came whole starts no clock."""
        plain = self.gate is not None and self._fresh and self._in_headers()
        if plain and (found := self.heads.find(data)) is not None and not self.transport.is_closing():
            self._begin(*found)
            return
        if self._in_headers():
            self._header_bytes += len(data)
        before = self.cycle
        super().data_received(data)
        if plain and self._fresh and self.cycle is not before and self.gate is not None:
            self.heads.learn(data, self.cycle, self.gate)
        if self._in_headers() and self._header_bytes > MAX_HEADER_BYTES:
            self._give_up(431, f"headers are longer than {MAX_HEADER_BYTES} bytes")
        elif self._reading is None and self._header_bytes:
            self._await_headers()
        elif self._reading is None and self._in_body:
            self._reading = self.loop.call_later(self.body_timeout_s, self._give_up_body)

    def _begin(self, known: Known, body: bytes) -> None:
        self._stop_reading()
        self._header_bytes = 0
        scope: dict[str, Any] = {
            **known.scope, "client": self.client, "server": self.server, "scheme": self.scheme, BODY: body
        }  # fmt: skip
        self.cycle = RequestResponseCycle(
            scope, self.transport, self.flow, self.logger, self.access_logger, self.access_log,  # type: ignore[arg-type]
            self.server_state.default_headers, asyncio.Event(), False, True, self.on_response_complete,
        )  # fmt: skip
        self.cycle.more_body = False
        scope[CYCLE], scope[TASK] = self.cycle, Run(self.cycle.run_asgi(self.app), self.tasks)
        scope[TASK].step()

    def _in_headers(self) -> bool:
        return self.cycle is None or (self.cycle.response_complete and not self.pipeline)

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        self._fresh = False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The request begins."""
        self._stop_reading()
        self._header_bytes = 0
        self._in_body = True
        super().on_headers_complete()
        self.cycle.scope[CYCLE] = self.cycle  # type: ignore[literal-required]

    def on_message_complete(self) -> None:
        """The request is here."""
        self._stop_reading()
        self._in_body = False
        self._fresh = True
        super().on_message_complete()

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _give_up_body(self) -> None:
        self._reading = None
        scope: dict[str, Any] = self.cycle.scope  # type: ignore[assignment]
        task = scope.get(TASK)
        if self.cycle.response_complete or task is None:
            self.transport.close()
        else:
            scope[LATE] = self.body_timeout_s
            task.cancel()

    def _give_up(self, status: int, reason: str) -> None:
        self._reading = None
        if self.transport.is_closing():
            return
        if self._header_bytes:
            body = orjson.dumps({"error": reason, "error_type": "Validation" if status == 431 else "Timeout"})
            self.transport.write(
                b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
                % (status, b"Request Timeout" if status == 408 else b"Request Header Fields Too Large", len(body))
                + body
            )
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is answered in JSON too."""
        body = orjson.dumps({"error": msg, "error_type": "Validation"})
        head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: %d\r\n" % len(body)
        self.transport.write(head + b"connection: close\r\n\r\n" + body)
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client left: what it waited for is not computed."""
        self._stop_reading()
        self._stop_writing()
        super()._unset_keepalive_if_required()
        if self.cycle is not None and not self.cycle.response_complete:
            scope: dict[str, Any] = self.cycle.scope  # type: ignore[assignment]
            task = scope.get(TASK)
            if task is not None and not task.done():
                scope[GONE] = True
                task.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """The answer is out, and the next request is awaited: by one clock, which looks when the last answer was."""
        self._idle_since = self.loop.time()
        if self.pipeline:
            super().on_response_complete()
            return
        self.server_state.total_requests += 1
        self.flow.resume_reading()
        if self.timeout_keep_alive_task is None and not self.transport.is_closing():
            self._await_request(self.timeout_keep_alive)

    def _await_request(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def _unset_keepalive_if_required(self) -> None:
        """uvicorn would set that clock anew for each request."""

    def timeout_keep_alive_handler(self) -> None:
        """Close, if nothing came for so long."""
        self.timeout_keep_alive_task = None
        left_s = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if not (self._fresh and self._in_headers()):  # the next answer sets the clock again
            return
        if left_s > _TICK_S:
            self._await_request(left_s)
        else:
            super().timeout_keep_alive_handler()

    def pause_writing(self) -> None:
        """The client does not read as fast as we write."""
        super().pause_writing()
        self._watch_writing(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """It has caught up."""
        self._stop_writing()
        super().resume_writing()

    def _watch_writing(self, left: int) -> None:
        self._writing = self.loop.call_later(self.write_timeout_s, self._check_writing, left)

    def _check_writing(self, before: int) -> None:
        left = self.transport.get_write_buffer_size()
        if left >= before:
            self.transport.abort()
        else:
            self._watch_writing(left)

    def _stop_writing(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None
