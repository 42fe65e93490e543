"""The queue in front of a model: requests of an event loop in, forward passes on threads of its own; on the loop's
where one client at a time asks for little.

What is computed next is decided at the moment the device is free; nothing waits for a timer while it is idle.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from time import monotonic

from fastbert.serve.crew import Crew
from fastbert.serve.deadlines import Deadlines
from fastbert.serve.lanes import Lanes, Request
from fastbert.serve.latency import LatencyModel
from fastbert.serve.pace import Solo
from fastbert.serve.passes import BatchReport, Computes, Counters, Outcome, Passes
from fastbert.serve.work import OUTPUTS, Done, Draining, Overloaded, Work, WorkError

_QUEUE_BATCHES = 32  # full forward passes that may wait, where `max_queue_tokens` does not say


class Batcher:
    """Collects work and computes it in packed batches. `submit` and `drain` belong to one event loop.

    Args:
        served: the model.
        max_batch_tokens: tokens of one forward pass; None = what the device is good at. A longer sequence goes alone.
        max_batch_sequences: sequences of one forward pass; None = no limit.
        max_queue_tokens: tokens that may wait; None = 32 forward passes. Work that does not fit is refused whole and at
            once; work that is larger than this by itself is taken when nothing waits.
        target_p99_ms: make forward passes so short that a request that finds one running, and then goes into the next,
            is answered within this time; None = use the whole budget.
        lone_s: where requests come one at a time, a pass that is expected to take no longer runs on the event loop's
            own thread: two hand-overs less, and nobody else there who would wait. 0 = never.
        bulk_share: the least part of the time that bulk work gets while interactive work is waiting too.
        on_batch: called on the event loop after each forward pass.

    Attributes:
        latency: what forward passes take, as learned so far.
        counters: what has happened so far; written by the event loop only.
    """

    def __init__(
        self,
        served: Computes,
        *,
        max_batch_tokens: int | None = None,
        max_batch_sequences: int | None = None,
        max_queue_tokens: int | None = None,
        target_p99_ms: float | None = None,
        lone_s: float = 0.0,
        bulk_share: float = 0.2,
        on_batch: Callable[[BatchReport], None] | None = None,
    ) -> None:
        max_batch_tokens = served.batch_tokens if max_batch_tokens is None else max_batch_tokens
        max_queue_tokens = _QUEUE_BATCHES * max_batch_tokens if max_queue_tokens is None else max_queue_tokens
        for name, value in (
            ("max_batch_tokens", max_batch_tokens),
            ("max_batch_sequences", max_batch_sequences),
            ("max_queue_tokens", max_queue_tokens),
            ("target_p99_ms", target_p99_ms),
        ):
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        self.served = served
        self.max_batch_tokens = max_batch_tokens
        self.max_batch_sequences = max_batch_sequences
        self.max_queue_tokens = max_queue_tokens
        self.target_p99_ms = target_p99_ms
        self.lone_s = lone_s
        self.on_batch = on_batch
        self.latency = LatencyModel()
        self.counters = Counters()
        self._passes = Passes(served, self.latency)
        self._lanes = Lanes(bulk_share)
        self._crew = Crew(
            served.passes_at_once, self._lanes, self.latency, lambda: self.batch_tokens, max_batch_sequences
        )
        self._live: set[Request] = set()
        self._deadlines = Deadlines(self._live, lambda request: self._settle(request, request.too_late()))
        self._solo = Solo()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining = False
        self._threads = [
            threading.Thread(target=self._run, args=(number,), name=f"fastbert-compute-{number}", daemon=True)
            for number in range(served.passes_at_once)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def queue_tokens(self) -> int:
        """Tokens that wait."""
        return self._lanes.tokens

    @property
    def queue_requests(self) -> int:
        """Requests of which something waits."""
        return len(self._lanes)

    @property
    def oldest_s(self) -> float:
        """How long the oldest of them has been waiting."""
        with self._crew.lock:
            return max((monotonic() - request.arrived for request in self._lanes), default=0.0)

    @property
    def batch_tokens(self) -> int:
        """Tokens that a forward pass may have now: the budget, or less where latency or memory ask for it."""
        tokens: float = min(self.max_batch_tokens, self._passes.memory_tokens)
        if self.target_p99_ms is not None and self.latency.is_fitted:
            # A request that just misses a pass waits for it, and then for its own.
            tokens = min(tokens, self.latency.tokens_within(self.target_p99_ms / 2e3))
        return max(1, int(tokens))

    def drain_s(self) -> float:
        """Seconds in which all that waits will be computed, as predicted."""
        passes = -(-self._lanes.tokens // self.batch_tokens)
        waiting = passes * self.latency.coefficients[0] + self.latency.marginal(self._lanes.tokens, self._lanes.squares)
        ends = [running.until for running in list(self._crew.under_way.values())]
        return waiting + max(0.0, max(ends, default=0.0) - monotonic())

    async def submit(self, work: Work) -> Done:
        """Compute work. A task that is cancelled takes its work back: what is in no forward pass yet is not computed.

        Raises:
            Overloaded: it does not fit into the queue.
            DeadlineExceeded: the deadline passed before the result was there.
            NonFinite: NaN or infinity came out.
            ComputeFailed: the forward pass raised, or memory does not suffice for one sequence alone.
            Draining: the batcher takes nothing more.
            ValueError: the model does not compute this output, or not for so long a sequence.
        """
        if work.output not in self.served.outputs:
            raise ValueError(f"output {work.output!r} is not one of {', '.join(sorted(self.served.outputs))}")
        loop = asyncio.get_running_loop()
        request = Request(work, loop.create_future(), monotonic())
        if max(request.lengths) > self.served.max_length:
            raise ValueError(f"an input has {max(request.lengths)} tokens, the model takes {self.served.max_length}")
        if work.deadline is not None and work.deadline <= request.arrived:
            self.counters.deadline_exceeded += 1
            raise request.too_late()
        if self._is_lone(request):
            return self._compute_here(request, loop)
        self._admit(request, loop)
        self._deadlines.watch(work.deadline, loop)
        try:
            return await request.future
        except asyncio.CancelledError:
            self.counters.cancelled += 1
            raise
        finally:
            self._live.discard(request)
            if request.waits:
                with self._crew.lock:
                    self._lanes.remove(request)

    def _is_lone(self, request: Request) -> bool:
        self._solo.arrived(request.work.connection, bool(self._live))
        if not self._solo.is_steady or self._crew.under_way or self._draining or request.tokens > self.batch_tokens:
            return False
        if self.max_batch_sequences is not None and len(request.lengths) > self.max_batch_sequences:
            return False
        seconds = self.latency.predict(*request.waiting())
        return seconds <= min(self.lone_s, (request.work.deadline or float("inf")) - request.arrived)

    def _compute_here(self, request: Request, loop: asyncio.AbstractEventLoop) -> Done:
        outcome = self._passes.run([(request, i) for i in range(len(request.lengths))])  # the threads are idle
        for settled, error in outcome.settled:
            self._settle(settled, error)
        loop.call_soon(self._note_lone, request, outcome)  # when the answer is on its way
        return request.future.result()

    def _note_lone(self, request: Request, outcome: Outcome) -> None:
        self._crew.pace.arrived(request.arrived)
        self._crew.pace.answered(1, request.tokens, self.latency, monotonic())
        self._note(outcome)
        if self._solo.is_sample:
            self._passes.learn(outcome.reports)

    def _admit(self, request: Request, loop: asyncio.AbstractEventLoop) -> None:
        if self._live and loop is not self._loop:
            raise RuntimeError("a batcher belongs to one event loop at a time, but work of another one is under way")
        self._loop = loop
        with self._crew.lock:
            if self._draining:
                raise Draining("the server is shutting down and accepts no more work")
            waiting = self._lanes.tokens
            if waiting and waiting + request.tokens > self.max_queue_tokens:
                self.counters.overloaded += 1
                raise Overloaded(self.drain_s(), request.tokens, waiting, self.max_queue_tokens)
            self._crew.pace.arrived(request.arrived)
            self._lanes.add(request, self.latency)
            self._live.add(request)
            self._crew.wake()

    def _settle(self, request: Request, error: WorkError | None) -> None:
        """Give a request its result, on the event loop; the first one counts."""
        if request.future.done():
            return
        if error is None:
            request.future.set_result(request.done())
            return
        self.counters.failure(error)
        request.future.set_exception(error)

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Accept no more, finish what was accepted, stop the threads, which in native code would abort a process's end.

        Returns:
            Whether all was finished within `timeout_s`; what was not fails with `Draining`.
        """
        end = None if timeout_s is None else monotonic() + timeout_s
        with self._crew.lock:
            self._draining = True
        late: set[asyncio.Future[Done]] = set()
        if self._live:
            _, late = await asyncio.wait([request.future for request in self._live], timeout=timeout_s)
        self.close()
        for thread in self._threads:
            await asyncio.to_thread(thread.join, None if end is None else max(0.0, end - monotonic()))
        return not late

    def close(self) -> None:
        """Stop at once: what waits fails with `Draining`; a forward pass under way is not waited for."""
        with self._crew.lock:
            self._draining = True
            self._crew.close()
        self._deadlines.close()
        for request in list(self._live):
            self._settle(request, Draining("the server shut down before this was computed"))

    async def warm_up(self) -> None:
        """Compute the shapes that will come, from one short sequence to a full batch, and learn what they take.

        Nobody asked for them: they are not counted.
        """
        on_batch, self.on_batch = self.on_batch, None
        output = next(output for output in OUTPUTS if output in self.served.outputs)
        longest = self.served.max_length
        lengths = sorted({min(length, longest) for length in (8, 32, 128, longest)})
        counts = [(length, 1) for length in lengths for _ in range(2)]
        for length, count in [*counts, (min(128, longest), max(1, self.max_batch_tokens // min(128, longest)))]:
            await self.submit(Work([[0] * length] * count, output=output))
        self.on_batch, self.counters = on_batch, Counters()

    # On the compute threads.

    def _run(self, number: int) -> None:
        while True:
            with self._crew.lock:
                found = self._crew.next(number)
            if found is None:
                return
            batch, share = found
            outcome = self._passes.run(batch.parts, share)
            outcome.settled += [(request, request.too_late()) for request in batch.expired]
            with self._crew.lock:
                for request, error in outcome.settled:
                    if error is not None:  # what else it has waiting is not computed
                        self._lanes.remove(request)
                tokens = sum(request.tokens for request, _ in outcome.settled)
                self._crew.ended(number, len(outcome.settled), tokens)
            self._hand_over(outcome)

    def _hand_over(self, outcome: Outcome) -> None:
        """Cross to the event loop, once for the whole batch."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._deliver, outcome, self._loop)
        except RuntimeError:  # the loop is closed: nobody waits any more
            if not self._loop.is_closed():
                raise

    def _deliver(self, outcome: Outcome, loop: asyncio.AbstractEventLoop) -> None:
        for request, error in outcome.settled:
            self._settle(request, error)
        self._note(outcome)
        loop.call_soon(self._passes.learn, outcome.reports)  # behind those who now have their result

    def _note(self, outcome: Outcome) -> None:
        self.counters.add(outcome)
        if self.on_batch is not None:
            for report in outcome.reports:
                self.on_batch(report)
