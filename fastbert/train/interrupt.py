"""SIGTERM and Ctrl-C as a request: the run ends after the step it is in, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """Remembers the first SIGTERM or SIGINT; a second one acts as if nobody listened.

    It listens inside a `with` block, in the main thread only (Python allows no other), and leaves the caller's handlers
    as they were.
    """

    def __init__(self, listen: bool = True) -> None:
        self.signal: int | None = None
        self._listen = listen and threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if self._listen:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def leave(self, number: int) -> None:
        """End as the signal asked: KeyboardInterrupt, or exit code 128 + the signal's number."""
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)
