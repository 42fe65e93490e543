"""Threads that turn texts into rows of tokens; small requests that wait together go into one call of the tokenizer."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastbert.tokenizer import Text

_TEXTS, _CHARACTERS = 64, 1 << 15  # of one call

Row = tuple[list[int], list[int] | None, bool]  # ids, segment ids or None for all 0, whether it was cut
Work = Callable[[Sequence[Text]], list[Row]]


@dataclass(eq=False)
class _Job:
    texts: Sequence[Text]
    work: Work
    future: asyncio.Future[list[Row]]
    characters: int


class Jobs:
    """A queue of texts and the threads that work on it. `run` belongs to an event loop."""

    def __init__(self, workers: int) -> None:
        self._waiting: deque[_Job] = deque()
        self._ready = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"fastbert-tokenizer-{i}", daemon=True) for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    async def run(self, texts: Sequence[Text], work: Work) -> list[Row]:
        """`work(texts)`, in parts and on several threads where there are many. Equal works share calls.

        Raises:
            Exception: the first that `work` raised; what else waits for this call is then dropped.
        """
        loop = asyncio.get_running_loop()
        jobs = [_Job(part, work, loop.create_future(), sum(map(characters, part))) for part in _parts(texts)]
        with self._ready:
            self._waiting.extend(jobs)
            self._ready.notify(len(jobs))
        try:
            return [row for rows in await asyncio.gather(*(job.future for job in jobs)) for row in rows]
        finally:
            for job in jobs:
                job.future.cancel()

    def close(self) -> None:
        """Stop the threads and wait for them; what waits is still done, where somebody wants it."""
        with self._ready:
            self._closed = True
            self._ready.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._ready:
                while not self._waiting and not self._closed:
                    self._ready.wait()
                if not self._waiting:
                    return
                jobs = self._together()
            results = _results(jobs)
            for loop in {job.future.get_loop() for job in jobs}:
                mine = [(j.future, r) for j, r in zip(jobs, results, strict=True) if j.future.get_loop() is loop]
                try:
                    loop.call_soon_threadsafe(_deliver, mine)
                except RuntimeError:  # the loop is closed: nobody waits any more
                    if not loop.is_closed():
                        raise

    def _together(self) -> list[_Job]:
        """The next job, and those behind it that the same call can take along. The lock is held."""
        jobs = [self._waiting.popleft()]
        texts, length = len(jobs[0].texts), jobs[0].characters
        while self._waiting and self._waiting[0].work == jobs[0].work:
            texts += len(self._waiting[0].texts)
            length += self._waiting[0].characters
            if texts > _TEXTS or length > _CHARACTERS:
                break
            jobs.append(self._waiting.popleft())
        return [job for job in jobs if not job.future.done()]


def _results(jobs: Sequence[_Job]) -> list[list[Row] | Exception]:
    """What became of each job; one that fails does not fail those that shared its call."""
    if not jobs:
        return []
    try:
        rows = iter(jobs[0].work([text for job in jobs for text in job.texts]))
        return [[next(rows) for _ in job.texts] for job in jobs]
    except Exception as error:
        return [error] if len(jobs) == 1 else [_results([job])[0] for job in jobs]


def _deliver(settled: Sequence[tuple[asyncio.Future[list[Row]], list[Row] | Exception]]) -> None:
    for future, result in settled:
        if future.done():
            continue
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)


def _parts(texts: Sequence[Text]) -> list[Sequence[Text]]:
    """Consecutive texts, as many as one call takes."""
    parts: list[Sequence[Text]] = []
    start = length = 0
    for i, text in enumerate(texts):
        length += characters(text)
        if i > start and (i - start >= _TEXTS or length > _CHARACTERS):
            parts.append(texts[start:i])
            start, length = i, characters(text)
    return [*parts, texts[start:]] if len(texts) > start else parts


def characters(text: Text) -> int:
    """Characters of a text or pair."""
    return len(text) if isinstance(text, str) else len(text[0]) + len(text[1])
