"""`python -m fastbert.ops`: which backend computes each op; `--memory`: what training keeps of each."""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table

from fastbert.ops import OPS, dispatch
from fastbert.ops.memory import training_memory

_INTEGER_OPS = {"plan_mask": torch.bool, "plan_batches": torch.int64, "plan_concat": torch.int64}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")


def table() -> Table:
    """Op x backend: the dtypes each takes; the backend that runs unasked is marked."""
    grid = Table(title="fastbert ops (* = runs unless another backend is forced)")
    for column in ("op", "device", *dispatch.BACKENDS, dispatch.REFERENCE):
        grid.add_column(column, no_wrap=column == "op", min_width=max(map(len, OPS)) if column == "op" else None)
    for op in OPS:
        dtypes = (_INTEGER_OPS[op],) if op in _INTEGER_OPS else dispatch.DTYPES
        for device in dispatch.DEFAULT:
            cells = []
            for backend in (*dispatch.BACKENDS, dispatch.REFERENCE):
                has = [d for d in dtypes if dispatch.has(backend, op, device, d)]
                cells.append(
                    " ".join(_short(d) + ("*" if dispatch.chosen(op, device, d) == backend else "") for d in has) or "-"
                )
            grid.add_row(op if device == next(iter(dispatch.DEFAULT)) else "", device, *cells)
    return grid


def memory() -> Table:
    """Activations that each op saves for backward at BERT-base's sizes, T = 128."""
    grid = Table(title="saved for backward, bfloat16, BERT-base, T = 128")
    for column in ("op", "saved", "bytes a token", "computed again"):
        grid.add_column(column)
    for row in training_memory():
        grid.add_row(row.op, "\n".join(row.tensors), f"{row.bytes_per_token:,.0f}", row.recomputed)
    return grid


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m fastbert.ops", description=__doc__)
    parser.add_argument("--memory", action="store_true", help="what autograd saves of each op")
    Console().print(memory() if parser.parse_args().memory else table())
