"""The server's series: TEI's, word for word, and ours beside them."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections import Counter as CountOf
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastbert.serve.metrics import DURATION_BUCKETS, LATENCY_BUCKETS, Counter, Gauge, Histogram, Metric, render
from fastbert.serve.passes import BatchReport

STAGES = ("parse", "tokenize", "queue", "compute", "serialize")
_PENDING = 256  # requests that are counted together
_WINDOW = 4096  # requests that the rolling numbers of the status page look back on
_PERCENTILES = ("p50", "p90", "p95", "p99")
_Answered = tuple[str, str, float, tuple[float, ...], Sequence[int]]  # kind, method, when, times, lengths
_TIMED = ("", "_tokenization", "_queue", "_inference")


def _durations(name: str, what: str) -> list[Histogram]:
    words = ("in all", "of tokenisation", "in the queue", "of the forward pass")
    return [
        Histogram(f"te_{name}{part}_duration", f"Seconds {word}, {what}.", DURATION_BUCKETS)
        for part, word in zip(_TIMED, words, strict=True)
    ]


class Series:
    """All series, and the rolling window of the status page.

    With `compat` = `tei` a single /predict that was answered counts as TEI counts it: as a request once more, and never
    as a success.
    """

    def __init__(self, max_input_length: int, compat: str = "openai") -> None:
        self.compat = compat
        powers = [float(2**k) for k in range(21)]
        self.request_count = Counter("te_request_count", "Requests.", ["method"])
        self.request_success = Counter("te_request_success", "Requests answered.", ["method"])
        self.request_failure = Counter("te_request_failure", "Requests failed, by reason.", ["err"])
        self.request_durations = _durations("request", "of a request")
        self.input_length = Histogram(
            "te_request_input_length", "Tokens of an input.", [n for n in powers[:20] if n <= max_input_length]
        )
        self.inputs = {
            kind: (
                Counter(f"te_{kind}_count", "Inputs."),
                Counter(f"te_{kind}_success", "Inputs answered."),
                _durations(kind, "of an input"),
            )
            for kind in ("embed", "predict")
        }
        self.batch_size = Histogram("te_batch_next_size", "Inputs of a forward pass.", powers[:13])
        self.batch_tokens = Histogram("te_batch_next_tokens", "Tokens of a forward pass.", powers)
        self.stages = Histogram("fastbert_stage_seconds", "Seconds of a request by stage.", LATENCY_BUCKETS, ["stage"])
        self.tokens = Counter(
            "fastbert_tokens_total", "Tokens computed: those of inputs, and padding, of which there is none.", ["kind"]
        )
        self.truncated = Counter("fastbert_truncated_inputs_total", "Inputs that were cut.")
        self.cancelled = Counter("fastbert_cancelled_total", "Requests whose client left.")
        self.responses = Counter("fastbert_responses_total", "Answers by status.", ["status"])
        self.rss = Gauge("fastbert_process_rss_bytes", "Resident memory.", resident_bytes)
        self.cpu = Gauge("fastbert_process_cpu_seconds", "CPU time of the process.", time.process_time)
        self.tokens.add(0, "real")
        self.tokens.add(0, "padded")
        self.more: list[Metric] = []
        self.began = time.monotonic()
        self._answered: list[_Answered] = []
        self._ended: list[tuple[int, Mapping[str, float]]] = []
        self.window: deque[tuple[float, float, int]] = deque(maxlen=_WINDOW)

    def all(self) -> list[Metric]:
        """Every series, in the order of the text."""
        inputs: list[Metric] = []
        for count, success, durations in self.inputs.values():
            inputs += [count, success, *durations]
        return [
            self.request_count, self.request_success, self.request_failure, *self.request_durations, self.input_length,
            *inputs, self.batch_size, self.batch_tokens, self.stages, self.tokens, self.truncated, self.cancelled,
            self.responses, self.rss, self.cpu, *self.more,
        ]  # fmt: skip

    def batch(self, report: BatchReport) -> None:
        """Count a forward pass."""
        self.batch_size.observe(report.sequences)
        self.batch_tokens.observe(report.tokens)

    def text(self) -> bytes:
        """What `/metrics` answers."""
        self.settle()
        return render(self.all())

    def answered(
        self, kind: str, method: str, total_s: float, lengths: Sequence[int], tokenize_s: float,
        queue_s: Sequence[float], compute_s: Sequence[float],
    ) -> None:  # fmt: skip
        """Count a request whose inputs were all computed; the times of the inputs are averaged, as TEI does."""
        n = len(lengths)
        times = (total_s, tokenize_s, sum(queue_s) / n, sum(compute_s) / n)
        self._answered.append((kind, method, time.monotonic(), times, lengths))

    def ended(self, status: int, stages: Mapping[str, float]) -> None:
        """Count a request that was answered, or came to nothing."""
        self._ended.append((status, stages))
        if len(self._ended) >= _PENDING:
            self.settle()

    def settle(self) -> None:
        """Count what has only been noted: many at once cost a fraction, and nobody waits for an answer meanwhile."""
        answered, self._answered = self._answered, []
        ended, self._ended = self._ended, []
        for status, number in CountOf(status for status, _ in ended).items():
            self.responses.add(number, str(status))
        for stage in STAGES:
            if seconds := [stages[stage] for _, stages in ended if stage in stages]:
                self.stages.observe_all(seconds, stage)
        for kind in self.inputs:
            if rows := [row for row in answered if row[0] == kind]:
                self._count(kind, rows)
        self.window.extend((when, times[0], sum(lengths)) for _, _, when, times, lengths in answered)

    def _count(self, kind: str, rows: Sequence[_Answered]) -> None:
        for method, number in CountOf(method for _, method, *_ in rows).items():
            slip = self.compat == "tei" and (kind, method) == ("predict", "single")
            (self.request_count if slip else self.request_success).add(number, method)
        sizes = [len(lengths) for *_, lengths in rows]
        lengths = [length for *_, lengths in rows for length in lengths]
        _, success, durations = self.inputs[kind]
        success.add(len(lengths))
        for place, seconds in enumerate(zip(*(times for *_, times, _ in rows), strict=True)):
            self.request_durations[place].observe_all(seconds)
            durations[place].observe_all(seconds, times=sizes)
        self.input_length.observe_all(lengths)
        self.tokens.add(sum(lengths), "real")

    def rolling(self, seconds: float = 60.0) -> dict[str, Any]:
        """Latency percentiles, requests and tokens per second of the last `seconds`, at most 4096 requests."""
        self.settle()
        now = time.monotonic()
        recent = [row for row in self.window if now - row[0] <= seconds]
        if not recent:
            return {
                "requests": 0,
                "requests_per_s": 0.0,
                "tokens_per_s": 0.0,
                "latency_ms": dict.fromkeys(_PERCENTILES),
            }
        since = self.began if len(recent) < _WINDOW else recent[0][0]
        span = max(min(seconds, now - since), 1e-3)
        latency = np.percentile([row[1] * 1e3 for row in recent], [50, 90, 95, 99])
        return {
            "requests": len(recent),
            "requests_per_s": len(recent) / span,
            "tokens_per_s": sum(row[2] for row in recent) / span,
            "latency_ms": dict(zip(_PERCENTILES, latency.tolist(), strict=True)),
        }


def resident_bytes() -> float:
    """Resident memory of this process; where the system does not say the present one, the greatest so far."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
