"""How long a run has trained."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds of training: it runs on request and can be stopped for what does not count."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._since = seconds, math.nan

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return self._seconds if math.isnan(self._since) else self._seconds + time.perf_counter() - self._since

    @contextmanager
    def running(self) -> Iterator[None]:
        """Runs inside the block."""
        self._since = time.perf_counter()
        try:
            yield
        finally:
            self._seconds, self._since = self.seconds, math.nan

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stands still inside the block, and goes on after it if it ran before."""
        ran = not math.isnan(self._since)
        self._seconds, self._since = self.seconds, math.nan
        try:
            yield
        finally:
            self._since = time.perf_counter() if ran else math.nan
