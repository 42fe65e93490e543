"""Whether to wait for company before a forward pass. No, but where a launch costs more than the computing."""

from __future__ import annotations

from fastbert.serve.lanes import Lanes
from fastbert.serve.latency import LatencyModel

_SMOOTHING = 0.1


class Pace:
    """How fast requests arrive.

    One pass for two requests saves the launch `a` of the second pass. Waiting `g` for it costs the first one `g` and
    the pass's longer time `x`, and the second one waits `g` less: together it pays where a > x + 2 g.
    """

    def __init__(self) -> None:
        self._gap_s = 1.0
        self._last: float | None = None

    def arrived(self, now: float) -> None:
        """A request came."""
        if self._last is not None:
            self._gap_s += _SMOOTHING * (now - self._last - self._gap_s)
        self._last = now

    def pause_s(self, lanes: Lanes, batch_tokens: int, latency: LatencyModel, now: float) -> float:
        """Seconds to wait for one more request; 0 = start now."""
        launch = latency.coefficients[0]
        if self._last is None or not latency.is_fitted or lanes.tokens >= batch_tokens:
            return 0.0
        gap = max(self._gap_s, now - self._last)
        if launch <= latency.marginal(lanes.tokens, lanes.squares) + 2 * gap:
            return 0.0
        latest = now + gap + latency.predict(lanes.tokens, lanes.squares) * latency.spread
        for request in lanes:
            late = request.work.deadline is not None and latest > request.work.deadline
            if late or now + gap - request.arrived > launch:
                return 0.0
        return gap
