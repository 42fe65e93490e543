"""Who computes what, and when: one thread with the whole device, or several side by side, each with a part of it.

It is bookkeeping under the lock of a queue; it knows no model and no event loop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from fastbert.serve.lanes import Batch, Lanes
from fastbert.serve.latency import LatencyModel
from fastbert.serve.pace import Pace

_SPLIT_S = 24e-3  # a pass on the whole device that takes less is not split
_SLACK = 1.25  # what so little goes beyond a pass's part goes into it: left over, it would be a pass of its own


@dataclass(frozen=True, slots=True)
class UnderWay:
    """A pass under way: `share` passes have the device together; it should end at `until`."""

    share: int
    tokens: int
    until: float


class Crew:
    """Threads 0 to N - 1 that compute what waits in a queue's lanes. Every method wants the lock held.

    A pass on the whole device is over soonest. But whatever the event loop takes of one core meanwhile, the others wait
    for at the pass's barriers, and all of them wait while the loop answers and reads. Passes side by side, each on
    cores of its own, wait for nobody: who has ended leaves its cores to the loop and the clients, and the others
    compute on. So where little waits one pass has the whole device, and where there is enough passes share it.

    Args:
        size: N.
        lanes: what waits.
        latency: of passes on the whole device; one that has a share of it takes so many times as long.
        budget: tokens of a pass on the whole device, now.
        max_sequences: of a pass; None = no limit.

    Attributes:
        lock: of the lanes, the pace and all that is here.
        pace: whether to wait for company.
        under_way: passes by thread.
        closed: whether threads are to stop.
    """

    def __init__(
        self, size: int, lanes: Lanes, latency: LatencyModel, budget: Callable[[], int], max_sequences: int | None
    ) -> None:
        self.lock = threading.Lock()
        self.pace = Pace(shares_cores=size > 1)
        self.under_way: dict[int, UnderWay] = {}
        self.closed = False
        self._lanes, self._latency, self._budget, self._max_sequences = lanes, latency, budget, max_sequences
        self._signals = [threading.Condition(self.lock) for _ in range(size)]
        self._waiting: dict[int, bool] = {}  # threads without a pass; whether they wait for company

    def next(self, thread: int) -> tuple[Batch, int] | None:
        """Wait for work and take a batch of it, with the share of the device that it has; None = stop."""
        while not self.closed:
            now = monotonic()
            share = self._share(thread) if self._lanes.tokens else 0
            pause_s = self.pace.pause_s(self._lanes, self._enough(share), self._latency, now) if share else None
            if pause_s is None or pause_s > 0:
                self._waiting[thread] = pause_s is not None
                self._signals[thread].wait(pause_s)
                del self._waiting[thread]
                continue
            batch = self._lanes.take(self._tokens(share), self._max_sequences, self._latency, now)
            until = now + self._latency.predict(batch.tokens, batch.squares) * share
            self.under_way[thread] = UnderWay(share, batch.tokens, until)
            if self._lanes.tokens:
                self.wake()
            return batch, share
        return None

    def ended(self, thread: int, requests: int, tokens: int) -> None:
        """A thread's pass has ended, and so many requests with it."""
        self.pace.answered(requests, tokens, self._latency, monotonic())
        del self.under_way[thread]

    def wake(self) -> None:
        """Something waits: wake the first thread that may begin, if one may."""
        for thread in sorted(self._waiting):
            if share := self._share(thread):
                # While company is waited for, each wake-up of the thread would cost what waiting for it saves.
                pauses = self._waiting[thread] and self.pace.expects_more
                if not (pauses and self._lanes.tokens < self._enough(share)):
                    self._signals[thread].notify()
                return

    def close(self) -> None:
        """Stop the threads; passes under way are not waited for."""
        self.closed = True
        for signal in self._signals:
            signal.notify()

    def _share(self, thread: int) -> int:
        """How many passes share the device in a thread's next one; 0 = others go first."""
        if any(running.share == 1 for running in self.under_way.values()):
            return 0
        if self.under_way:
            return len(self._signals)
        if thread:
            return 0
        # A request alone would wait for the longer one of its parts, and leave the loop nothing to do meanwhile.
        several = len(self._lanes) >= len(self._signals)
        long = self._latency.predict(self._lanes.tokens, self._lanes.squares) >= _SPLIT_S
        return len(self._signals) if several and long else 1

    def _enough(self, share: int) -> int:
        """Tokens with which a pass begins at once: all that it may have, or its part of what is on its way."""
        if share == 1:
            return self._budget()
        computed = sum(running.tokens for running in self.under_way.values())
        on_their_way = self._lanes.tokens + computed + self.pace.returning_tokens
        return max(1, -(-min(self._budget(), on_their_way) // share))

    def _tokens(self, share: int) -> int:
        """Tokens of a pass that begins now."""
        enough, waiting = self._enough(share), self._lanes.tokens
        return min(max(1, self._budget() // share), waiting if waiting <= _SLACK * enough else enough)
