"""Providers in processes of their own, of which one runs at a time.

Whoever has no turn is stopped: libraries keep their threads awake after a call, each as long as it likes, and would
take the cores from the next one. In its turn a provider first warms up, then its calls are timed in its own process.
"""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from multiprocessing.connection import Connection
from typing import Any

from benchmarks import harness

Call = Callable[[Any], Any]
PR_SET_PDEATHSIG = 1
LEAVE_S = 10.0  # for a provider to end by itself


class Failed(RuntimeError):
    """A provider that does not load or run here; the message is its own error."""


class Provider:
    """One provider in its process: `make(*arguments)` there gives the function that it is called for.

    Args:
        compiles: whether a new process needs a call of each kind before its time counts.

    Raises:
        Failed: it does not load.
    """

    def __init__(self, name: str, make: Callable[..., Call], *arguments: Any, compiles: bool = True) -> None:
        methods = multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:  # imported once, before any thread runs; and the server itself follows us
            context.set_forkserver_preload(["benchmarks.follow", "benchmarks.providers", "transformers"])
        self.name = name
        self.compiles = compiles
        self.started_s = math.nan  # how long the last start took
        self._start = partial(self._started, context, make, arguments)
        self._start()

    def _started(self, context: Any, make: Callable[..., Call], arguments: tuple[Any, ...]) -> None:
        start = time.perf_counter()
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True, name=self.name)
        self.process.start()
        theirs.close()
        try:
            self._answer()
        except Failed:
            self.close()
            raise
        self.started_s = time.perf_counter() - start
        self._send_signal("SIGSTOP")

    def call(self, given: Any) -> Any:
        """What its function returns."""
        return self._turn(given)

    def time(self, cell: Cell) -> float:
        """Milliseconds of a call: the median of as many as fill the cell's `least_ms`, after those that warm up."""
        return self._turn(cell.given, (cell.warm, cell.warm_ms, cell.least_ms))

    def restart(self) -> None:
        """A new process: where its memory lies is drawn anew. One of ours was a fifth slower on short texts.

        Raises:
            Failed: it does not load again.
        """
        self.close()
        self._start()

    def close(self) -> None:
        """End the process."""
        self._send_signal("SIGCONT")
        self.connection.close()
        self.process.join(LEAVE_S)
        self.process.kill()
        self.process.join()

    def __enter__(self) -> Provider:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _turn(self, given: Any, timing: tuple[Any, float, float] | None = None) -> Any:
        self._send_signal("SIGCONT")
        self.connection.send((given, timing))
        answer = self._answer()
        self._send_signal("SIGSTOP")
        return answer

    def _answer(self) -> Any:
        try:
            answer = self.connection.recv()
        except EOFError:
            self.process.join()
            raise Failed(f"its process ended with {self.process.exitcode}") from None
        if isinstance(answer, Failed):
            raise answer
        return answer

    def _send_signal(self, name: str) -> None:
        if hasattr(signal, name) and self.process.is_alive():  # Windows has no such signals: there all stay awake
            os.kill(self.process.pid, getattr(signal, name))


def follow_parent() -> None:
    """Have the system kill this process when its parent is gone, even while it is stopped. Forks do not inherit it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _serve(connection: Connection, make: Callable[..., Call], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    follow_parent()
    for stream in (1, 2):  # progress bars and advice of libraries; what goes wrong is an answer
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)

    def answer(function: Callable[[], Any]) -> Any:
        try:
            result = function()
        except Exception as error:
            result = Failed(f"{type(error).__name__}: {error}")
        connection.send(result if not callable(result) else None)
        return result

    call = answer(lambda: make(*arguments))
    while not isinstance(call, Failed):
        try:
            given, timing = connection.recv()
        except EOFError:
            return  # the parent is gone
        answer(partial(_timed, call, given, *timing) if timing else partial(call, given))


def _timed(call: Call, given: Any, warm: Any, warm_ms: float, least_ms: float) -> float:
    _calls(call, warm, warm_ms)
    return statistics.median(_calls(call, given, least_ms))


def _calls(call: Call, given: Any, least_ms: float) -> list[float]:
    times: list[float] = []
    while sum(times) < least_ms:
        start = time.perf_counter()
        call(given)
        times.append(1e3 * (time.perf_counter() - start))
    return times


@dataclass(frozen=True)
class Cell:
    """What providers are timed on in turns.

    Attributes:
        given: to each call.
        providers: those that may.
        warm: given to the calls before the clock starts.
        share: of the run's time, beside the other cells' shares.
        warm_ms: of calls before the clock starts: threads awake, weights in the caches.
        least_ms: of calls that make one sample, their median: neither the clock nor one interruption decides.
    """

    given: Any
    providers: Sequence[Provider]
    warm: Any
    share: float = 1.0
    warm_ms: float = 10.0
    least_ms: float = 40.0


Times = dict[str, list[float]]  # ms of the rounds, by provider
LEAST = 2  # rounds of a cell in each part


def take_turns(cells: Sequence[Cell], seconds: float, parts: int = 1) -> list[Times]:
    """Milliseconds a call of each cell's providers, one sample a round of the cell.

    Next is the cell that is furthest behind its share of the time, so that each is measured again and again until the
    end: a machine has slow minutes, which take some rounds of each cell instead of all rounds of one. (Ours has states
    of seconds in which what calls much code takes up to twice as long, and a loop no longer.) Whom one follows is drawn
    anew in each round.

    Args:
        seconds: for all together, with the starts between parts; beyond them only for `LEAST` rounds a part.
        parts: of the same rounds; between them every provider gets a new process.

    Raises:
        Failed: a provider does not load again.
    """
    begun = time.perf_counter()
    providers = {provider.name: provider for cell in cells for provider in cell.providers}
    times: list[Times] = [{p.name: [] for p in cell.providers} for cell in cells]
    costs: list[list[float]] = [[] for _ in cells]  # seconds of the rounds
    rng = random.Random(0)

    def a_round(i: int) -> None:
        start = time.perf_counter()
        for provider in rng.sample(cells[i].providers, len(cells[i].providers)):
            times[i][provider.name].append(provider.time(cells[i]))
        costs[i].append(time.perf_counter() - start)

    def owed(i: int) -> int:
        return max(0, LEAST - len(costs[i]))

    order: list[int] = []
    restart = sum(provider.started_s for provider in providers.values()) / 2  # a second start converts nothing
    first = (seconds - (parts - 1) * restart) / parts
    with harness.progress("measuring") as progress:
        while True:
            behind = [i for i in range(len(cells)) if owed(i)]
            spent = time.perf_counter() - begun
            late = spent + sum(owed(i) * max(costs[i], default=0.0) for i in behind) >= first
            if late and not behind:
                break
            order.append(min(behind if late else range(len(cells)), key=lambda i: sum(costs[i]) / cells[i].share))
            a_round(order[-1])
            progress(min(1.0, spent / max(first, 1e-9)) / parts)
        for part in range(1, parts):
            for provider in providers.values():
                provider.restart()
            for cell in cells:
                for provider in cell.providers:
                    if provider.compiles:
                        provider.call(cell.given)
            for number, i in enumerate(order):
                a_round(i)
                progress((part + (number + 1) / len(order)) / parts)
    return times


@dataclass(frozen=True)
class Suite:
    """What takes turns, alone or beside other suites.

    Attributes:
        cells: of the suite.
        seconds: of turns.
        parts: of the run.
        finish: given the samples of each cell, prints a table and writes rows.
    """

    cells: Sequence[Cell]
    seconds: float
    parts: int
    finish: Callable[[list[Times]], None]


Prepare = Callable[[Sequence[str], ExitStack], Suite]  # of options; providers end with the stack


def measure(told: Sequence[tuple[Prepare, Sequence[str]]], total: float = math.inf) -> None:
    """Suites whose rounds are mixed, so that each sees all of the machine's minutes; then what each makes of them.

    Args:
        total: seconds, with all that comes before the first turn; `LEAST` rounds a part are taken in any case.
    """
    begun = time.perf_counter()
    with ExitStack() as stack:
        suites = [prepare(options, stack) for prepare, options in told]
        cells = list(chain.from_iterable(suite.cells for suite in suites))
        seconds, parts = sum(suite.seconds for suite in suites), max(suite.parts for suite in suites)
        left = max(0.0, total - (time.perf_counter() - begun))
        found = iter(take_turns(cells, min(seconds, left), parts))
    for suite in suites:
        suite.finish(list(islice(found, len(suite.cells))))
