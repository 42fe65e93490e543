"""`python -m benchmarks.stages`: where the time of one short request goes, stage by stage.

One client sends one text at a time over one connection and waits for the answer. The stages are the server's own, of
the header `Server-Timing`; `rest` is what of its total lies in none of them, `wire` what of the client's round trip
lies outside of its total: both kernels, the HTTP parser, the event loop on either side. `encode` is `Embedder.encode`
of the same texts in a process without a server, in turns with it.
"""

from __future__ import annotations

import argparse
import re
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from benchmarks import harness, servers
from benchmarks.encoder import WORDS, real_texts
from benchmarks.server import MODEL_NAME, write
from fastbert import Embedder
from fastbert.hub import DEFAULT_MODEL, resolve
from fastbert.serve.series import STAGES

T = TypeVar("T")

KEY = ("texts", "stage")
TURN = 25  # requests, then as many calls of `encode`
REST_S = 0.02  # between turns: OpenMP's threads spin for milliseconds after a pass, on a core that the other side needs


@dataclass(frozen=True)
class StageRow(harness.Machine):
    """A stage of one request: milliseconds; `share_percent` of the round trip's median."""

    texts: str
    stage: str
    requests: int
    ms_p50: float
    ms_p99: float
    share_percent: float


def ask(connection: socket.socket, request: bytes) -> bytes:
    """The head of the answer, once the whole of it is here."""
    connection.sendall(request)
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(1 << 16)
    head, _, body = received.partition(b"\r\n\r\n")
    left = int(re.search(rb"content-length: (\d+)", head)[1]) - len(body)  # type: ignore[index]
    while left > 0:
        left -= len(connection.recv(1 << 16))
    return head


def stages_of(head: bytes) -> dict[str, float]:
    """Milliseconds by stage, of `Server-Timing`."""
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"the server answered {head[:200]!r}")
    line = re.search(rb"server-timing: ([^\r]*)", head)
    assert line is not None
    return {name.decode(): float(ms) for name, ms in re.findall(rb"(\w+);dur=([\d.]+)", line[1])}


def timed(function: Callable[..., T], *arguments: object, **options: object) -> tuple[T, float]:
    """What a call returned, and the milliseconds that it took."""
    begin = time.perf_counter()
    returned = function(*arguments, **options)
    return returned, 1e3 * (time.perf_counter() - begin)


def measure(server: servers.Server, embedder: Embedder, texts: Sequence[str], requests: int) -> dict[str, np.ndarray]:
    """Milliseconds of each request by stage, `rest`, `wire`, `round trip` and `encode`."""
    found: dict[str, list[float]] = {name: [] for name in (*STAGES, "rest", "wire", "round trip", "encode")}
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for first in range(-TURN, requests, TURN):  # the first turn warms up
            turn = [texts[number % len(texts)] for number in range(first, min(first + TURN, requests))]
            time.sleep(REST_S)
            trips = [timed(ask, connection, server.request([text], MODEL_NAME)) for text in turn]
            time.sleep(REST_S)
            calls = [timed(embedder.encode, [text], normalize_embeddings=True) for text in turn]
            if first < 0:
                continue
            for (head, trip), (_, call) in zip(trips, calls, strict=True):
                spent = stages_of(head)
                for name in STAGES:
                    found[name].append(spent[name])
                found["rest"].append(spent["total"] - sum(spent[name] for name in STAGES))
                found["wire"].append(trip - spent["total"])
                found["round trip"].append(trip)
                found["encode"].append(call)
    return {name: np.array(values) for name, values in found.items()}


def main() -> None:
    """Start the server, measure, print, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--texts", default="query", help=f"which of {', '.join(WORDS)}, separated by commas")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--quick", action="store_true", help="a look: no rows written")
    args = parser.parse_args()
    folder = str(resolve(args.model))
    embedder = Embedder.from_pretrained(folder, "float32")
    rows = []
    with servers.start("fastbert", folder, served_name=MODEL_NAME) as server:
        for mix in args.texts.split(","):
            found = measure(server, embedder, real_texts(WORDS[mix], 256), args.requests)
            whole = float(np.median(found["round trip"]))
            for stage, times in found.items():
                p50, p99 = (round(float(p), 4) for p in np.percentile(times, (50, 99)))
                rows.append(StageRow(mix, stage, len(times), p50, p99, round(100 * p50 / whole, 1)))
                print(f"{mix:9} {stage:11} {p50:8.3f} ms  p99 {p99:8.3f} ms  {100 * p50 / whole:5.1f} %")
    if not args.quick:
        write(rows, "stages", KEY)


if __name__ == "__main__":
    main()
