"""`pytest benchmarks --benchmark-only`: every op case, backend, dtype and mode through pytest-benchmark.

The cases, and the check before the clock starts, are those of `benchmarks.ops`, which also knows roofs and peers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from benchmarks import ops as suite
from fastbert import ops, testing
from fastbert.ops import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRID = [
    pytest.param(case, backend, dtype, mode, id=f"{case}-{backend}-{str(dtype)[6:]}-{mode}")
    for case in testing.BENCHMARK_CASES
    for mode in suite.modes_of(case)
    for dtype in (torch.float32, torch.bfloat16)
    for backend in (*dispatch.BACKENDS, dispatch.REFERENCE)
    if dispatch.has(backend, case.op, DEVICE, dtype)
]


@pytest.mark.parametrize(("case", "backend", "dtype", "mode"), GRID)
def test_op(benchmark: Any, case: testing.Case, backend: str, dtype: torch.dtype, mode: str) -> None:
    """A red check times nothing."""
    with ops.use_backend(backend):
        testing.check_case(case, dtype, DEVICE)
    run = suite.forward if mode == "forward" else suite.training
    benchmark.group = f"{case} {mode} {str(dtype)[6:]}"
    benchmark(partial(run, testing.PUBLIC[case.op], backend, case.inputs(dtype, DEVICE)))
