"""`python -m benchmarks.fuzz`: thousands of strange requests. No answer may be 5xx, late or missing.

Half of them schemathesis makes from the server's own OpenAPI document; half are bytes that are not what they say they
are: broken JSON, broken HTTP. In between, an ordinary request must still get the vectors it got at first. Needs
`pip install schemathesis`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Any

import hypothesis
import requests
import schemathesis
from hypothesis import HealthCheck

from benchmarks import load, servers
from benchmarks.server import MODEL_NAME
from fastbert.hub import DEFAULT_MODEL, resolve

PATIENCE_S = 20.0
ROUTES = (
    "/embed", "/embed_all", "/rerank", "/similarity", "/tokenize", "/decode", "/predict", "/vertex", "/v1/embeddings",
    "/v1/rerank", "/v2/embed", "/v2/rerank",
)  # fmt: skip
SEEDS: tuple[dict[str, object], ...] = (
    {"inputs": "a text"}, {"inputs": ["a", "b"]}, {"inputs": [[101, 102]]}, {"input": ["a"], "model": "model"},
    {"query": "q", "texts": ["a", "b"]}, {"query": "q", "documents": ["a", {"text": "b"}], "top_n": 1},
    {"inputs": {"source_sentence": "a", "sentences": ["b"]}}, {"texts": ["a"], "embedding_types": ["int8"]},
    {"ids": [[101, 102]]}, {"instances": [{"inputs": "a"}]},
)  # fmt: skip
FIELDS = ("truncate", "dimensions", "normalize", "encoding_format", "parameters", "prompt_name", "model", "precision")
STRANGE = (
    None, True, -1, 0, 2**31, 2**63, 2**64, -(2**70), 1e308, 0.5, "", " ", "\x00", "\ud800", "\uffff", "a" * 100_000,
    "\u202e", "\U0001f3f3\ufe0f\u200d\U0001f308" * 500, [], {}, [[]], [[[]]], [None], [""], [1, "a"], ["a", 1], [{}],
    {"a": {}}, [0] * 5000, ["a"] * 5000,
)  # fmt: skip


class Tally:
    """What came back, and what must not have."""

    def __init__(self) -> None:
        self.statuses: Counter[object] = Counter()
        self.faults: list[str] = []
        self.slowest_s = 0.0

    def add(self, what: str, status: int | str, seconds: float) -> None:
        """Count one answer; `status` is a number, or what happened instead."""
        self.statuses[status] += 1
        self.slowest_s = max(self.slowest_s, seconds)
        asked_for = status == 504 and "x-deadline-ms" in what.lower()  # the request set itself a deadline
        if isinstance(status, int) and status >= 500 and not asked_for:
            self.faults.append(f"{status}: {what}")
        if status == "cut short":
            self.faults.append(f"the answer was cut short: {what}")
        if status == "hung" or seconds > PATIENCE_S:
            self.faults.append(f"no answer in {seconds:.1f} s: {what}")


def mutated_json(rng: random.Random) -> bytes:
    """A request body with something wrong: a value, the syntax, or the bytes."""
    body = json.loads(json.dumps(rng.choice(SEEDS)))
    for _ in range(rng.randint(0, 2)):
        key = rng.choice([*body, *FIELDS])
        body[key] = rng.choice(STRANGE)
    data = json.dumps(body, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    spoil: tuple[Callable[[bytes], bytes], ...] = (
        lambda d: d,
        lambda d: d[: rng.randrange(len(d) + 1)],
        lambda d: d[: (at := rng.randrange(len(d)))] + bytes([rng.randrange(256)]) + d[at + 1 :],
        lambda d: d + rng.randbytes(rng.randint(1, 30)),
        lambda d: b"[" * 100_000,
        lambda d: b'{"inputs":' * 5000 + b"1" + b"}" * 5000,
        lambda d: d.replace(
            b'"a"', rng.choice((b"NaN", b"Infinity", b"-", b"1e999", b'"\\ud800"', b"'a'", b"0" * 500))
        ),
        lambda d: b"\xef\xbb\xbf" + d,
        lambda d: d.decode("utf-8", "replace").encode("utf-16"),
        lambda d: rng.randbytes(rng.randint(0, 200)),
    )
    return rng.choice(spoil)(data)


def http(body: bytes, *headers: bytes, method: bytes = b"POST", path: bytes, version: bytes = b"HTTP/1.1") -> bytes:
    """The bytes of a request, as they are given."""
    return b"\r\n".join([b" ".join((method, path, version)), b"Host: x", *headers, b"", body])


def raw_request(rng: random.Random) -> bytes:
    """A whole request; the body, the headers or the HTTP itself is strange."""
    route, body = rng.choice(ROUTES), mutated_json(rng)
    if rng.random() < 0.6:
        return load.post(route, body)
    path, kind, length = route.encode(), b"Content-Type: application/json", b"Content-Length: %d" % len(body)
    chunked, noise = b"Transfer-Encoding: chunked", rng.randbytes(rng.randint(1, 300))
    methods = (b"GET", b"PUT", b"DELETE", b"OPTIONS", b"TRACE", b"FOO", b"\x00")
    paths = (b"/%00", b"/../../etc/passwd", b"//embed", b"/embed/", b"/embed?model=%ff", b"*", b"/" + b"a" * 70_000)
    accepts = (b";q=nan", b"\xff", b"application/x-npy", b"application/octet-stream", b"*/*;q=-1", b"," * 900)
    deadlines = (b"-1", b"nan", b"1e400", b"abc", b"0", b"1")
    makers = (
        lambda: http(body, kind, b"Content-Length: -5", path=path),
        lambda: http(body[:50], kind, b"Content-Length: 99999999999", path=path),
        lambda: http(body[:50], kind, b"Content-Length: 60", path=path),
        lambda: http(body, kind, b"Content-Length: abc", path=path),
        lambda: http(body, kind, length, length, chunked, path=path),
        lambda: http(b"zz\r\n" + body, kind, chunked, path=path),
        lambda: http(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body), kind, chunked, path=path),
        lambda: http(body, b"Content-Type: text/plain; charset=\xff", length, path=path),
        lambda: http(body, kind, b"Content-Encoding: gzip", length, path=path),
        lambda: http(body, kind, length, b"x-deadline-ms: " + rng.choice(deadlines), path=path),
        lambda: http(body, kind, length, b"Accept: " + rng.choice(accepts), path=path),
        lambda: http(body, kind, length, b"Authorization: " + noise.translate(None, b"\r\n"), path=path),
        lambda: http(body, kind, length, b"X-Long: " + b"a" * 100_000, path=path),
        lambda: http(body, kind, length, method=rng.choice(methods), path=path),
        lambda: http(body, kind, length, path=path, version=rng.choice((b"HTTP/1.0", b"HTTP/9.9", b"HTTP", b""))),
        lambda: http(body, kind, length, path=rng.choice(paths)),
        lambda: noise,
        lambda: b"\x16\x03\x01\x02\x00\x01\x00" + noise,
        lambda: b"\r\n" * rng.randint(1, 50),
    )
    return rng.choice(makers)()


def send_raw(port: int, request: bytes) -> int | str:
    """The status of the answer to raw bytes; `closed` where the server hung up, which broken HTTP deserves."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
        try:
            with suppress(BrokenPipeError, ConnectionResetError):  # it may have answered before it read everything
                connection.sendall(request)
            while not _whole(received) and (more := connection.recv(1 << 16)):
                received += more
        except TimeoutError:
            return "hung"
        except OSError:
            return "closed"
    return int(received[9:12]) if _whole(received) else "cut short" if received else "closed"


def _whole(received: bytes) -> bool:
    head, end, body = received.partition(b"\r\n\r\n")
    found = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
    return bool(end) and len(body) >= int(found[1] if found else 0)


def schema_cases(server: servers.Server, seed: int) -> Iterator[tuple[str, Callable[[], int | str]]]:
    """Requests that schemathesis makes from the OpenAPI document, without end, one operation after the other."""
    schema = schemathesis.openapi.from_url(server.url("/openapi.json"))
    operations = [result.ok() for result in schema.get_all_operations()]
    modes = list(schemathesis.GenerationMode)  # what the schema allows, and what it forbids
    for turn in count():
        for operation in operations:
            for case in examples(operation, modes[turn % len(modes)], seed + turn):
                yield (
                    f"{case.method} {case.formatted_path} {case.headers or ''} {case.body!r:.300}",
                    partial(send, case),
                )


def examples(operation: Any, mode: Any, seed: int) -> list[Any]:
    """Some requests of one operation."""
    made: list[Any] = []

    @hypothesis.settings(max_examples=25, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @hypothesis.seed(seed)
    @hypothesis.given(operation.as_strategy(generation_mode=mode))
    def collect(case: Any) -> None:
        made.append(case)

    with suppress(hypothesis.errors.Unsatisfiable):  # an operation that takes nothing has nothing to get wrong
        collect()
    return made


def send(case: Any) -> int | str:
    """The status of the answer, or what came instead."""
    try:
        status: int = case.call(timeout=PATIENCE_S).status_code
        return status
    except requests.Timeout:
        return "hung"
    except requests.ConnectionError:
        return "closed"
    except (requests.RequestException, ValueError):
        return "unsendable"  # a header or a path that no client can write


def fuzz(server: servers.Server, number: int, seed: int, fraction_from_schema: float) -> Tally:
    """Send them all."""
    tally, rng = Tally(), random.Random(seed)
    ordinary = server.request(["an ordinary text", "and another"], MODEL_NAME)
    expected = load.run(load.Plan(server.port, [ordinary], 1, 0.2)).bodies[0, _only_digest(server, ordinary)]
    cases = schema_cases(server, seed)
    for done in range(1, number + 1):
        if rng.random() < fraction_from_schema:
            what, ask = next(cases)
        else:
            request = raw_request(rng)
            what, ask = f"{request[:300]!r}", partial(send_raw, server.port, request)
        start = time.monotonic()
        tally.add(what, ask(), time.monotonic() - start)
        if server.process.poll() is not None:
            tally.faults.append(f"the server ended with {server.process.returncode} after {what}")
            break
        if done % 500 == 0:
            bodies = set(load.run(load.Plan(server.port, [ordinary], 1, 0.1)).bodies.values())
            if bodies != {expected}:
                tally.faults.append(f"after {done} requests an ordinary one got {bodies!r:.300}")
            print(f"{done} requests, {len(tally.faults)} faults, slowest {tally.slowest_s:.2f} s", flush=True)
    return tally


def _only_digest(server: servers.Server, request: bytes) -> bytes:
    answers = load.run(load.Plan(server.port, [request], 1, 0.2))
    if set(answers.status) != {200} or len(answers.bodies) != 1:
        raise RuntimeError(f"an ordinary request is not answered alike each time: {Counter(answers.status)}")
    return next(iter(answers.bodies))[1]


def main() -> None:
    """Start a server, fuzz it, stop it; exit 1 where it failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schema", type=float, default=0.5, help="fraction that schemathesis makes")
    args = parser.parse_args()
    options = ("--body-timeout-s", "0.3", "--header-timeout-s", "0.3")  # many requests never send what they promise
    with servers.start("fastbert", str(resolve(args.model)), *options, served_name=MODEL_NAME) as server:
        tally = fuzz(server, args.requests, args.seed, args.schema)
        code = server.stop()
        if "Traceback" in server.printed():
            tally.faults.append(f"a traceback in the log:\n{server.printed()[-3000:]}")
    counts = ", ".join(f"{status}: {count}" for status, count in tally.statuses.most_common())
    print(f"{tally.statuses.total()} requests: {counts}; slowest {tally.slowest_s:.2f} s; exit code {code}")
    print("\n".join(tally.faults[:30]))
    raise SystemExit(0 if not tally.faults and code == 0 else 1)


if __name__ == "__main__":
    main()
