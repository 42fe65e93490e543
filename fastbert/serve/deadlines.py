"""Deadlines of all requests under way, on one timer: one for each would be set, cancelled, and hardly ever run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from time import monotonic

from fastbert.serve.lanes import Request

_TICK_S = 1e-3  # of an event loop's timers


class Deadlines:
    """Calls `expire` with each request of `live` whose deadline is over. It belongs to an event loop at a time."""

    def __init__(self, live: Collection[Request], expire: Callable[[Request], None]) -> None:
        self._live, self._expire = live, expire
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._next = float("inf")  # for which it is set

    def watch(self, deadline: float | None, loop: asyncio.AbstractEventLoop) -> None:
        """A request has come, with its deadline by `time.monotonic()`."""
        if loop is not self._loop:
            self.close()
            self._loop = loop
        if deadline is not None and deadline < self._next:
            self.close()
            self._next = deadline
            self._timer = loop.call_later(deadline - monotonic(), self._look, loop)

    def close(self) -> None:
        """Look no more."""
        if self._timer is not None and self._loop is not None and not self._loop.is_closed():
            self._timer.cancel()
        self._timer, self._next = None, float("inf")

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self.close()
        now = monotonic() + _TICK_S
        waiting = [(r.work.deadline, r) for r in self._live if r.work.deadline is not None and not r.future.done()]
        for deadline, request in waiting:
            if deadline <= now:
                self._expire(request)
        self.watch(min((deadline for deadline, _ in waiting if deadline > now), default=None), loop)
