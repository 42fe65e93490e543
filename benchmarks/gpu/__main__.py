"""Sections in order of worth, each in its box of time and, where there are several, in a process of its own."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from benchmarks.gpu.attention import attention
from benchmarks.gpu.epilogues import epilogues
from benchmarks.gpu.memory import memory_bound
from benchmarks.gpu.models import compiled, inference
from benchmarks.gpu.report import BACKEND, Report, Setting, setting
from benchmarks.gpu.training import training
from fastbert import ops, testing
from fastbert.ops import dispatch

_MODEL = ("embed", "attention", "add_layer_norm", "gelu")
SECTIONS: dict[str, tuple[Callable[[Report], Iterator[None]], tuple[str, ...]]] = {  # and the ops that each needs
    "attention": (attention, ("attention", "attention_window")),
    "memory": (memory_bound, ("add_layer_norm", "gelu")),
    "inference": (inference, _MODEL),
    "training": (training, (*_MODEL, "cross_entropy")),
    "epilogues": (epilogues, ("add_layer_norm", "gelu")),
    "compiled": (compiled, _MODEL),
}
COMMAND = [sys.executable, "-m", "benchmarks.gpu"]
START_SECONDS = 30  # of a section's process: torch, roofs, kernels compiled for the first time


def correct(at: Setting, names: Sequence[str]) -> None:
    """The ops' BERT-sized cases against the oracle first: a red check prints no number."""
    for case in testing.CASES:
        if case.op in names and "base" in case.name and dispatch.has(BACKEND, case.op, at.device, at.dtype):
            with ops.use_backend(BACKEND):
                testing.check_case(case, at.dtype, at.device)


def here(name: str, at: Setting) -> None:
    """One section: measure, print, write the rows."""
    measure, names = SECTIONS[name]
    correct(at, names)
    report = Report(at)
    start, finished = time.monotonic(), True
    for _ in measure(report):
        if time.monotonic() - start > at.seconds:
            finished = False
            break
    print(f"{name}: {time.monotonic() - start:.0f} s{'' if finished else ', out of time: the rest is not measured'}")
    print(report.table())
    print(f"{len(report.rows)} rows in benchmarks/results/{report.name}.csv", flush=True)


def apart(names: Sequence[str], options: Sequence[str], seconds: float, total: float) -> list[str]:
    """Sections one after the other, in processes: a fault on the device, or a compiler that takes minutes, costs one
    section its rest, since rows are written as they come. Those that failed."""
    begun, failed = time.monotonic(), []
    for name in names:
        left = total - (time.monotonic() - begun)
        if left <= 0:
            print(f"{name}: out of time, not measured (--only {name})", flush=True)
            continue
        try:
            run = subprocess.run([*COMMAND, "--only", name, *options], timeout=min(left, 2 * seconds + START_SECONDS))
        except subprocess.TimeoutExpired as error:
            print(f"{name}: stopped after {error.timeout:.0f} s: the rest is not measured", flush=True)
            failed.append(name)
            continue
        if run.returncode:
            print(f"{name}: failed ({run.returncode}): the rest is not measured", flush=True)
            failed.append(name)
    return failed


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="every step once, tiny, on the CPU")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--seconds", type=float, default=80, help="box of a section")
    parser.add_argument("--total", type=float, default=480, help="seconds after which several sections end")
    args = parser.parse_args(argv)
    names = args.only.split(",")
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; the sections are {', '.join(SECTIONS)}")
    at = setting(args.dry_run, args.dtype, args.seconds)
    if len(names) == 1:
        return here(names[0], at)
    options = ["--dtype", args.dtype, "--seconds", str(args.seconds), *(["--dry-run"] if args.dry_run else [])]
    if failed := apart(names, options, args.seconds, args.total):
        raise SystemExit(f"not whole: {', '.join(failed)}")


if __name__ == "__main__":
    main()
