"""Counters, gauges and histograms of the server in Prometheus' text format.

The `te_*` series have the names, labels and buckets of text-embeddings-inference. Its counters end in no `_total`,
which the Prometheus client library adds by force; and an observation here costs a quarter of the library's, of which a
request makes about twenty. Every series is written by one thread.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import isfinite

import numpy as np

Labels = tuple[tuple[str, str], ...]

DURATION_BUCKETS = tuple(1e-5 * 1.5**k for k in range(1, 36))
LATENCY_BUCKETS = tuple(50e-6 * 2**k for k in range(18))  # 50 us to 6.5 s


class Counter:
    """A number by labels that only grows."""

    kind = "counter"

    def __init__(self, name: str, help: str, labels: Sequence[str] = ()) -> None:
        self.name, self.help, self.labels = name, help, tuple(labels)
        self.values: dict[tuple[str, ...], float] = {} if labels else {(): 0}

    def add(self, amount: float = 1, *labels: str) -> None:
        """Add to the series of these label values."""
        self.values[labels] = self.values.get(labels, 0) + amount

    def samples(self) -> Iterator[tuple[str, Labels, float]]:
        """Lines of the text format."""
        for labels, value in list(self.values.items()):
            yield self.name, tuple(zip(self.labels, labels, strict=True)), value


class Gauge:
    """Numbers that are asked for when they are read: the callback gives one, or one for each tuple of label values.

    `kind` is `counter` where the number only grows.
    """

    def __init__(
        self,
        name: str,
        help: str,
        read: Callable[[], float | Mapping[tuple[str, ...], float]],
        labels: Sequence[str] = (),
        kind: str = "gauge",
    ) -> None:
        self.name, self.help, self.read, self.labels, self.kind = name, help, read, tuple(labels), kind

    def samples(self) -> Iterator[tuple[str, Labels, float]]:
        """Lines of the text format."""
        found = self.read()
        if isinstance(found, Mapping):
            for values, number in found.items():
                yield self.name, tuple(zip(self.labels, values, strict=True)), number
        else:
            yield self.name, (), found


class Histogram:
    """Observations counted in buckets; `bounds` are upper bounds, inclusive."""

    kind = "histogram"

    def __init__(self, name: str, help: str, bounds: Sequence[float], labels: Sequence[str] = ()) -> None:
        self.name, self.help, self.bounds, self.labels = name, help, tuple(bounds), tuple(labels)
        self.series: dict[tuple[str, ...], tuple[list[int], list[float]]] = {}
        if not labels:
            self._new(())

    def _new(self, labels: tuple[str, ...]) -> tuple[list[int], list[float]]:
        return self.series.setdefault(labels, ([0] * (len(self.bounds) + 1), [0.0]))

    def observe(self, value: float, *labels: str, times: int = 1) -> None:
        """Count an observation, `times` times over."""
        counts, total = self.series.get(labels) or self._new(labels)
        counts[bisect_left(self.bounds, value)] += times
        total[0] += value * times

    def observe_all(self, values: Sequence[float], *labels: str, times: Sequence[int] | None = None) -> None:
        """Count N observations, each once or as often as `times` says."""
        counts, total = self.series.get(labels) or self._new(labels)
        places = np.searchsorted(self.bounds, values)
        for place, number in enumerate(np.bincount(places, times, len(counts)).tolist()):
            counts[place] += int(number)
        total[0] += float(np.dot(values, np.ones(len(values)) if times is None else times))

    def samples(self) -> Iterator[tuple[str, Labels, float]]:
        """Lines of the text format."""
        for values, (counts, total) in list(self.series.items()):
            labels = tuple(zip(self.labels, values, strict=True))
            seen = 0
            for bound, count in zip((*self.bounds, float("inf")), counts, strict=True):
                seen += count
                yield f"{self.name}_bucket", (*labels, ("le", _number(bound))), seen
            yield f"{self.name}_sum", labels, total[0]
            yield f"{self.name}_count", labels, seen


Metric = Counter | Gauge | Histogram


def render(metrics: Iterable[Metric]) -> bytes:
    """The text exposition format, version 0.0.4."""
    lines: list[str] = []
    for metric in metrics:
        lines += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}"]
        for name, labels, value in metric.samples():
            pairs = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
            lines.append(f"{name}{{{pairs}}} {_number(value)}" if pairs else f"{name} {_number(value)}")
    return "\n".join([*lines, ""]).encode()


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    if not isfinite(value):
        return "NaN" if value != value else "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) else repr(float(value))
