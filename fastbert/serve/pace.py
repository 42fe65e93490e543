"""Whether to wait for company before a forward pass: where a launch costs more, and where clients are on their way; and
whether there is any."""

from __future__ import annotations

import asyncio

from fastbert.serve.lanes import Lanes
from fastbert.serve.latency import LatencyModel

_SMOOTHING = 0.1
_FAITHFUL = 0.75  # share of the clients just answered that must have come back at once, lately, to be waited for
# How many launches waiting for the next of them, and for all of them, may take: on a device of its own, which stands
# still meanwhile, and on cores that the event loop needs to read what they send.
_WAIT_APART, _WAIT_SHARED = (1.0, 2.0), (2.0, 8.0)
_ALONE = 16  # requests of one connection and of nobody else, before the next one is lone


class Pace:
    """How fast requests arrive, and whether who was answered asks again at once.

    One pass for two requests saves the launch `a` of the second pass. Waiting `g` for it costs the first one `g` and
    the pass's longer time `x`, and the second one waits `g` less: together it pays where a > x + 2 g.

    Clients that always wait for an answer come back in a burst. Without waiting for it those whom a pass has left over
    are computed alone, and the burst is read from the sockets on cores that compute: a launch more a round, and every
    thread of the pass held up. Where clients came back so far, and all of them are soon here, they are waited for.

    Args:
        shares_cores: whether passes are computed on the event loop's cores.
    """

    def __init__(self, shares_cores: bool = False) -> None:
        self._for_next, self._for_all = _WAIT_SHARED if shares_cores else _WAIT_APART
        self._gap_s = 1.0
        self._last: float | None = None
        self._window_s = self._answered_at = self._back_at = 0.0
        self._answered = self._back = self._tokens = 0
        self._share, self._each_s = 0.0, 0.0  # of the answered that came back, and the time that each of them took

    def arrived(self, now: float) -> None:
        """A request came."""
        if self._last is not None:
            self._gap_s += _SMOOTHING * (now - self._last - self._gap_s)
        self._last = now
        if self._back < self._answered and now - self._back_at <= self._window_s:
            self._back, self._back_at = self._back + 1, now

    def answered(self, count: int, tokens: int, latency: LatencyModel, now: float) -> None:
        """A pass has ended, and so many requests with it, which had so many tokens."""
        if self._back < self._answered and now - self._back_at <= self._window_s:  # of another pass, and still expected
            self._answered, self._tokens, self._back_at = self._answered + count, self._tokens + tokens, now
            return
        if self._answered:
            self._share += _SMOOTHING * (self._back / self._answered - self._share)
        if self._back:
            each_s = (self._back_at - self._answered_at) / self._back
            self._each_s += _SMOOTHING * (each_s - self._each_s)
        self._answered, self._back, self._tokens = count, 0, tokens
        self._answered_at = self._back_at = now
        self._window_s = self._for_next * latency.coefficients[0]

    @property
    def expects_more(self) -> bool:
        """Whether some of those who were just answered should come back yet."""
        return self._share >= _FAITHFUL and self._back < self._answered

    @property
    def returning_tokens(self) -> int:
        """Tokens with which those should come back, if they ask for as much again."""
        return self._tokens * (self._answered - self._back) // self._answered if self.expects_more else 0

    def pause_s(self, lanes: Lanes, enough: int, latency: LatencyModel, now: float) -> float:
        """Seconds to wait for one more request; 0 = start now. With `enough` tokens nobody is waited for."""
        if self._last is None or not latency.is_fitted or lanes.tokens >= enough:
            return 0.0
        pause = max(self._returning_s(latency, now), self._next_s(lanes, latency, now))
        latest = now + pause + latency.predict(lanes.tokens, lanes.squares) * latency.spread
        late = any(r.work.deadline is not None and latest > r.work.deadline for r in lanes) if pause else False
        return 0.0 if late else pause

    def _returning_s(self, latency: LatencyModel, now: float) -> float:
        """Until the next of those that were just answered should be back."""
        missing = self._answered - self._back
        if self._share < _FAITHFUL or missing * self._each_s > self._for_all * latency.coefficients[0]:
            return 0.0
        return max(0.0, self._back_at + self._window_s - now) if missing else 0.0

    def _next_s(self, lanes: Lanes, latency: LatencyModel, now: float) -> float:
        """Until anybody should come."""
        assert self._last is not None
        launch, gap = latency.coefficients[0], max(self._gap_s, now - self._last)
        if launch <= latency.marginal(lanes.tokens, lanes.squares) + 2 * gap:
            return 0.0
        return 0.0 if any(now + gap - request.arrived > launch for request in lanes) else gap


class Solo:
    """Whether requests come one after another by one connection, or by a next one after its end.

    Who comes while a pass runs on the event loop's thread is read when it is over: company shows by where requests come
    from, not by when.
    """

    def __init__(self) -> None:
        self._last: asyncio.BaseTransport | None = None
        self._count = 0

    def arrived(self, connection: asyncio.BaseTransport | None, others: bool) -> None:
        """A request came, by a connection if that is known; are there `others` under way?"""
        last, self._last = self._last, connection
        alone = last is not None and not others and (last is connection or last.is_closing())
        self._count = self._count + 1 if alone else 0

    @property
    def is_steady(self) -> bool:
        """Whether that has been so for a while."""
        return self._count >= _ALONE

    @property
    def is_sample(self) -> bool:
        """Whether this is one of those few that teach enough."""
        return self._count % _ALONE == 0
