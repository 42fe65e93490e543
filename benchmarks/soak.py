"""`python -m benchmarks.soak memory|term`: does a server under load keep its size, and does it end without losing work?

`memory`: mixed requests at half of the capacity for minutes; the slope of the resident memory must be within its noise.
Ten minutes or more write a row.
`term`: SIGTERM in the middle of load, again and again; what the server took on it must have answered.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks import harness, load, servers
from benchmarks.encoder import WORDS, real_texts
from benchmarks.server import MODEL_NAME, Work, exact_vectors, saturate, write
from fastbert import Embedder
from fastbert.hub import DEFAULT_MODEL, resolve

KEY = ("what", "options", "clients")
ROW_MINUTES = 10.0  # a shorter soak is a look: no row
MAX_GROWTH_MB = 8.0  # of resident memory in a whole soak: a leak of one 1536-byte vector a request would be far more


@dataclass(frozen=True)
class Slope:
    """A straight line through resident memory: MiB a minute, its standard error, and MiB over the whole time."""

    mb_per_minute: float
    error: float
    growth_mb: float

    @classmethod
    def fit(cls, minutes: Sequence[float], mb: Sequence[float], blocks: int = 8) -> Slope:
        """Least squares through block means: samples next to each other are not independent, blocks nearly so."""
        x = np.array([part.mean() for part in np.array_split(np.asarray(minutes), blocks)])
        y = np.array([part.mean() for part in np.array_split(np.asarray(mb), blocks)])
        spread = ((x - x.mean()) ** 2).sum()
        slope = float(((x - x.mean()) * (y - y.mean())).sum() / spread)
        residual = y - y.mean() - slope * (x - x.mean())
        error = float(np.sqrt((residual**2).sum() / (blocks - 2) / spread))
        return cls(slope, error, slope * (minutes[-1] - minutes[0]))

    def flat(self) -> bool:
        """Whether the slope is within two standard errors of none, or the growth is too small to matter."""
        return self.mb_per_minute <= 2 * self.error or self.growth_mb <= MAX_GROWTH_MB


@dataclass(frozen=True)
class SoakRow(harness.Machine):
    """A soak of memory: resident size as the load began and as it ended, the slope of what is after the first fifth.

    `refused` answers were a 429; `failures` are answers that are wrong or did not come.
    """

    what: str
    options: str
    clients: int
    minutes: float
    requests_s: float
    answers: int
    refused: int
    failures: int
    first_mb: float
    last_mb: float
    slope_mb_per_minute: float
    slope_error: float


def mixed_texts(requests: int, seed: int = 0) -> list[list[str]]:
    """Requests of 1 to 16 texts, each from a query to a passage."""
    rng = random.Random(seed)
    kinds = {name: real_texts(words, 256, seed) for name, words in WORDS.items()}
    return [
        [rng.choice(kinds[rng.choice(list(kinds))]) for _ in range(rng.choice((1, 1, 1, 4, 16)))]
        for _ in range(requests)
    ]


def make_work(exact: Embedder, requests: int = 400) -> Work:
    """Mixed requests with the exact vectors."""
    parts = mixed_texts(requests)
    return Work(parts, [exact_vectors(exact, part) for part in parts])


def memory(folder: str, exact: Embedder, minutes: float, clients: int, options: Sequence[str]) -> bool:
    """Load for minutes; prints memory as it goes, and whether it is flat."""
    work = make_work(exact)
    with servers.start("fastbert", folder, *options, served_name=MODEL_NAME) as server:
        _, rate = saturate(work, server, clients, 10.0)
        running = load.Offer(work.plan(server, clients, 60 * minutes, rate / 2))
        print(f"{rate:.1f} requests/s at most; {rate / 2:.1f} offered for {minutes:g} min by {clients} clients")
        at, mb, start = [], [], time.monotonic()
        while (spent := time.monotonic() - start) < 60 * minutes:
            time.sleep(2.0)
            at.append(spent / 60)
            mb.append(server.rss_mb())
            if len(mb) % 15 == 0:
                print(f"{spent:5.0f} s  {mb[-1]:8.1f} MiB", flush=True)
        answers = running.answers()
        failures = work.failures(answers)
        code = server.stop()
    settled = len(mb) // 5  # the first fifth warms caches and pools
    slope = Slope.fit(at[settled:], mb[settled:])
    print(
        f"{len(answers.status)} answers, {answers.count(429)} x 429, {len(failures)} wrong or lost {failures[:3]}; "
        f"{mb[0]:.1f} to {mb[-1]:.1f} MiB, slope {slope.mb_per_minute:+.3f} +- {slope.error:.3f} MiB/min; exit {code}"
    )
    row = SoakRow(
        "memory", " ".join(options), clients, minutes, round(rate / 2, 1), len(answers.status), answers.count(429),
        len(failures), round(mb[0], 1), round(mb[-1], 1), round(slope.mb_per_minute, 3), round(slope.error, 3),
    )  # fmt: skip
    if minutes >= ROW_MINUTES:
        write([row], "soak", KEY)
    return slope.flat() and not failures and code == 0


def lines_of_requests(printed: str, path: str) -> Counter[int]:
    """How many requests the server's log has answered, by status."""
    found: Counter[int] = Counter()
    for line in printed.splitlines():
        if line.startswith("{") and (entry := json.loads(line)).get("path") == path and "status" in entry:
            found[entry["status"]] += 1
    return found


def term(folder: str, exact: Embedder, times: int, clients: int, options: Sequence[str]) -> bool:
    """SIGTERM under load, `times` times over; prints what became of every request."""
    work, fine = make_work(exact, 100), True
    for round_number in range(times):
        rng = random.Random(round_number)
        logs = ("--log-format", "json", *options)
        with servers.start("fastbert", folder, *logs, served_name=MODEL_NAME) as server:
            running = load.Offer(work.plan(server, clients, 6.0, None))
            time.sleep(rng.uniform(0.5, 2.0))
            asked = time.monotonic()
            code = server.stop()
            took = time.monotonic() - asked
            answers = running.answers()
            logged = lines_of_requests(server.printed(), server.path)
        # The server's own count of what it took on, against what arrived here whole.
        accepted, arrived = logged.total(), sum(status > 0 for status in answers.status)
        failures = work.failures(answers)
        wrong = [failure for failure in failures if "vector" in failure]
        lost = accepted - arrived
        fine &= code == 0 and lost <= 0 and not wrong and answers.count(load.PARTIAL, load.HUNG) == 0
        print(
            f"{round_number + 1:2}: ended in {took:.2f} s with code {code}; accepted {accepted} {dict(logged)}, "
            f"arrived whole {arrived}, cut short {answers.count(load.PARTIAL)}, hung {answers.count(load.HUNG)}, "
            f"closed before an answer {answers.count(load.LOST)}, wrong {len(wrong)}",
            flush=True,
        )
    return fine


def main() -> None:
    """Run one of the two; exit 1 where it fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "term"))
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument(
        "--option", action="append", default=[], help="passed on to fastbert serve, e.g. --option=--cache-mb=64"
    )
    args = parser.parse_args()
    folder = str(resolve(args.model))
    exact = Embedder.from_pretrained(folder, "float32")
    exact.model.double()
    if args.what == "memory":
        fine = memory(folder, exact, args.minutes, args.clients, args.option)
    else:
        fine = term(folder, exact, args.times, args.clients, args.option)
    print("passed" if fine else "FAILED")
    raise SystemExit(0 if fine else 1)


if __name__ == "__main__":
    main()
