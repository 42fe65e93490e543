"""How long a forward pass takes: a + b * tokens + c * sum of squared lengths, learned from the passes themselves."""

from __future__ import annotations

import numpy as np

# Before the first pass: an encoder of some 20 million parameters on one CPU core.
PRIOR_S = (1e-3, 2e-4, 2e-8)
_SCALE = np.array([1e-3, 1e-5, 1e-9])  # what a unit of each coefficient is, so that the equations are well scaled
_PRIOR_WEIGHT = 1e-4  # of an observation: it decides only what the passes seen so far leave open
_SETTLED, _SELDOM = 64, 4  # after so many observations equations are solved for each fourth only
_SURPRISE = 4.0  # an observation counts as at most so many times its prediction: a hiccup is no new machine


class LatencyModel:
    """Least squares with forgetting: relative errors count, coefficients are never negative.

    The three terms are the launch of a pass, the linears and attention. One thread observes; any thread may read.

    Args:
        forget: weight that an observation loses with each later one; 0.02 remembers some fifty passes.

    Attributes:
        coefficients: (a, b, c) in seconds, seconds a token, seconds a squared length.
        num_observed: passes seen.
        spread: 99th percentile of the ratio of observed to predicted times.
    """

    def __init__(self, forget: float = 0.02) -> None:
        self.forget = forget
        self.coefficients: tuple[float, float, float] = PRIOR_S
        self.num_observed = 0
        self.spread = 1.0
        self._squared_length = 0.0  # decayed sums, for `tokens_within`
        self._tokens = 0.0
        prior = np.array(PRIOR_S) / _SCALE
        self._prior = np.diag(1.0 / prior**2), 1.0 / prior
        self._normal, self._right = np.zeros((3, 3)), np.zeros(3)

    @property
    def is_fitted(self) -> bool:
        """Whether enough passes were seen to plan with."""
        return self.num_observed >= 8

    @property
    def is_settled(self) -> bool:
        """Whether one pass more or less makes no difference."""
        return self.num_observed >= _SETTLED

    def predict(self, tokens: float, squares: float) -> float:
        """Seconds of a pass with so many tokens and such a sum of squared lengths."""
        a, b, c = self.coefficients
        return a + b * tokens + c * squares

    def marginal(self, tokens: float, squares: float) -> float:
        """Seconds that these tokens add to a pass."""
        _, b, c = self.coefficients
        return b * tokens + c * squares

    def tokens_within(self, seconds: float) -> int:
        """Tokens of a pass, of lengths as seen lately, that takes no longer 99 times in 100; at least 1."""
        a, b, c = self.coefficients
        length = self._squared_length / self._tokens if self._tokens else 64.0
        return max(1, int((seconds / max(self.spread, 1.0) - a) / max(b + c * length, 1e-12)))

    def observe(self, tokens: int, squares: int, seconds: float) -> None:
        """Learn from a pass."""
        if self.num_observed:
            expected = self.predict(tokens, squares)
            # Stochastic approximation of a quantile: up 99 times as far as down.
            above = seconds > self.spread * expected
            self.spread *= 1.0 + 0.02 * (0.99 if above else -0.01)
            if self.is_fitted:
                seconds = min(seconds, _SURPRISE * expected)
        features = np.array([1.0, tokens, squares]) * _SCALE / max(seconds, 1e-9)
        keep = 1.0 - self.forget
        self._normal = keep * self._normal + np.outer(features, features)
        self._right = keep * self._right + features
        self._squared_length = keep * self._squared_length + squares
        self._tokens = keep * self._tokens + tokens
        self.num_observed += 1
        if not self.is_settled or self.num_observed % _SELDOM == 0:
            self.coefficients = self._solve()

    def _solve(self) -> tuple[float, float, float]:
        matrix = self._normal + _PRIOR_WEIGHT * self._prior[0]
        right = self._right + _PRIOR_WEIGHT * self._prior[1]
        active = [0, 1, 2]
        while True:
            found = np.zeros(3)
            found[active] = np.linalg.solve(matrix[np.ix_(active, active)], right[active])
            if found.min() >= 0.0:
                a, b, c = (found * _SCALE).tolist()
                return a, b, c
            active.remove(int(found.argmin()))
