"""Which waiting sequences go into the next forward pass: two lanes, an order in each, a token budget.

It is plain bookkeeping: no threads, no clock, no model. Whoever shares it between threads holds a lock.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from fastbert.serve.latency import LatencyModel
from fastbert.serve.work import DeadlineExceeded, Done, Work

# A request yields to one that came later if that is shorter by more than 1/PATIENCE of the time between them.
PATIENCE = 4.0
# What is left of a budget when no more requests are tried: looking through a long queue for a crumb costs more.
_CRUMB = 1 / 16


def _due(request: Request) -> float:
    return request.due


@dataclass(eq=False, slots=True)
class Request:
    """Work on its way.

    Attributes:
        work: what was submitted.
        future: where its result goes; belongs to the event loop.
        arrived: `time.monotonic()` of its submission.
        due: its place in the order, in the same seconds.
        next: its first sequence that is not yet in a forward pass.
        values: what came out, by sequence; `queue_s`, `compute_s` as in `Done`.
        unfinished: sequences that have no value yet.
        failed: it will have no result: the rest of it is not computed.
        tokens: of all its sequences.
    """

    work: Work
    future: asyncio.Future[Done]
    arrived: float
    due: float = 0.0
    next: int = 0
    failed: bool = False
    lengths: list[int] = field(init=False)
    values: list[np.ndarray | None] = field(init=False)
    queue_s: list[float] = field(init=False)
    compute_s: list[float] = field(init=False)
    unfinished: int = field(init=False)
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        n = len(self.work.ids)
        self.lengths = [len(ids) for ids in self.work.ids]
        self.values, self.queue_s, self.compute_s = [None] * n, [0.0] * n, [0.0] * n
        self.unfinished, self.tokens = n, sum(self.lengths)

    @property
    def waits(self) -> bool:
        """Whether it has a sequence that is to go into a forward pass."""
        return self.next < len(self.lengths)

    def waiting(self) -> tuple[int, int]:
        """Tokens and squared lengths of what is in no forward pass yet."""
        rest = self.lengths[self.next :]
        return sum(rest), sum(n * n for n in rest)

    def done(self) -> Done:
        """The result, once every sequence has its value."""
        values = [value for value in self.values if value is not None]
        assert len(values) == len(self.values)
        return Done(values, self.queue_s, self.compute_s, self.tokens)

    def too_late(self) -> DeadlineExceeded:
        """What it gets when its deadline is over."""
        assert self.work.deadline is not None
        after = self.work.deadline - self.arrived
        return DeadlineExceeded(f"the deadline, {after:.3f} s after the work came, is over")


@dataclass
class Batch:
    """Sequences of one forward pass.

    Attributes:
        parts: (request, which of its sequences).
        tokens, squares: of them.
        expired: requests whose turn it was, but too late.
    """

    budget_tokens: int
    max_sequences: int | None = None
    parts: list[tuple[Request, int]] = field(default_factory=list)
    tokens: int = 0
    squares: int = 0
    expired: list[Request] = field(default_factory=list)

    @classmethod
    def of(cls, parts: list[tuple[Request, int]]) -> Batch:
        """A batch of exactly these."""
        lengths = [request.lengths[i] for request, i in parts]
        return cls(sum(lengths), None, parts, sum(lengths), sum(n * n for n in lengths))

    def has_room(self, length: int) -> bool:
        """Whether a sequence of this length goes in; the first one always does."""
        if not self.parts:
            return True
        if self.max_sequences is not None and len(self.parts) >= self.max_sequences:
            return False
        return self.tokens + length <= self.budget_tokens

    @property
    def is_full(self) -> bool:
        """Whether looking for more is not worth it."""
        if self.max_sequences is not None and len(self.parts) >= self.max_sequences:
            return True
        return self.budget_tokens - self.tokens < max(1, self.budget_tokens * _CRUMB)


class Lanes:
    """Requests that wait, in two lanes.

    In a lane the order is by `due` = arrival + PATIENCE * predicted seconds, or earlier where a deadline asks for it: a
    short request overtakes a long one that came shortly before, and nobody waits for ever. The interactive lane goes
    first; while it does, the bulk lane earns `bulk_share` of the time and takes it as soon as it has earned a sequence,
    or a whole pass for one that is longer than a pass: then it owes the rest.

    Attributes:
        tokens, squares: of all that waits.
    """

    def __init__(self, bulk_share: float = 0.2) -> None:
        if not 0.0 < bulk_share < 1.0:
            raise ValueError(f"bulk_share is {bulk_share}; it must be above 0 (bulk work would never run) and below 1")
        self.bulk_share = bulk_share
        self.tokens = self.squares = 0
        self._lanes: dict[str, list[Request]] = {"interactive": [], "bulk": []}
        self._earned_s = 0.0

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def __iter__(self) -> Iterator[Request]:
        for lane in self._lanes.values():
            yield from lane

    def add(self, request: Request, latency: LatencyModel) -> None:
        """A request joins its lane."""
        tokens, squares = request.waiting()
        cost = latency.marginal(tokens, squares)
        request.due = request.arrived + PATIENCE * cost
        if request.work.deadline is not None:
            request.due = min(request.due, request.work.deadline - cost)
        insort(self._lanes[request.work.lane], request, key=_due)
        self.tokens += tokens
        self.squares += squares

    def remove(self, request: Request) -> None:
        """A request leaves, if it is still there."""
        lane = self._lanes[request.work.lane]
        for place in range(bisect_left(lane, request.due, key=_due), len(lane)):
            if lane[place] is request:
                self._forget(request)
                del lane[place]
                return
            if lane[place].due > request.due:
                return

    def _forget(self, request: Request) -> None:
        """What the request has waiting will not go anywhere."""
        tokens, squares = request.waiting()
        self.tokens -= tokens
        self.squares -= squares
        request.next = len(request.lengths)

    def take(
        self, budget_tokens: int, max_sequences: int | None, latency: LatencyModel, now: float = -float("inf")
    ) -> Batch:
        """The next forward pass; what it meets whose deadline is before `now` goes to `expired` instead.

        It has no parts only if nothing waits that is not expired.
        """
        batch = Batch(budget_tokens, max_sequences)
        interactive, bulk = self._lanes["interactive"], self._lanes["bulk"]
        if not (interactive and bulk):
            self._earned_s = 0.0
            self._fill(batch, interactive or bulk, now)
            return batch
        most = latency.predict(budget_tokens, self.squares * budget_tokens / max(self.tokens, 1))
        self._fill(batch, bulk, now, latency, float("inf") if self._earned_s >= most else self._earned_s)
        self._earned_s -= latency.marginal(batch.tokens, batch.squares)
        tokens, squares = batch.tokens, batch.squares
        self._fill(batch, interactive, now)
        if batch.tokens > tokens:
            spent = latency.predict(batch.tokens - tokens, batch.squares - squares)
            self._earned_s += spent * self.bulk_share / (1.0 - self.bulk_share)
        self._earned_s = min(self._earned_s, most)
        return batch

    def _fill(
        self,
        batch: Batch,
        lane: list[Request],
        now: float,
        latency: LatencyModel | None = None,
        seconds: float = float("inf"),
    ) -> None:
        """Move sequences from a lane into the batch while they fit, and while they cost no more than `seconds`."""
        looked_at = 0
        for request in lane:
            if batch.is_full and batch.parts:
                break
            looked_at += 1
            if request.work.deadline is not None and request.work.deadline <= now:
                self._forget(request)
                batch.expired.append(request)
                continue
            for i in range(request.next, len(request.lengths)):
                length = request.lengths[i]
                if not batch.has_room(length):
                    break
                if latency is not None:
                    cost = latency.marginal(length, length * length)
                    if cost > seconds:
                        break
                    seconds -= cost
                batch.parts.append((request, i))
                batch.tokens += length
                batch.squares += length * length
                self.tokens -= length
                self.squares -= length * length
                request.next = i + 1
            if latency is not None and request.waits:
                break  # it earns on; a later one must not take what this one waits for
        lane[:looked_at] = [r for r in lane[:looked_at] if r.waits]
