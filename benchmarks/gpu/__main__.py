"""Sections in order of worth, each in its box of time."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

from benchmarks.gpu.attention import attention
from benchmarks.gpu.epilogues import epilogues
from benchmarks.gpu.memory import memory_bound
from benchmarks.gpu.models import compiled, inference
from benchmarks.gpu.report import BACKEND, Report, Setting, setting
from benchmarks.gpu.training import training
from fastbert import ops, testing
from fastbert.ops import dispatch

SECTIONS: dict[str, Callable[[Report], Iterator[None]]] = {
    "attention": attention,
    "memory": memory_bound,
    "inference": inference,
    "training": training,
    "epilogues": epilogues,
    "compiled": compiled,
}


def correct(at: Setting) -> None:
    """Every op's BERT-sized case against the oracle first: a red check prints no number."""
    for case in testing.CASES:
        if "base" in case.name and dispatch.has(BACKEND, case.op, at.device, at.dtype):
            with ops.use_backend(BACKEND):
                testing.check_case(case, at.dtype, at.device)


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="every step once, tiny, on the CPU")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--seconds", type=float, default=80, help="box of a section")
    parser.add_argument("--total", type=float, default=480, help="seconds after which no section begins")
    args = parser.parse_args(argv)
    begun = time.monotonic()
    at = setting(args.dry_run, args.dtype, args.seconds)
    correct(at)
    report = Report(at)
    for name in args.only.split(","):
        if time.monotonic() - begun > args.total:
            print(f"{name}: out of time, not measured (--only {name})")
            continue
        start, finished = time.monotonic(), True
        for _ in SECTIONS[name](report):
            if time.monotonic() - start > at.seconds:
                finished = False
                break
        print(
            f"{name}: {time.monotonic() - start:.0f} s{'' if finished else ', out of time: the rest is not measured'}"
        )
    print(report.table())
    print(f"{len(report.rows)} rows in benchmarks/results/{report.name}.csv")


if __name__ == "__main__":
    main()
