"""Forward passes: a batch in, what became of each request out. What goes wrong stays with those whom it concerns."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from time import monotonic
from typing import Protocol

import numpy as np
import torch

from fastbert.packing import PackedBatch, pack
from fastbert.serve.lanes import Batch, Request
from fastbert.serve.latency import LatencyModel
from fastbert.serve.work import ComputeFailed, DeadlineExceeded, NonFinite, WorkError

_SELDOM = 4  # a settled latency model learns from each fourth pass only


class Computes(Protocol):
    """What is needed of a model; `fastbert.serve.served.Served` is one.

    Attributes:
        outputs: what it computes, of `fastbert.serve.work.OUTPUTS`.
        max_length: tokens of the longest sequence.
        position_offset: position of each sequence's first token.
        batch_tokens: tokens of a forward pass that its device is good at.
        passes_at_once: passes that may share the device, each computed by a thread of its own.
    """

    outputs: frozenset[str]
    batch_tokens: int
    passes_at_once: int

    @property
    def position_offset(self) -> int:
        """Position of each sequence's first token."""

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""

    def compute(
        self, batch: PackedBatch, outputs: Sequence[str], prompt_lengths: Sequence[int] | None = None, share: int = 1
    ) -> list[np.ndarray]:
        """One float32 array a sequence, by a pass that leaves room for `share - 1` others."""


@dataclass(frozen=True)
class BatchReport:
    """A forward pass: `squares` is of its lengths, `padded_tokens` what padding to the longest would have computed, and
    `share` how many passes had the device together."""

    sequences: int
    tokens: int
    squares: int
    padded_tokens: int
    compute_s: float
    predicted_s: float
    share: int


@dataclass
class Counters:
    """What has happened so far: forward passes, and requests that came to nothing."""

    batches: int = 0
    sequences: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    compute_s: float = 0.0
    overloaded: int = 0
    cancelled: int = 0
    deadline_exceeded: int = 0
    nonfinite: int = 0
    failed: int = 0
    oom_splits: int = 0

    def add(self, outcome: Outcome) -> None:
        """Count forward passes."""
        self.oom_splits += outcome.oom_splits
        for report in outcome.reports:
            self.batches += 1
            self.sequences += report.sequences
            self.tokens += report.tokens
            self.padded_tokens += report.padded_tokens
            self.compute_s += report.compute_s

    def failure(self, error: WorkError) -> None:
        """Count a request that has no result."""
        self.deadline_exceeded += isinstance(error, DeadlineExceeded)
        self.nonfinite += isinstance(error, NonFinite)
        self.failed += isinstance(error, ComputeFailed)


@dataclass
class Outcome:
    """What came of a batch: its passes, and the requests that are settled: None = done, else why not."""

    reports: list[BatchReport] = field(default_factory=list)
    settled: list[tuple[Request, WorkError | None]] = field(default_factory=list)
    oom_splits: int = 0


class Passes:
    """Runs batches on a model.

    Attributes:
        latency: learns from passes, when it is told to.
        memory_tokens: tokens of a pass that fit into memory, as far as is known.
    """

    def __init__(self, served: Computes, latency: LatencyModel) -> None:
        self.served = served
        self.latency = latency
        self.memory_tokens = float("inf")
        self._seen = 0
        self._recording = threading.Lock()  # parts of one request may be in passes that end at the same time

    def run(self, parts: Sequence[tuple[Request, int]], share: int = 1) -> Outcome:
        """Compute sequences of requests, together, as one of the passes that share the device."""
        outcome = Outcome()
        self._run(parts, share, outcome)
        return outcome

    def learn(self, reports: Sequence[BatchReport]) -> None:
        """Learn what passes take; nobody who waits for an answer should wait for this."""
        for report in reports:
            # The first pass packs weights and loads kernels: it is like no other. Later a few of them teach enough.
            if self._seen and (not self.latency.is_settled or self._seen % _SELDOM == 0):
                self.latency.observe(report.tokens, report.squares, report.compute_s / report.share)
            self._seen += 1
            self.memory_tokens *= 1.01  # what did not fit once may fit later

    def _run(self, parts: Sequence[tuple[Request, int]], share: int, outcome: Outcome) -> None:
        """Compute parts; where memory does not suffice, the halves of them."""
        batch = Batch.of([(r, i) for r, i in parts if not (r.failed or r.future.done())])
        if not batch.parts:
            return
        start = monotonic()
        values = self._forward(batch.parts, share)
        seconds = monotonic() - start
        if not isinstance(values, ComputeFailed):
            self._report(batch, seconds, share, outcome)
            self._record(batch.parts, values, start, seconds, outcome)
        elif isinstance(values.__cause__, MemoryError) and len(batch.parts) > 1:
            outcome.oom_splits += 1
            self.memory_tokens = max(1.0, min(self.memory_tokens, batch.tokens / 2))
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            middle = len(batch.parts) // 2
            self._run(batch.parts[:middle], share, outcome)
            self._run(batch.parts[middle:], share, outcome)
        else:
            for request in dict.fromkeys(request for request, _ in batch.parts):
                _fail(request, values, outcome)

    def _forward(self, parts: Sequence[tuple[Request, int]], share: int) -> list[np.ndarray] | ComputeFailed:
        """The values of parts. An error comes back without its traceback, which would keep the batch's memory."""
        works = [request.work for request, _ in parts]
        try:
            types = None
            if any(work.type_ids is not None for work in works):
                types = [[0] * r.lengths[i] if r.work.type_ids is None else r.work.type_ids[i] for r, i in parts]
            batch = pack([r.work.ids[i] for r, i in parts], types, self.served.position_offset)
            values = self.served.compute(batch, [w.output for w in works], [w.prompt_length for w in works], share)
            if len(values) != len(parts):
                raise RuntimeError(f"the model returned {len(values)} values for {len(parts)} sequences")
            return values
        except Exception as error:
            failed = ComputeFailed(f"the forward pass failed: {type(error).__name__}: {error}")
            failed.__cause__ = MemoryError(str(error)) if is_out_of_memory(error) else error.with_traceback(None)
            return failed

    def _report(self, batch: Batch, seconds: float, share: int, outcome: Outcome) -> None:
        predicted = self.latency.predict(batch.tokens, batch.squares) * share
        padded = max(request.lengths[i] for request, i in batch.parts) * len(batch.parts)
        report = BatchReport(len(batch.parts), batch.tokens, batch.squares, padded, seconds, predicted, share)
        outcome.reports.append(report)

    def _record(
        self,
        parts: Sequence[tuple[Request, int]],
        values: Sequence[np.ndarray],
        start: float,
        seconds: float,
        outcome: Outcome,
    ) -> None:
        bad: dict[Request, list[int]] = {}
        with self._recording:
            for (request, i), value in zip(parts, values, strict=True):
                request.values[i], request.compute_s[i] = value, seconds
                request.queue_s[i] = start - request.arrived
                request.unfinished -= 1
                if not is_finite(value):
                    bad.setdefault(request, []).append(i)
            for request in dict.fromkeys(request for request, _ in parts):
                if request in bad:
                    _fail(request, NonFinite(bad[request]), outcome)
                elif not request.unfinished and not request.failed:
                    outcome.settled.append((request, None))


def _fail(request: Request, error: WorkError, outcome: Outcome) -> None:
    request.failed = True
    outcome.settled.append((request, error))


def is_finite(array: np.ndarray) -> bool:
    """Whether no number of an array is NaN or infinite: then its scalar product with itself is neither, unless it
    overflows, which vectors of an encoder never do."""
    return isfinite(np.vdot(array, array)) or bool(np.isfinite(array).all())


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory did not suffice; torch says so on a CPU with a plain RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
