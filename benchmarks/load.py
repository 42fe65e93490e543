"""An open-loop HTTP load generator: requests fall due whether or not the server keeps up.

It knows HTTP/1.1 with keep-alive and nothing of models. Latency counts from the moment a request was due, so a server
that stalls is charged for all that waited meanwhile. `offer` runs in a process of its own, `python -m benchmarks.load`:
it shares no lock with whoever measures.
"""

from __future__ import annotations

import asyncio
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import cast

import numpy as np
import uvloop

# Instead of a status: never sent, no answer in time, closed without an answer, closed within one.
UNSENT, HUNG, LOST, PARTIAL = 0, -1, -2, -3


@dataclass(frozen=True)
class Plan:
    """What to send.

    Attributes:
        port: of the server on the loopback address.
        requests: whole requests, head and body, sent in turn.
        clients: connections; each carries one request at a time.
        seconds: requests fall due for so long.
        rate: requests that fall due in a second, Poisson; None = every client sends again as soon as it has its answer.
        patience_s: how long to wait for answers after the last request was due.
        seed: of the arrivals.
    """

    port: int
    requests: Sequence[bytes]
    clients: int
    seconds: float
    rate: float | None = None
    patience_s: float = 30.0
    seed: int = 0


@dataclass
class Answers:
    """What came back, one entry a request, in the order of completion. Times in seconds from the start.

    `cores` is how many cores the load generator kept busy, on average: what it took from a server on the same machine.
    """

    request: list[int] = field(default_factory=list)
    due: list[float] = field(default_factory=list)
    done: list[float] = field(default_factory=list)
    status: list[int] = field(default_factory=list)
    digest: list[bytes] = field(default_factory=list)
    bodies: dict[tuple[int, bytes], bytes] = field(default_factory=dict)  # each different 200 body of each request
    cores: float = 0.0

    def count(self, *statuses: int) -> int:
        """How many answers have one of the statuses."""
        return sum(status in statuses for status in self.status)

    def latencies_ms(self) -> np.ndarray:
        """Of the answers with status 200, from due to done."""
        ok = np.array(self.status) == 200
        return 1e3 * (np.array(self.done) - np.array(self.due))[ok]

    def rate(self, since_s: float, until_s: float) -> float:
        """Answers with status 200 a second, of those that came in a span of time."""
        came = [done for done, status in zip(self.done, self.status, strict=True) if status == 200]
        return sum(since_s <= done < until_s for done in came) / (until_s - since_s)


class _Connection(asyncio.Protocol):
    """One connection that carries one request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.waiting: asyncio.Future[tuple[int, bytes]] | None = None
        self.received = bytearray()
        self.expected = -1  # bytes of head and body, once the head is here

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name

    def data_received(self, data: bytes) -> None:
        self.received += data
        if self.expected < 0:
            end = self.received.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self.received[:end]).lower()
            if b"content-length:" not in head:
                raise ValueError(f"an answer without content-length: {head.decode('latin1')}")
            length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
            self.head_end, self.expected = end + 4, end + 4 + length
            self.last = b"connection: close" in head
        if len(self.received) >= self.expected and self.waiting is not None:
            status, body = int(self.received[9:12]), bytes(self.received[self.head_end : self.expected])
            self.received.clear()
            self.expected = -1
            self._finish(status, body)
            if self.last and self.transport is not None:
                self.transport.close()
                self.transport = None

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        self._finish(PARTIAL if self.received else LOST, b"")

    def _finish(self, status: int, body: bytes) -> None:
        waiting, self.waiting = self.waiting, None
        if waiting is not None and not waiting.done():
            waiting.set_result((status, body))

    def ask(self, request: bytes) -> asyncio.Future[tuple[int, bytes]]:
        """Send; the result is (status, body)."""
        assert self.transport is not None
        self.received.clear()
        self.expected = -1
        self.waiting = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self.waiting


class _Load:
    """One plan, run once."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.answers = Answers()
        self.queue: asyncio.Queue[tuple[int, float]] = asyncio.Queue()
        self.came: list[tuple[int, float, float, int, bytes]] = []  # answers that are not in `answers` yet
        self.sent = 0
        self.start = 0.0

    def now(self) -> float:
        return time.perf_counter() - self.start

    def next_request(self) -> int:
        self.sent += 1
        return (self.sent - 1) % len(self.plan.requests)

    async def arrive(self) -> None:
        """Let requests fall due, however long the queue is."""
        assert self.plan.rate is not None
        rng, due = random.Random(self.plan.seed), 0.0
        while (due := due + rng.expovariate(self.plan.rate)) < self.plan.seconds:
            if (early := due - self.now()) > 0:
                await asyncio.sleep(early)
            self.queue.put_nowait((self.next_request(), due))

    async def client(self, number: int) -> None:
        connection = _Connection()
        loop = asyncio.get_running_loop()
        while True:
            if self.plan.rate is not None:
                index, due = await self.queue.get()
            elif self.now() < self.plan.seconds:
                index, due = self.next_request(), self.now()
            else:
                return
            status, body = UNSENT, b""
            try:
                if connection.transport is None:
                    _, connection = await loop.create_connection(_Connection, "127.0.0.1", self.plan.port)
                status = HUNG
                answer = connection.ask(self.plan.requests[index])
                self.settle()  # while the server has something to do, which so waits for no bookkeeping of ours
                status, body = await answer
            except OSError:
                status = UNSENT
                await asyncio.sleep(0.05)  # refused: the server is gone or full; do not spin
            finally:
                self.record(index, due, status, body)
                if self.plan.rate is not None:
                    self.queue.task_done()

    def record(self, index: int, due: float, status: int, body: bytes) -> None:
        self.came.append((index, due, self.now(), status, body))

    def settle(self) -> None:
        """Put what came into `answers`."""
        answers, came = self.answers, self.came
        self.came = []
        for index, due, done, status, body in came:
            digest = blake2b(body, digest_size=8).digest()
            answers.request.append(index)
            answers.due.append(due)
            answers.done.append(done)
            answers.status.append(status)
            answers.digest.append(digest)
            if status == 200:
                answers.bodies.setdefault((index, digest), body)

    async def run(self) -> Answers:
        """All answers, when the last is here or patience is over."""
        self.start, cpu_s = time.perf_counter(), time.process_time()
        clients = [asyncio.create_task(self.client(i)) for i in range(self.plan.clients)]
        limit = self.plan.seconds + self.plan.patience_s
        if self.plan.rate is None:
            work: asyncio.Future[object] = asyncio.gather(*clients)
        else:
            await self.arrive()
            work = asyncio.ensure_future(self.queue.join())
        await asyncio.wait([work], timeout=max(0.1, limit - self.now()))
        self.answers.cores = (time.process_time() - cpu_s) / self.now()
        for task in (*clients, work):
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        while not self.queue.empty():  # due, and never sent
            index, due = self.queue.get_nowait()
            self.record(index, due, UNSENT, b"")
        self.settle()
        return self.answers


def run(plan: Plan) -> Answers:
    """Offer a plan's load from this process."""
    return uvloop.run(_Load(plan).run())


class Offer:
    """A plan's load, offered by a process of its own since the object exists."""

    def __init__(self, plan: Plan) -> None:
        command = [sys.executable, "-m", "benchmarks.load"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        pickle.dump(plan, self.process.stdin)
        self.process.stdin.close()
        if self.process.stdout.readline() != b"started\n":
            raise RuntimeError(f"the load generator ended with exit code {self.process.wait()}")

    def answers(self) -> Answers:
        """What came back; waits for the end of the plan."""
        assert self.process.stdout is not None
        answers = pickle.load(self.process.stdout)
        self.process.wait()
        return answers


def offer(plan: Plan) -> Answers:
    """Offer a plan's load from a process of its own, and wait for its end."""
    return Offer(plan).answers()


def post(path: str, body: bytes, content_type: str = "application/json") -> bytes:
    """A whole POST request."""
    head = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Type: {content_type}", f"Content-Length: {len(body)}"]
    return "\r\n".join([*head, "", ""]).encode("ascii") + body


if __name__ == "__main__":
    from benchmarks import load  # by this name the answers are pickled

    given = pickle.load(sys.stdin.buffer)
    # Not sys.stdout.buffer: under PYTHONUNBUFFERED it is the bare file, whose writes to a pipe may be cut short.
    with open(sys.stdout.fileno(), "wb") as out:
        out.write(b"started\n")
        out.flush()
        pickle.dump(load.run(given), out)
