"""The express lane of a connection: plain requests take it, and every other one is answered as without it."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from contextlib import closing

import pytest

from fastbert.serve.connection import Connection
from fastbert.serve.express import Heads, Run
from tests.serving import live

NAME = "model"
KEY = "x-api-key: right"


@pytest.fixture(scope="module")
def server(minilm):
    with live({NAME: minilm}, "right", warmup=False, payload_limit=4000) as found:
        yield found


@pytest.fixture
def taken(monkeypatch):
    """Bodies that went the express way."""
    bodies = []
    begin = Connection._begin

    def seen(self, known, body):
        bodies.append(body)
        begin(self, known, body)

    monkeypatch.setattr(Connection, "_begin", seen)
    return bodies


def connect(server):
    return socket.create_connection(("127.0.0.1", int(server.address.rsplit(":", 1)[1])), timeout=20)


def request(body, *lines, path="/embed", version="1.1"):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = [f"POST {path} HTTP/{version}", "host: x", "content-type: application/json", *lines]
    return "\r\n".join([*head, f"content-length: {len(body)}", "", ""]).encode() + body


def answers(connection, count):
    """(status, head, body) of the next answers."""
    received, found = b"", []
    while len(found) < count:
        piece = connection.recv(1 << 16)
        assert piece, "closed too early"
        received += piece
        while (end := received.find(b"\r\n\r\n")) >= 0:
            head = received[:end]
            length = int(re.search(rb"content-length: (\d+)", head)[1])
            if len(received) < end + 4 + length:
                break
            found.append((int(head[9:12]), head, received[end + 4 : end + 4 + length]))
            received = received[end + 4 + length :]
    assert not received, "more than was asked for"
    return found


def ask(connection, *requests):
    """Each sent by itself, after the answer to the one before."""
    found = []
    for sent in requests:
        connection.sendall(sent)
        found += answers(connection, 1)
    return found


PLAIN = request({"inputs": "a small ferry"}, KEY)


def test_a_plain_request_takes_it_and_has_the_same_answer(server, taken):
    new = PLAIN.replace(b"host: x", b"host: new")
    with closing(connect(server)) as connection:
        first, second = ask(connection, new, new)
    assert taken == [PLAIN.split(b"\r\n\r\n")[1]]
    assert (first[0], first[2]) == (second[0], second[2]) == (200, first[2])
    names = [re.findall(rb"\r\n([a-z-]+): ", head) for _, head, _ in (first, second)]
    assert names[0] == names[1]
    assert {b"date", b"x-request-id", b"server-timing", b"x-compute-tokens"} <= set(names[0])


def test_a_server_that_remembers_nothing_would_be_seen(server, taken, monkeypatch):
    monkeypatch.setattr(Heads, "find", lambda self, data: None)
    with closing(connect(server)) as connection:
        assert [status for status, *_ in ask(connection, PLAIN, PLAIN)] == [200, 200]
    assert taken == []


def test_what_one_client_sent_another_may_send(server, taken):
    with closing(connect(server)) as one, closing(connect(server)) as two:
        expected = ask(one, PLAIN, PLAIN)[1][2]
        del taken[:]
        assert ask(two, PLAIN)[0][2] == expected
    assert len(taken) == 1


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (request({"inputs": "a"}), 401),
        (request({"inputs": "a"}, "x-api-key: wrong"), 401),
        (request(b'{"inputs": ', KEY), 400),
        (request({"inputs": 7}, KEY), 422),
        (request({"inputs": ""}, KEY), 400),
        (request({"inputs": "a"}, KEY, "x-deadline-ms: soon"), 422),
        (request({"input": "a", "model": NAME}, KEY, path="/v1/embeddings"), 200),
    ],
)
def test_errors_are_the_same(server, taken, sent, status):
    with closing(connect(server)) as connection:
        found = ask(connection, sent, sent, PLAIN)
    assert [row[0] for row in found] == [status, status, 200]
    assert found[0][2] == found[1][2]
    assert len(taken) >= 1, "the second went the express way"


@pytest.mark.parametrize(
    "sent",
    [
        request({"inputs": "a" * 5000}, KEY),
        request({"inputs": "a"}, KEY, path="/nowhere"),
        request({"inputs": "a"}, KEY, "expect: 100-continue"),
        request({"inputs": "a"}, KEY, "connection: keep-alive"),
        request({"inputs": "a"}, KEY, "x-padding: " + "x" * 3000),
        PLAIN.replace(b"POST /embed", b"GET /health", 1),
    ],
)
def test_what_is_not_plain_goes_the_usual_way(server, taken, sent):
    for _ in range(2):
        with closing(connect(server)) as connection:
            connection.sendall(sent)
            received = connection.recv(1 << 16)
        assert received.startswith(b"HTTP/1.1 ")
    assert taken == []


def test_pieces_and_several_at_once(server, taken):
    longer = request({"inputs": "a ferry"}, KEY)
    with closing(connect(server)) as connection:
        expected = [ask(connection, sent, sent)[1][2] for sent in (PLAIN, longer)]
        del taken[:]
        connection.sendall(PLAIN + longer + PLAIN)
        assert [body for *_, body in answers(connection, 3)] == [expected[0], expected[1], expected[0]]
        for cut in (1, 20, PLAIN.find(b"\r\n\r\n") + 4, len(PLAIN) - 1):
            connection.sendall(PLAIN[:cut])
            time.sleep(0.05)
            connection.sendall(PLAIN[cut:])
            assert answers(connection, 1)[0][2] == expected[0]
        assert taken == []
        assert ask(connection, PLAIN)[0][2] == expected[0]
        assert len(taken) == 1


def test_a_known_head_within_another_request_is_none(server, taken):
    with closing(connect(server)) as connection:
        ask(connection, PLAIN, PLAIN)
        del taken[:]
        for before in (b"POST /decode HTTP/1.1\r\nx-a: ", request(b"x" * len(PLAIN), KEY)[: -len(PLAIN)]):
            connection.sendall(before)
            time.sleep(0.05)
            connection.sendall(PLAIN)
            ((status, *_),) = answers(connection, 1)
            assert status in (400, 422), "not the vectors of a request of its own"
    assert taken == []


def test_empty_lines_are_no_request(server, taken):
    with closing(connect(server)) as connection:
        expected = ask(connection, PLAIN, PLAIN)[1][2]
        ask(connection, request(b"", KEY))
        for _ in range(2):
            connection.sendall(b"\r\n\r\n")
            time.sleep(0.05)
        assert ask(connection, b"\r\n" + PLAIN, PLAIN)[0][2] == expected
        connection.sendall(b"\0\0\r\n\r\n")
        assert answers(connection, 1)[0][0] == 400


def test_while_the_server_drains_the_connection_ends(server, taken, monkeypatch):
    with closing(connect(server)) as connection:
        ask(connection, PLAIN, PLAIN)
        del taken[:]
        monkeypatch.setattr(server.state, "phase", "draining")
        ((status, head, _),) = ask(connection, PLAIN)
        assert (status, b"connection: close" in head) == (200, True)
        assert connection.recv(100) == b""
    assert len(taken) == 1


def test_who_leaves_takes_the_work_along(server, taken, monkeypatch):
    (model,) = server.state.models
    waiting, left = threading.Event(), threading.Event()

    async def endless(work):
        waiting.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            left.set()
            raise

    before = server.state.series.cancelled.values[()]
    with closing(connect(server)) as connection:
        ask(connection, PLAIN, PLAIN)
        del taken[:]
        monkeypatch.setattr(model, "submit", endless)
        connection.sendall(PLAIN)
        assert waiting.wait(20)
    assert left.wait(20)
    end = time.monotonic() + 20
    while (server.state.inflight or server.server_state.tasks) and time.monotonic() < end:
        time.sleep(0.01)
    assert server.state.series.cancelled.values[()] == before + 1
    assert (server.state.inflight, len(server.server_state.tasks), len(taken)) == (0, 0, 1)


def test_a_failure_is_an_answer(server, taken, monkeypatch):
    with closing(connect(server)) as connection:
        ask(connection, PLAIN, PLAIN)
        del taken[:]

        async def broken(work):
            raise KeyError("a defect")

        monkeypatch.setattr(server.state.models[0], "submit", broken)
        ((status, _, body),) = ask(connection, PLAIN)
    assert (status, b"KeyError" in body, b"a defect" in body, len(taken)) == (500, True, False, 1)


def test_heads_are_not_kept_for_ever(server, monkeypatch):
    monkeypatch.setattr("fastbert.serve.express._MOST", 3)
    with closing(connect(server)) as connection:
        ask(connection, PLAIN)
        heads = next(iter(server.server_state.connections)).heads
        for number in range(8):
            ask(connection, request({"inputs": "a"}, KEY, f"x-number: {number}"))
            assert 1 <= len(heads._known) <= 3


def test_heads_that_name_their_request_are_not_kept_at_all(server, taken):
    with closing(connect(server)) as connection:
        for name in ("x-request-id", "traceparent"):
            named = request({"inputs": "a"}, KEY, f"{name}: 7")
            ask(connection, named)
            ((status, head, _),) = ask(connection, named)
            assert (status, taken) == (200, [])
            assert head.count(b"x-request-id: 7") == (name == "x-request-id")


def test_an_idle_connection_ends_and_a_busy_one_does_not(minilm):
    with live({NAME: minilm}, "right", warmup=False, keep_alive_s=1) as server, closing(connect(server)) as connection:
        for _ in range(4):
            ask(connection, PLAIN)
            time.sleep(0.6)
        answered = time.monotonic()
        ask(connection, PLAIN)
        assert connection.recv(100) == b""
        assert 0.8 < time.monotonic() - answered < 10


# A run beside the task of asyncio that it stands for


def _both(coroutine):
    """What a coroutine function leaves behind, run by a task and by a run; both are cancelled after `act`."""

    async def by(start):
        trace = []
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        running = start(coroutine(trace, future))
        for action in ("look", "set", "look", "cancel", "look"):
            if action == "set" and not future.done():
                future.set_result("value")
            elif action == "cancel":
                trace.append(("cancel", running.cancel()))
            for _ in range(4):
                await asyncio.sleep(0)
            trace.append((action, running.done()))
        return trace

    def run(coroutine):
        found = Run(coroutine, set())
        found.step()
        return found

    return asyncio.run(by(asyncio.ensure_future)), asyncio.run(by(run))


async def _plain(trace, future):
    trace.append(await future)


async def _at_once(trace, future):
    trace.append("done")


async def _stubborn(trace, future):
    await future
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        trace.append("cancelled")
    await asyncio.sleep(0)
    trace.append("after")


async def _gathered(trace, future):
    async def wait(value):
        trace.append((value, await future))

    await asyncio.gather(wait(1), wait(2))


@pytest.mark.parametrize("coroutine", [_plain, _at_once, _stubborn, _gathered])
def test_a_run_goes_as_a_task(coroutine):
    by_task, by_run = _both(coroutine)
    assert by_run == by_task
