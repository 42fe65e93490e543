"""`python -m benchmarks.ops`: every op on its BERT-sized cases, each backend against the reference, interleaved."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import harness
from fastbert import ops, testing
from fastbert.ops import dispatch


def traffic(case: testing.Case, inputs: dict[str, Any], output: torch.Tensor) -> tuple[int, int]:
    """(bytes, FLOP) that the forward pass must move and do: inputs read once, the output written once."""
    nbytes = output.nbytes + sum(v.nbytes for v in inputs.values() if isinstance(v, torch.Tensor))
    if case.op == "embed":  # of the tables only the rows that are looked up
        nbytes = output.nbytes * 4
    if case.op == "pool" and inputs["mode"] == "cls":  # of each sequence only the first token
        nbytes = output.nbytes * 2
    flop = 0
    if case.op == "attention":
        squares = int((inputs["cu_seqlens"].diff().long() ** 2).sum())
        flop = 4 * squares * inputs["qkv"].shape[2] * inputs["qkv"].shape[3]
    return nbytes, flop


def forward(function: Callable[..., torch.Tensor], backend: str, inputs: dict[str, Any]) -> torch.Tensor:
    """One forward pass without a graph."""
    with torch.no_grad(), ops.use_backend(backend):
        return function(**inputs)


def training(function: Callable[..., torch.Tensor], backend: str, inputs: dict[str, Any]) -> None:
    """One forward and backward pass."""
    with ops.use_backend(backend):
        function(**inputs).float().sum().backward()
    for value in inputs.values():
        if isinstance(value, torch.Tensor):
            value.grad = None


Turns = dict[str, dict[str, Callable[[], object]]]  # mode -> backend -> one call


def turns(case: testing.Case, dtype: torch.dtype, device: str) -> tuple[Turns, int, int]:
    """Each backend that has the case, and the reference, forward and with backward; bytes and FLOP of a forward."""
    backends = [b for b in (*dispatch.BACKENDS, dispatch.REFERENCE) if dispatch.has(b, case.op, device, dtype)]
    for backend in backends:
        with ops.use_backend(backend):
            testing.check_case(case, dtype, device)  # a red check prints no number
    function, inputs = testing.PUBLIC[case.op], case.inputs(dtype, device)
    modes = {"forward": forward, "training": training}
    calls: Turns = {mode: {b: partial(run, function, b, inputs) for b in backends} for mode, run in modes.items()}
    return calls, *traffic(case, inputs, forward(function, backends[-1], inputs))


def bench(
    cases: Sequence[testing.Case], dtype: torch.dtype, device: str, roofs: harness.Roofs, rounds: int
) -> list[harness.Row]:
    """Rows of all cases, which are gone through `harness.PARTS` times: a slow minute does not hit one alone."""
    prepared = [(case, *turns(case, dtype, device)) for case in cases]
    times: list[dict[str, dict[str, list[float]]]] = [
        {mode: {b: [] for b in calls} for mode, calls in of_case.items()} for _, of_case, _, _ in prepared
    ]
    for _ in range(harness.PARTS):
        for (_, of_case, _, _), found in zip(prepared, times, strict=True):
            for mode, calls in of_case.items():
                for backend, ms in harness.interleave(calls, -(-rounds // harness.PARTS), least_ms=5.0).items():
                    found[mode][backend] += ms
    rows = []
    for (case, _, nbytes, flop), found in zip(prepared, times, strict=True):
        for mode, factor in (("forward", 1.0), ("training", 3.0)):
            at = roofs.beside_cache(nbytes, device)
            for backend, ms in found[mode].items():
                p50, p20, p80 = harness.percentiles(ms)
                rows.append(
                    harness.Row(
                        case.op, case.name, backend, mode, str(dtype)[6:], *(round(v, 5) for v in (p50, p20, p80)),
                        round(factor * nbytes / p50 / 1e6, 2), round(factor * flop / p50 / 1e9, 4),
                        round(100 * at.bound_ms(factor * nbytes, factor * flop) / p50, 1),
                        round(harness.fast_tenth(ms), 5), *harness.times_base(found[mode][dispatch.REFERENCE], ms),
                        **at.columns(), version=f"torch {torch.__version__}", samples=harness.joined(ms),
                        device=harness.device_name(device),
                    )
                )  # fmt: skip
    return rows


def main() -> None:
    """Measure, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32", help="one or more, separated by commas")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--only", help="ops, separated by commas")
    parser.add_argument("--quick", action="store_true", help="two rounds, to see that all works; writes no rows")
    args = parser.parse_args()
    rounds = 3 if args.quick else args.rounds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    only = args.only.split(",") if args.only else None
    rows = []
    for dtype in (getattr(torch, name) for name in args.dtype.split(",")):
        roofs = harness.measure_roofs(dtype, device)
        rows += bench(
            [c for c in testing.BENCHMARK_CASES if only is None or c.op in only], dtype, device, roofs, rounds
        )
    columns = ("op", "case", "dtype", "mode", "backend", "ms p50", "roof", "x ref")
    table = harness.table(columns, f"{harness.device_name(device)}, {torch.get_num_threads()} threads", num_text=5)
    for r in rows:
        table.add_row(
            r.op, r.case, {"float32": "fp32", "bfloat16": "bf16"}.get(r.dtype, r.dtype), r.mode, r.backend,
            harness.short(r.ms_p50), f"{r.roof_percent:.0f} %",
            f"{harness.mark(r.times_low, r.times_high)}{r.times_base:.2f}",
        )  # fmt: skip
    harness.console().print(table)
    peaks = ", ".join(f"{t:.2f} TFLOP/s in {d}" for d, t in {r.dtype: r.peak_tflop_s for r in rows}.items())
    print(f"load {harness.load()}; roofs: copy {rows[0].copy_gb_s:.0f} GB/s, arithmetic {peaks}")
    if args.quick and harness.RESULTS == harness.COMMITTED:
        print("quick: no rows are written, and these times mean nothing")
        return
    path = harness.write(rows, harness.file_of("ops", device))
    print(f"{len(rows)} rows in {path.relative_to(harness.RESULTS.parent.parent)}")


if __name__ == "__main__":
    main()
