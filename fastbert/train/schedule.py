"""The learning rate as a function of how far a run is, and how long it is. It knows no optimiser and no clock."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastbert.train.arguments import TrainArguments

# Share of the run after the warm-up (0 to 1), power -> share of the way from the end value up to the peak.
DECAYS: dict[str, Callable[[float, float], float]] = {
    "linear": lambda x, power: 1.0 - x,
    "cosine": lambda x, power: 0.5 * (1.0 + math.cos(math.pi * x)),
    "polynomial": lambda x, power: (1.0 - x) ** power,
    "constant": lambda x, power: 1.0,
}


@dataclass(frozen=True)
class Schedule:
    """A linear rise to 1, then a fall to `end`: the factor of the peak rate.

    The position counts whatever `total` counts: optimiser steps, or seconds of a time budget (Izsak et al. 2021,
    arXiv 2104.07705). As in BERT and in Hugging Face's schedules, the first step of a warm-up has the rate 0.

    Attributes:
        kind: linear, cosine (half a wave), polynomial or constant.
        total: length of the run.
        warmup: length of the rise.
        end: where the fall ends, as a share of the peak.
        power: of the polynomial.
    """

    kind: str
    total: float
    warmup: float = 0.0
    end: float = 0.0
    power: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in DECAYS:
            raise ValueError(f"unknown schedule {self.kind!r}; it must be one of {', '.join(DECAYS)}")
        if self.warmup > self.total:
            raise ValueError(f"the warm-up of {self.warmup:g} is longer than the whole run of {self.total:g}")

    def __call__(self, position: float) -> float:
        """The factor at `position`; past the end it stays where it ended."""
        if position < self.warmup:
            return position / self.warmup
        x = min(1.0, (position - self.warmup) / max(self.total - self.warmup, 1e-12))
        return self.end + (1.0 - self.end) * DECAYS[self.kind](x, self.power)


def total_steps(loader: Any, arguments: TrainArguments) -> int:
    """Optimiser steps of a run whose length is not a time."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    part, whole = math.modf(arguments.num_train_epochs)
    steps = sum(loader.num_steps(epoch) for epoch in range(int(whole)))
    return steps + (math.ceil(part * loader.num_steps(int(whole))) if part else 0)


def build_schedule(arguments: TrainArguments, total: int | None) -> Schedule:
    """The schedule over `total` steps, or over the seconds of the time budget where that is None."""
    length = total if total is not None else arguments.budget_s or 0.0
    warmup = arguments.warmup_steps
    if warmup < 1:
        warmup = math.ceil(warmup * length) if total is not None else warmup * length
    return Schedule(arguments.lr_scheduler_type, length, warmup, arguments.lr_end_ratio, arguments.lr_power)
