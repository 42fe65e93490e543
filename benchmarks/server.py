"""`python -m benchmarks.server`: serving under load, fastbert beside its peers, on the loopback address.

Each cell is a length of texts, a number of clients and a number of texts a request. Throughput is measured with every
client always waiting for an answer; latency in open loop, at half of that throughput. The roof is `Embedder.encode` on
the same texts in this process, measured between the servers. A server with a wrong vector gets no row.

`--overload` offers ten times what the server can do, and every answer must be right or 429.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from rich.table import Table

from benchmarks import harness, load, servers
from benchmarks.encoder import GATE, WORDS, real_texts, worst_cosine
from fastbert import Embedder
from fastbert.hub import DEFAULT_MODEL, resolve

MODEL_NAME = "model"  # as served
CELLS = ((1, 1), (8, 1), (64, 1), (256, 1), (1, 32), (8, 32))  # clients, texts a request
KEY = ("test", "texts", "clients", "texts_a_request", "server")


@dataclass(frozen=True)
class ServerRow(harness.Machine):
    """One cell of one server. Rates are a second; latencies from due to done, in ms; memory in MiB.

    `of_encode_percent` holds the throughput against one call of `Embedder.encode` with all texts,
    `of_inflight_percent` against calls with as many texts as the clients have in flight together. The load generator
    shares the machine: it kept `client_cores` busy, and `net_of_inflight_percent` holds the throughput against what
    such calls would do on the cores that it left.
    `answers` = `right` + `turned_away` (429) + `failed`.
    """

    test: str
    texts: str
    clients: int
    texts_a_request: int
    server: str
    requests_s: float
    texts_s: float
    of_encode_percent: float
    of_inflight_percent: float
    client_cores: float
    net_of_inflight_percent: float
    offered_s: float
    ms_p50: float
    ms_p99: float
    answers: int
    right: int
    turned_away: int
    failed: int
    rss_begin: float
    rss_end: float


@dataclass(frozen=True)
class Work:
    """The requests of a cell, with the exact vectors of their texts."""

    texts: list[list[str]]
    exact: list[np.ndarray]

    @classmethod
    def make(cls, texts: Sequence[str], vectors: np.ndarray, texts_a_request: int) -> Work:
        """Split texts with their exact vectors into requests."""
        parts = [list(texts[i : i + texts_a_request]) for i in range(0, len(texts), texts_a_request)]
        return cls(parts, [vectors[i : i + texts_a_request] for i in range(0, len(texts), texts_a_request)])

    def plan(self, server: servers.Server, clients: int, seconds: float, rate: float | None = None) -> load.Plan:
        """Load of these requests on a server."""
        return load.Plan(
            server.port, [server.request(texts, MODEL_NAME) for texts in self.texts], clients, seconds, rate
        )

    def failures(self, answers: load.Answers) -> list[str]:
        """What is wrong with the answers: each that is neither right nor 429."""
        wrong = {}
        for (index, digest), body in answers.bodies.items():
            vectors, exact = servers.vectors_of(body), self.exact[index]
            if vectors.shape != exact.shape:
                wrong[index, digest] = f"request {index} has vectors of shape {vectors.shape}, not {exact.shape}"
            elif not (cosine := worst_cosine(vectors, exact)) >= GATE:
                wrong[index, digest] = f"request {index} has a vector of cosine {cosine:.6f} to the exact one"
        found = []
        for index, status, digest in zip(answers.request, answers.status, answers.digest, strict=True):
            if status == 200 and (index, digest) in wrong:
                found.append(wrong[index, digest])
            elif status not in (200, 429):
                found.append(f"request {index} got {status}")
        return found


def exact_vectors(exact: Embedder, texts: Sequence[str]) -> np.ndarray:
    """Unit vectors of texts, (N, D); long texts are cut, as the servers cut them."""
    return exact.encode_with_stats(texts, normalize_embeddings=True).vectors.numpy()


def encode_rate(embedder: Embedder, texts: Sequence[str], at_once: int, seconds: float) -> float:
    """Texts a second of `Embedder.encode`, called with so many texts at once, again and again."""
    calls, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        begin = calls * at_once % len(texts)
        embedder.encode_with_stats((list(texts) * 2)[begin : begin + at_once], normalize_embeddings=True)
        calls += 1
    return calls * at_once / spent


def saturate(work: Work, server: servers.Server, clients: int, seconds: float) -> tuple[load.Answers, float]:
    """Every client always waiting; (answers, right answers a second once warm)."""
    answers = load.offer(work.plan(server, clients, seconds * 1.25))
    return answers, answers.rate(seconds * 0.25, seconds * 1.25)


@dataclass(frozen=True)
class Cell:
    """Where in the table: which texts, how many clients, how many texts a request."""

    mix: str
    clients: int
    texts_a_request: int


def measure_cell(
    cell: Cell, work: Work, running: Sequence[servers.Server], embedder: Embedder, seconds: float
) -> list[ServerRow]:
    """The rows of one cell: servers take turns, `Embedder.encode` before and after each."""
    texts = [text for part in work.texts for text in part]
    inflight = min(len(texts), cell.clients * cell.texts_a_request)
    rows = []
    for server in running:
        before = (
            encode_rate(embedder, texts, len(texts), seconds / 4),
            encode_rate(embedder, texts, inflight, seconds / 4),
        )
        begin = server.rss_mb()
        full, rate = saturate(work, server, cell.clients, seconds)
        half = load.offer(work.plan(server, cell.clients, seconds, rate / 2)) if rate else load.Answers()
        after = (
            encode_rate(embedder, texts, len(texts), seconds / 4),
            encode_rate(embedder, texts, inflight, seconds / 4),
        )
        failures = work.failures(full) + work.failures(half)
        if failures or not len(half.latencies_ms()):
            print(f"{server.name}, {cell}: no row: {'; '.join(failures[:3]) or 'no answer in time'}")
            continue
        p50, p99 = np.percentile(half.latencies_ms(), (50, 99))
        texts_s = rate * cell.texts_a_request
        of_encode, of_inflight = (200 * texts_s / (a + b) for a, b in zip(before, after, strict=True))
        net = of_inflight / (1 - full.cores / (os.cpu_count() or 1))
        rows.append(
            ServerRow(
                "load", cell.mix, cell.clients, cell.texts_a_request, server.name, round(rate, 2), round(texts_s, 1),
                round(of_encode, 1), round(of_inflight, 1), round(full.cores, 3), round(net, 1),
                round(rate / 2, 2), round(float(p50), 3), round(float(p99), 3), len(full.status) + len(half.status),
                full.count(200) + half.count(200), full.count(429) + half.count(429), 0,
                round(begin, 1), round(server.rss_mb(), 1),
            )
        )  # fmt: skip
    return rows


def overload(
    work: Work, mix: str, server: servers.Server, seconds: float, times: float = 10.0, calm_s: float = 5.0
) -> ServerRow:
    """Offer a multiple of what the server can do; raises where an answer is neither right nor 429."""
    each = len(work.texts[0])
    before, rate = saturate(work, server, 8, calm_s)
    begin = server.rss_mb()
    clients = 1024
    plan = work.plan(server, clients, seconds, rate * times)
    running = load.Offer(plan)
    sampled = []
    for _ in range(int(seconds)):
        time.sleep(1.0)
        sampled.append(server.rss_mb())
    answers = running.answers()
    print("resident MiB each second:", " ".join(f"{mb:.0f}" for mb in sampled))
    after, rate_after = saturate(work, server, 8, calm_s)
    failures = [failure for part in (before, answers, after) for failure in work.failures(part)]
    if failures:
        raise AssertionError(
            f"{len(failures)} of {len(answers.status)} answers are neither right nor 429: {failures[:5]}"
        )
    print(f"{rate:.1f} requests/s before, {rate_after:.1f} after")
    p50, p99 = np.percentile(answers.latencies_ms(), (50, 99))
    right_s = answers.rate(0, seconds)
    return ServerRow(
        "overload", mix, clients, each, server.name, round(right_s, 2), round(right_s * each, 1), 0.0, 0.0,
        round(answers.cores, 3), 0.0,
        round(rate * times, 2), round(float(p50), 3), round(float(p99), 3), len(answers.status), answers.count(200),
        answers.count(429), 0, round(begin, 1), round(max(sampled[-5:]), 1),
    )  # fmt: skip


def show(rows: Sequence[ServerRow]) -> None:
    """A table on the terminal."""
    columns = (
        "test", "texts", "clients", "each", "server", "texts/s", "% encode", "% in flight", "% net", "p50 ms",
        "p99 ms", "429", "MiB",
    )  # fmt: skip
    table = Table(title=f"{harness.device_name('cpu')}, {torch.get_num_threads()} threads, load {harness.load()}")
    for column in columns:
        table.add_column(column, justify="left" if column in ("test", "texts", "server") else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.test, row.texts, str(row.clients), str(row.texts_a_request), row.server, f"{row.texts_s:,.0f}",
            f"{row.of_encode_percent:.0f}", f"{row.of_inflight_percent:.0f}", f"{row.net_of_inflight_percent:.0f}",
            f"{row.ms_p50:.2f}", f"{row.ms_p99:.2f}", str(row.turned_away), f"{row.rss_begin:.0f}-{row.rss_end:.0f}",
        )  # fmt: skip
    harness.console().print(table)


def write(rows: Sequence[object], what: str = "server", key: tuple[str, ...] = KEY) -> None:
    """Into `results/<what>-<device>.csv`."""
    path = harness.write(rows, harness.file_of(what, "cpu"), key)
    print(f"{len(rows)} rows in {path.relative_to(harness.RESULTS.parent.parent)}")


def main() -> None:
    """Start the servers, measure, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--servers", default=",".join(servers.PEERS), help="which, separated by commas")
    parser.add_argument("--texts", default=",".join(WORDS), help=f"which of {', '.join(WORDS)}")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--overload", type=float, metavar="SECONDS", help="offer ten times the capacity for so long")
    parser.add_argument("--quick", action="store_true", help="a look: few cells, a second each, no rows written")
    args = parser.parse_args()
    seconds, cells = (1.0, ((8, 1), (64, 1), (8, 32))) if args.quick else (args.seconds, CELLS)
    folder = str(resolve(args.model))
    embedder, exact = Embedder.from_pretrained(folder, "float32"), Embedder.from_pretrained(folder, "float32")
    exact.model.double()
    rows: list[ServerRow] = []
    with ExitStack() as stack:
        running = []
        for name in args.servers.split(","):
            if (why := servers.missing(name)) is not None:
                print(why)
                continue
            running.append(stack.enter_context(servers.start(name, folder, served_name=MODEL_NAME)))
        for mix in args.texts.split(","):
            texts = real_texts(WORDS[mix], 256)
            vectors = exact_vectors(exact, texts)
            if args.overload:
                work = Work.make(texts, vectors, 8)
                rows += [overload(work, mix, server, args.overload) for server in running if server.name == "fastbert"]
            else:
                for clients, each in cells:
                    cell, work = Cell(mix, clients, each), Work.make(texts, vectors, each)
                    rows += measure_cell(cell, work, running, embedder, seconds)
            if rows and not args.quick:
                write(rows)  # after each length: an interruption keeps what is done
    show(rows)


if __name__ == "__main__":
    main()
