"""`python -m benchmarks.ops`: every op on its BERT-sized cases, each backend against the reference, interleaved."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.table import Table

from benchmarks import harness
from fastbert import native, ops, testing
from fastbert.ops import dispatch


def traffic(case: testing.Case, inputs: dict[str, Any], output: torch.Tensor) -> tuple[int, int]:
    """(bytes, FLOP) that the forward pass must move and do: inputs read once, the output written once."""
    nbytes = output.nbytes + sum(v.nbytes for v in inputs.values() if isinstance(v, torch.Tensor))
    if case.op == "embed":  # of the tables only the rows that are looked up
        nbytes = output.nbytes * 4
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


def bench(case: testing.Case, dtype: torch.dtype, device: str, roofs: harness.Roofs, rounds: int) -> list[harness.Row]:
    """Rows of one case: each backend that has it, and the reference, forward and forward + backward."""
    backends = [b for b in (*dispatch.BACKENDS, dispatch.REFERENCE) if dispatch.has(b, case.op, device, dtype)]
    for backend in backends:
        with ops.use_backend(backend):
            testing.check_case(case, dtype, device)  # a red check prints no number
    function, inputs = testing.PUBLIC[case.op], case.inputs(dtype, device)
    nbytes, flop = traffic(case, inputs, forward(function, backends[-1], inputs))
    rows = []
    for mode, run, factor in (("forward", forward, 1.0), ("training", training, 3.0)):
        times = harness.interleave({b: partial(run, function, b, inputs) for b in backends}, rounds)
        for backend, ms in times.items():
            p50, p20, p80 = harness.percentiles(ms)
            rows.append(
                harness.Row(
                    case.op, case.name, backend, mode, str(dtype)[6:], *(round(v, 5) for v in (p50, p20, p80)),
                    round(factor * nbytes / p50 / 1e6, 2), round(factor * flop / p50 / 1e9, 4),
                    round(100 * roofs.bound_ms(factor * nbytes, factor * flop) / p50, 1),
                    harness.device_name(device), torch.__version__, native.isa() if native.available() else "none",
                    torch.get_num_threads(), harness.load(), harness.commit(), harness.today(),
                )
            )  # fmt: skip
    return rows


def main() -> None:
    """Measure, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--only", help="ops, separated by commas")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    roofs = harness.measure_roofs(dtype, device)
    only = args.only.split(",") if args.only else None
    rows = []
    for case in testing.BENCHMARK_CASES:
        if only is None or case.op in only:
            rows += bench(case, dtype, device, roofs, args.rounds)
    table = Table(
        title=f"{harness.device_name(device)}, {dtype}, {torch.get_num_threads()} threads, load {harness.load()}; "
        f"roofs: copy {roofs.bytes_s / 1e9:.0f} GB/s, GEMM {roofs.flop_s / 1e12:.2f} TFLOP/s"
    )
    for column in ("op", "case", "mode", "backend", "ms (p20, p80)", "GB/s", "% roof", "x ref"):
        text = column in ("op", "case", "mode", "backend")
        table.add_column(column, justify="left" if text else "right", no_wrap=True)
    reference = {(r.op, r.case, r.mode): r.ms_p50 for r in rows if r.backend == dispatch.REFERENCE}
    for r in rows:
        speedup = reference[r.op, r.case, r.mode] / r.ms_p50
        table.add_row(
            r.op, r.case, r.mode, r.backend, f"{r.ms_p50:.3f} ({r.ms_p20:.3f}, {r.ms_p80:.3f})", f"{r.gb_s:.1f}",
            f"{r.roof_percent:.0f}", f"{speedup:.2f}",
        )  # fmt: skip
    harness.console().print(table)
    name = f"ops-{harness.device_name(device)}".lower()
    path = harness.write(rows, "".join(c if c.isalnum() else "-" for c in name))
    print(f"{len(rows)} rows in {path.relative_to(harness.RESULTS.parent.parent)}")


if __name__ == "__main__":
    main()
