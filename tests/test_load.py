"""The load generator against a server whose every move is known: who waits is counted, and who is turned away."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import load, servers
from benchmarks.server import Work, overload
from benchmarks.soak import MAX_GROWTH_MB, Slope, lines_of_requests

Answer = Callable[[int], "tuple[int, bytes, float] | None"]


@contextmanager
def scripted(answer: Answer) -> Iterator[int]:
    """A server on a free port: `answer(n)` of the n-th request is (status, body, seconds to wait), None = hang up."""
    count = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                count += 1
                made = answer(count - 1)
                if made is None:
                    break
                status, body, wait = made
                await asyncio.sleep(wait)
                writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(body)) + body)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


REQUEST = load.post("/x", b"{}")


def test_who_waits_for_a_stalled_server_is_counted_from_when_due():
    stalled = 0.5
    with scripted(lambda n: (200, b"ok", stalled if n == 10 else 0.0)) as port:
        answers = load.run(load.Plan(port, [REQUEST], clients=1, seconds=0.7, rate=100))
    latencies = answers.latencies_ms()
    assert answers.count(200) == len(answers.status) > 20
    # Dozens fell due during the stall. Counted from when each was sent, only one would have waited for long.
    assert np.count_nonzero(latencies > 250) > 10
    assert latencies.max() >= 1e3 * stalled


def test_each_status_is_counted_and_each_different_body_kept():
    bodies = [b"one", b"two", b"two"]
    with scripted(lambda n: (429, b"", 0.0) if n % 2 else (200, bodies[n // 2 % 3], 0.0)) as port:
        answers = load.run(load.Plan(port, [REQUEST], clients=1, seconds=0.3, rate=100))
    assert answers.count(200) + answers.count(429) == len(answers.status)
    assert answers.count(200) - answers.count(429) in (0, 1)
    assert set(answers.bodies.values()) == {b"one", b"two"}
    assert len(answers.latencies_ms()) == answers.count(200)


def test_a_server_that_hangs_up_loses_requests_and_the_client_connects_anew():
    with scripted(lambda n: None if n % 3 == 2 else (200, b"ok", 0.0)) as port:
        answers = load.run(load.Plan(port, [REQUEST], clients=2, seconds=0.3, rate=100))
    assert answers.count(load.LOST) == len(answers.status) // 3
    assert answers.count(200) == len(answers.status) - answers.count(load.LOST)


def test_a_server_that_never_answers_is_not_waited_for():
    with scripted(lambda n: (200, b"ok", 0.0 if n < 5 else 3600.0)) as port:
        answers = load.run(load.Plan(port, [REQUEST], clients=2, seconds=0.3, rate=100, patience_s=0.2))
    assert answers.count(200) == 5
    assert answers.count(load.HUNG) == 2
    assert answers.count(load.UNSENT) == len(answers.status) - 7 > 5


def test_nobody_there():
    with scripted(lambda n: None) as port:
        pass
    answers = load.run(load.Plan(port, [REQUEST], clients=2, seconds=0.2, rate=50, patience_s=0.2))
    assert set(answers.status) == {load.UNSENT}


def test_without_a_rate_every_client_always_has_one_request_out():
    at_once = 0
    most = 0

    def answer(n: int) -> tuple[int, bytes, float]:
        return 200, b"%d" % n, 0.02

    with scripted(answer) as port:
        answers = load.offer(load.Plan(port, [REQUEST, REQUEST], clients=4, seconds=0.4))
    spans = sorted([(due, 1) for due in answers.due] + [(done, -1) for done in answers.done])
    for _, step in spans:
        at_once += step
        most = max(most, at_once)
    assert most == 4
    assert set(answers.request) == {0, 1}
    assert answers.rate(0.1, 0.4) == pytest.approx(sum(0.1 <= done < 0.4 for done in answers.done) / 0.3)


def body_of(vectors: np.ndarray) -> bytes:
    rows = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors]
    return json.dumps({"data": [{"index": i, "embedding": row} for i, row in enumerate(rows)]}).encode()


RIGHT = np.eye(2, 8, dtype=np.float32)
WORK = Work([["a", "b"]], [RIGHT])


@pytest.mark.parametrize(
    ("status", "body", "fault"),
    [
        (200, body_of(RIGHT), None),
        (429, b"", None),
        (200, body_of(RIGHT[::-1]), "cosine"),  # another's vectors
        (200, body_of(RIGHT * np.nan), "cosine"),
        (200, body_of(RIGHT[:1]), "shape"),
        (500, b"", "got 500"),
        (load.LOST, b"", "got -2"),
    ],
)
def test_every_answer_is_right_or_429_or_a_failure(status, body, fault):
    answers = load.Answers([0], [0.0], [0.1], [status], [b"d"], {(0, b"d"): body} if status == 200 else {})
    found = WORK.failures(answers)
    assert (found == []) if fault is None else (len(found) == 1 and fault in found[0])


def as_server(port: int) -> servers.Server:
    """Somebody else's port as a server; its memory is this process's."""
    return servers.Server("fastbert", "/x", port, SimpleNamespace(pid=os.getpid()), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("vectors", [RIGHT, RIGHT[::-1]], ids=["right", "wrong"])
def test_overload_wants_right_answers_or_429(vectors):
    room = 4

    def answer(n: int) -> tuple[int, bytes, float]:
        return (200, body_of(RIGHT), 0.02) if n % 20 < room or n < 30 else (429, b"", 0.0)

    def spoilt(n: int) -> tuple[int, bytes, float]:
        return answer(n) if n != 150 else (200, body_of(vectors), 0.0)

    with scripted(spoilt) as port:
        if vectors is RIGHT:
            row = overload(WORK, "query", as_server(port), 1.0, times=3.0, calm_s=0.2)
            assert row.turned_away > 0
            assert row.right > 0
            assert row.answers == row.right + row.turned_away
        else:
            with pytest.raises(AssertionError, match="neither right nor 429"):
                overload(WORK, "query", as_server(port), 1.0, times=3.0, calm_s=0.2)


def test_a_leak_is_told_from_noise():
    minutes = np.linspace(0, 10, 300)
    noise = np.random.default_rng(0).normal(0, 2.0, 300)
    steps = 6.0 * (minutes > 3)  # a pool that grew once
    assert Slope.fit(minutes, 400 + noise).flat()
    assert Slope.fit(minutes, 400 + noise + steps).flat()
    leak = Slope.fit(minutes, 400 + noise + 2.0 * minutes)
    assert leak.growth_mb == pytest.approx(20, abs=2)
    assert leak.growth_mb > MAX_GROWTH_MB
    assert not leak.flat()


def test_the_servers_log_is_counted():
    lines = [
        '{"path": "/x", "status": 200}',
        '{"path": "/x", "status": 429}',
        '{"path": "/ready", "status": 200}',
        "text",
    ]
    assert dict(lines_of_requests("\n".join([*lines, lines[0]]), "/x")) == {200: 2, 429: 1}
