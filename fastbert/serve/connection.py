"""One HTTP connection: uvicorn's, with limits for clients that send or read too slowly, and an end to their work."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fastbert.serve.gate import CYCLE, GONE, LATE, TASK

MAX_HEADER_BYTES = 64 * 1024


class Connection(HttpToolsProtocol):
    """uvicorn's connection that

    * closes when a request's headers are not complete in time, or longer than 64 KiB;
    * gives a request up when its body is not complete in time;
    * closes when the client reads nothing of an answer for too long;
    * cancels the work of a client that left.
    """

    def __init__(
        self, *args: Any, header_timeout_s: float, body_timeout_s: float, write_timeout_s: float, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.header_timeout_s, self.body_timeout_s = header_timeout_s, body_timeout_s
        self.write_timeout_s = write_timeout_s
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._header_bytes = 0
        self._in_body = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The client has connected: its first headers are awaited."""
        super().connection_made(transport)
        self._await_headers()

    def _await_headers(self) -> None:
        self._reading = self.loop.call_later(self.header_timeout_s, self._give_up, 408, "headers took too long")

    def data_received(self, data: bytes) -> None:
        """Bytes came; while they are headers they are counted. A request that came whole starts no clock."""
        if self._in_headers():
            self._header_bytes += len(data)
        super().data_received(data)
        if self._in_headers() and self._header_bytes > MAX_HEADER_BYTES:
            self._give_up(431, f"headers are longer than {MAX_HEADER_BYTES} bytes")
        elif self._reading is None and self._header_bytes:
            self._await_headers()
        elif self._reading is None and self._in_body:
            self._reading = self.loop.call_later(self.body_timeout_s, self._give_up_body)

    def _in_headers(self) -> bool:
        return self.cycle is None or (self.cycle.response_complete and not self.pipeline)

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
        if self.cycle is not None and not self.cycle.response_complete:
            scope: dict[str, Any] = self.cycle.scope  # type: ignore[assignment]
            task = scope.get(TASK)
            if task is not None and not task.done():
                scope[GONE] = True
                task.cancel()
        super().connection_lost(exc)

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
