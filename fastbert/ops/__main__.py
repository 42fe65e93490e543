"""`python -m fastbert.ops`: which backend computes each op, by device and dtype."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table

from fastbert.ops import OPS, dispatch

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


if __name__ == "__main__":
    Console().print(table())
