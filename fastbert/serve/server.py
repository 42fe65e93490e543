"""The process: uvicorn, signals, and an end that loses no accepted request."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Generator
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, cast

import uvicorn

from fastbert.serve.app import build_app
from fastbert.serve.connection import Connection
from fastbert.serve.express import Heads
from fastbert.serve.state import State

if TYPE_CHECKING:
    from fastbert.serve.tracing import Tracer

logger = logging.getLogger("fastbert.serve")

_QUEUE_S = 2.0  # until the listening socket's queue is empty for once
_HANDSHAKE_S = 0.05  # for those who had begun to connect
_LINGER_S = 0.25  # for requests that are on their way when the door is closed
_FIRST_REQUEST_S = 2.0  # for the first request of somebody who has just connected
_LOCAL = ("127.0.0.1", "::1", "localhost")


class Server(uvicorn.Server):
    """uvicorn's server that drains: on SIGTERM `/ready` turns to 503 while everything is still served for
    `drain_grace_s`; then the door closes, what was accepted is answered, at most for `drain_timeout_s`. A second signal
    ends it at once.
    """

    def __init__(self, state: State, tracer: Tracer | None = None) -> None:
        settings = state.settings
        limits = {name: getattr(settings, name) for name in ("header_timeout_s", "body_timeout_s", "write_timeout_s")}
        self.state = state
        self.clean = True
        super().__init__(
            uvicorn.Config(
                build_app(state, tracer),
                host=settings.host,
                port=settings.port,
                uds=None if settings.unix_socket is None else str(settings.unix_socket),
                http=partial(Connection, heads=Heads(), **limits),  # type: ignore[arg-type]
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=2048,
                timeout_keep_alive=settings.keep_alive_s,  # type: ignore[arg-type]
                timeout_graceful_shutdown=settings.drain_timeout_s,  # type: ignore[arg-type]
                ssl_certfile=settings.ssl_certfile,
                ssl_keyfile=settings.ssl_keyfile,
            )
        )

    @property
    def address(self) -> str:
        """Where the server listens, once it does: a URL, or a socket's path."""
        if self.config.uds:
            return self.config.uds
        name = self.servers[0].sockets[0].getsockname()
        host = f"[{name[0]}]" if ":" in name[0] else name[0]
        return f"{'https' if self.config.is_ssl else 'http'}://{host}:{name[1]}"

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        gc.collect()
        gc.freeze()  # models and libraries stay: the collector need not look through them again and again
        settings = self.state.settings
        names = ", ".join(model.name for model in self.state.models)
        took = time.monotonic() - self.state.started
        logger.info("%s ready at %s after %.1f s", names, self.address, took)
        if not self.state.keys and not settings.unix_socket and settings.host not in _LOCAL:
            logger.warning("open to everybody who reaches %s: no --api-key, and not only local", settings.host)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve on for the grace, close the door, finish what came in."""
        self.state.phase = "draining"
        grace = self.state.settings.drain_grace_s
        logger.info("draining: %d requests in the house, closing in %g s", self.state.inflight, grace)
        end = time.monotonic() + grace
        while time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(0.05)
        await self._close_door()
        await super().shutdown(sockets)
        gc.unfreeze()
        self.clean = not (self.state.abandoned or self.server_state.tasks)
        logger.info("stopped" if self.clean else "stopped with requests unanswered")

    async def _close_door(self) -> None:
        """Listen no more, and lose nobody: a socket that closes resets connections still in its queue, and a connection
        that closes resets a request that was not read yet. So the first are accepted, the second are waited for.
        """
        for server in self.servers:
            queue = select.poll()
            for listener in server.sockets:
                queue.register(listener.fileno(), select.POLLIN)
                _take_no_newcomers(listener.fileno())
            await asyncio.sleep(_HANDSHAKE_S)
            end = time.monotonic() + _QUEUE_S
            while queue.poll(0) and time.monotonic() < end:
                await asyncio.sleep(0)
            server.close()
        begin = time.monotonic()
        while not self.force_exit and (waited := time.monotonic() - begin) < _FIRST_REQUEST_S:
            connected = cast(set[Connection], self.server_state.connections)
            if waited > _LINGER_S and all(connection.cycle is not None for connection in connected):
                break
            await asyncio.sleep(0.02)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A first signal begins the draining, a second one ends it."""
        if self.should_exit:
            self.force_exit = True
        self.state.phase = "draining"
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """uvicorn's, without raising the signal again at the end: a drained server exits with 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def serve(state: State) -> bool:
    """Run until a signal; whether every accepted request was answered."""
    settings = state.settings
    tracer = None
    if settings.otlp_endpoint is not None:
        try:
            from fastbert.serve.tracing import Tracer

            tracer = Tracer.to(settings.otlp_endpoint, settings.otlp_service_name)
        except ModuleNotFoundError as error:
            raise ImportError(f"{error}; traces need pip install 'fastbert-engine[otel]'") from error
    server = Server(state, tracer)
    server.run()
    return server.clean


# Classic BPF over a TCP header: byte 13 holds its flags; with SYN set the packet is dropped, else kept whole.
_DROP_SYN = ((0x30, 0, 0, 13), (0x45, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))
_SO_ATTACH_FILTER = 26


def _take_no_newcomers(listener: int) -> None:
    """Have the kernel drop what would begin a connection to a listening socket (Linux, TCP): whoever comes asks again a
    second later, and is refused by then. Else somebody connects between the last look at the queue and its end."""
    with socket.socket(fileno=os.dup(listener)) as same:
        if sys.platform == "linux" and same.family != socket.AF_UNIX:
            code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in _DROP_SYN))
            program = struct.pack("@HP", len(_DROP_SYN), ctypes.addressof(code))
            with contextlib.suppress(OSError):  # a sandbox may forbid it: then as without
                same.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
