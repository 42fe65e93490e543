"""The Triton backend: raw functions on tensors, `<op>_fwd` and `<op>_bwd`; no autograd, no modules, no dispatch.

One file an op; `configs.py` has every block size; `python -m fastbert.kernels` compiles all of it without a GPU.
Triton itself is imported with the first kernel.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_FILES = {op: op for op in ("embed", "attention", "add_layer_norm", "gelu", "pool", "l2_normalize", "cross_entropy")}
_FILES |= dict.fromkeys(("attention_rel_bias", "attention_window"), "attention")
_EPILOGUES = ("linear", "linear_gelu", "linear_add", "linear_add_norm", "norm_linear")
_FILES |= dict.fromkeys((*_EPILOGUES, "float8_linear"), "linear") | {"linear_add_norm": "short"}
_PARTS = {  # of fused layers, which engine/cuda.py builds: no op of their own
    "add_layer_norm_float8": "add_layer_norm",
    **dict.fromkeys(("float8_rows_linear", "float8_gelu", "linear_rows", "fold_norm"), "linear"),
    "quantize_rows": "float8",
}
_RANGES = ("fill_ranges", "given_ranges", "load_batch")
_OLDEST = (8, 0)  # Ampere: bf16 tensor cores and asynchronous copies
_OLDEST_FLOAT8 = (8, 9)


@cache
def available() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run on the CPU in Triton's interpreter (TRITON_INTERPRET=1 before the first kernel)."""
    return available() and bool(importlib.import_module("triton.knobs").runtime.interpret)


def _too_old() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() < _OLDEST


def supports(op: str, device_type: str, dtype: torch.dtype) -> bool:
    """Whether this backend computes `op` on that device and dtype."""
    if op not in _FILES or dtype not in DTYPES or not available():
        return False
    if device_type == "cpu":  # the interpreter multiplies the raw bits of bf16
        return interpreted() and dtype != torch.bfloat16
    if device_type != "cuda" or interpreted() or _too_old():
        return False
    if op not in (*_EPILOGUES, "float8_linear"):
        return True
    if not torch.cuda.is_available():  # the rest depends on which GPU it is
        return False
    if op == "float8_linear":
        return torch.cuda.get_device_capability() >= _OLDEST_FLOAT8
    configs = importlib.import_module(f"{__name__}.configs")
    return dtype.itemsize == 2 and op in configs.EPILOGUES.get(configs.architecture(), ())  # fp32 has small tiles


def pays(op: str, num_rows: int, weight_shape: tuple[int, ...]) -> bool:
    """Whether a linear layer over so many rows was measured to be faster here than the vendor's GEMM."""
    configs = importlib.import_module(f"{__name__}.configs")
    if op in configs.SHORT_OPS and configs.is_short(num_rows, weight_shape):
        return True
    return any(num_rows in rows for rows in configs.EPILOGUES.get(configs.architecture(), {}).get(op, ()))


def require() -> None:
    """Raise ImportError without Triton, RuntimeError on a GPU that is too old for these kernels."""
    if not available():
        raise ImportError("the triton backend was forced but Triton is not installed: `pip install triton`")
    if _too_old():
        found, needed = (".".join(map(str, c)) for c in (torch.cuda.get_device_capability(), _OLDEST))
        raise RuntimeError(f"the triton backend needs compute capability {needed}, this GPU has {found}")


def __getattr__(name: str) -> Callable[..., Any]:
    if name in _RANGES:
        return getattr(importlib.import_module(f"{__name__}.ranges"), name)
    op = name.removesuffix("_fwd").removesuffix("_bwd")
    file = (_FILES | _PARTS).get(op)
    if op == name or file is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{file}"), name)
