"""The native backend: loads the C++ extension on first use, allocates outputs, and lets `_C` check and compute.

It knows nothing of autograd or of the reference. Parameters of norms and biases go to the kernels as fp32, and their
gradients come back in their own dtype. Integer products are torch's.
"""

from __future__ import annotations

import importlib.util
import math
import os
import time
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# Rows of each thread at a time. 2048 rows take 1.0x to 1.4x as long by 64, 1.0x to 2.1x all at once, the same by 512
# (Zen 5, one thread, six shapes of 384 to 3072 features, 2026-11-23).
_INT8_ROWS = 256
_FLOATS = (torch.float32, torch.bfloat16)
_DTYPES = {
    "embed": _FLOATS,
    "attention": _FLOATS,
    "attention_rel_bias": _FLOATS,
    "attention_window": _FLOATS,
    "add_layer_norm": _FLOATS,
    "gelu": _FLOATS,
    "pool": _FLOATS,
    "l2_normalize": _FLOATS,
    "cross_entropy": _FLOATS,
    "int8_linear": _FLOATS,
    "plan_mask": (torch.bool,),
    "plan_batches": (torch.int64,),
    "plan_concat": (torch.int64,),
}


@cache
def available() -> bool:
    """Whether the extension was built. One that is there but does not load is an error in `require`, not an absence."""
    return importlib.util.find_spec("fastbert._C") is not None


@cache
def require() -> ModuleType:
    """The extension module.

    Raises:
        ImportError: it was not built (with the command that builds it), or it does not load.
        ValueError: FASTBERT_ISA names an instruction set that this CPU does not offer.
    """
    if not available():
        raise ImportError(
            "fastbert was installed without its native kernels: with a C++17 compiler at hand, run `pip install .` "
            "(or `pip install -e .`) in the source tree, without FASTBERT_NATIVE=0"
        )
    extension = importlib.import_module("fastbert._C")
    wanted = os.environ.get("FASTBERT_ISA")
    if wanted:
        try:
            extension.set_isa(wanted)
        except ValueError as error:
            raise ValueError(f"FASTBERT_ISA={wanted}: {error}") from None
    return extension


def isa() -> str:
    """The instruction set in use, the best one unless FASTBERT_ISA chooses; `_C.supported_isas()` lists them."""
    return require().isa()


def supports(op: str, device_type: str, dtype: torch.dtype) -> bool:
    """Whether this backend computes `op` on that device and dtype."""
    return device_type == "cpu" and dtype in _DTYPES.get(op, ()) and available()


def peak_flop_s(dtype: torch.dtype, seconds: float = 0.02, windows: int = 15) -> float:
    """The most FLOP/s (a product and its sum are two) that this CPU's arithmetic of a dtype does on torch's threads.

    Measured, from registers alone, as the best of some windows: no kernel of the instruction set in use is faster.

    Args:
        dtype: float32, bfloat16 or int8.
        seconds: of one window, once it is known how much fits into it.
        windows: how many.
    """
    name = str(dtype).removeprefix("torch.")
    run = require().peak_operations
    rounds, best = 1_000_000, 0.0
    for _ in range(windows):
        start = time.perf_counter()
        operations = run(name, rounds)
        best = max(best, operations / (time.perf_counter() - start))
        rounds = max(rounds, math.ceil(rounds * seconds * best / operations))
    return best


def _rows(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


def _parameter(x: Tensor) -> Tensor:
    return x.float().contiguous()


def _ids(*ids: Tensor | None) -> list[Tensor | None]:
    return [None if i is None else i.contiguous() for i in ids]


def gelu_fwd(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """See `fastbert.ops.gelu`."""
    y = torch.empty_like(x)
    require().gelu_fwd(x, None if bias is None else _parameter(bias), y, approximate == "tanh")
    return y


def gelu_bwd(dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor | None]:
    """dx and, with a bias, dbias."""
    dx = torch.empty_like(x)
    if bias is None:
        require().gelu_bwd(dy, x, None, dx, None, approximate == "tanh")
        return dx, None
    wide = _parameter(bias)
    dbias = torch.empty_like(wide)
    require().gelu_bwd(dy, x, wide, dx, dbias, approximate == "tanh")
    return dx, dbias.to(bias.dtype)


def _optional(x: Tensor | None) -> Tensor | None:
    return None if x is None else _parameter(x)


def add_layer_norm_fwd(
    x: Tensor,
    x_bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y in the dtype of the residual, and mean and 1/std (fp32) of each row."""
    y, mean, rstd = torch.empty_like(x if residual is None else residual), _rows(x), _rows(x)
    parameters = _parameter(weight), _parameter(bias)
    require().add_layer_norm_fwd(x, _optional(x_bias), residual, *parameters, y, mean, rstd, eps, dropout_p, seed)
    return y, mean, rstd


def add_layer_norm_bwd(
    dy: Tensor,
    x: Tensor,
    x_bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """dx, dx_bias, dresidual, dweight, dbias. dx and dresidual are one tensor where they are equal."""
    dx, wide_x_bias, wide = torch.empty_like(x), _optional(x_bias), _parameter(weight)
    same = residual is not None and residual.dtype == x.dtype and dropout_p == 0.0
    dresidual = None if residual is None or same else torch.empty_like(residual)
    dx_bias = None if wide_x_bias is None else torch.empty_like(wide_x_bias)
    dweight, dbias = torch.empty_like(wide), torch.empty_like(wide)
    require().add_layer_norm_bwd(
        dy, x, wide_x_bias, residual, wide, mean, rstd, dx, dx_bias, dresidual, dweight, dbias, dropout_p, seed
    )
    if x_bias is not None and dx_bias is not None:
        dx_bias = dx_bias.to(x_bias.dtype)
    return dx, dx_bias, dx if same else dresidual, dweight.to(weight.dtype), dbias.to(weight.dtype)


def embed_fwd(
    input_ids: Tensor,
    position_ids: Tensor,
    type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and 1/std (fp32) of each row."""
    y = word.new_empty(input_ids.shape[0], word.shape[1])
    mean, rstd = _rows(y), _rows(y)
    tables = (*_ids(input_ids, position_ids, type_ids), word, position, token_type)
    require().embed_fwd(*tables, _parameter(weight), _parameter(bias), y, mean, rstd, eps, dropout_p, seed)
    return y, mean, rstd


def embed_bwd(
    dy: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    padding_idx: int | None,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """dword, dposition, dtoken_type (dense), dweight, dbias. Tables sum in fp32 and are rounded once."""
    tables = (word, position, token_type)
    dword, dposition, dtoken_type = (None if t is None else torch.zeros_like(t, dtype=torch.float32) for t in tables)
    wide = _parameter(weight)
    dweight, dbias = torch.empty_like(wide), torch.empty_like(wide)
    skipped = -1 if padding_idx is None else padding_idx % word.shape[0]  # torch counts a negative one from the end
    require().embed_bwd(
        dy, *_ids(input_ids, position_ids, type_ids), *tables, wide, mean, rstd, dword, dposition, dtoken_type,
        dweight, dbias, skipped, dropout_p, seed,
    )  # fmt: skip
    grads = (None if d is None else d.to(word.dtype) for d in (dword, dposition, dtoken_type))
    return *grads, dweight.to(weight.dtype), dbias.to(weight.dtype)  # type: ignore[return-value]


def _attention_fwd(
    qkv: Tensor, rel_bias: Tensor | None, half: int | None, cu_seqlens: Tensor, max_seqlen: int, *rest: Any
) -> tuple[Tensor, Tensor]:
    T, _, H, K = qkv.shape
    out, lse = qkv.new_empty(T, H, K), qkv.new_empty(T, H, dtype=torch.float32)
    half = max_seqlen if half is None else min(half, max_seqlen)
    require().attention_fwd(qkv, _optional(rel_bias), cu_seqlens.contiguous(), out, lse, max_seqlen, half, *rest)
    return out, lse


def _attention_bwd(
    dout: Tensor, qkv: Tensor, rel_bias: Tensor | None, half: int | None, out: Tensor, lse: Tensor, cu_seqlens: Tensor,
    max_seqlen: int, *rest: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    dqkv, cu, wide = torch.empty_like(qkv), cu_seqlens.contiguous(), _optional(rel_bias)
    dwide = None if wide is None else torch.empty_like(wide)
    half = max_seqlen if half is None else min(half, max_seqlen)
    require().attention_bwd(dout, qkv, wide, out, lse, cu, dqkv, dwide, max_seqlen, half, *rest)
    return dqkv, None if dwide is None or rel_bias is None else dwide.to(rel_bias.dtype)


def attention_fwd(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """qkv, cu_seqlens, max_seqlen, scale, dropout_p, seed -> out (T, H, K), and the log-sum-exp (T, H) fp32 of the
    scaled scores."""
    return _attention_fwd(qkv, None, None, *rest)


def attention_bwd(dout: Tensor, qkv: Tensor, *rest: Any) -> Tensor:
    """dout, qkv, out, lse and the rest as in `attention_fwd` -> dqkv (T, 3, H, K)."""
    return _attention_bwd(dout, qkv, None, None, *rest)[0]


def attention_window_fwd(qkv: Tensor, window: int, *rest: Any) -> tuple[Tensor, Tensor]:
    """As `attention_fwd`, of the keys at most `window // 2` away."""
    return _attention_fwd(qkv, None, window // 2, *rest)


def attention_window_bwd(dout: Tensor, qkv: Tensor, window: int, *rest: Any) -> Tensor:
    """As `attention_bwd`."""
    return _attention_bwd(dout, qkv, None, window // 2, *rest)[0]


def attention_rel_bias_fwd(qkv: Tensor, rel_bias: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """As `attention_fwd`, with a bias (H, 2R - 1)."""
    return _attention_fwd(qkv, rel_bias, None, *rest)


def attention_rel_bias_bwd(dout: Tensor, qkv: Tensor, rel_bias: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
    """As `attention_bwd`, and drel_bias (H, 2R - 1)."""
    return _attention_bwd(dout, qkv, rel_bias, None, *rest)


def pool_fwd(hidden: Tensor, cu_seqlens: Tensor, mode: str) -> tuple[Tensor, Tensor | None]:
    """out (S, D) and, for max, the token (S, D) int32 of each maximum (the first of equals), -1 if there is none."""
    out = hidden.new_empty(cu_seqlens.numel() - 1, hidden.shape[1])
    argmax = torch.empty_like(out, dtype=torch.int32) if mode == "max" else None
    require().pool_fwd(hidden, cu_seqlens.contiguous(), out, argmax, mode)
    return out, argmax


def pool_bwd(dout: Tensor, cu_seqlens: Tensor, mode: str, num_tokens: int, argmax: Tensor | None) -> Tensor:
    """dhidden (T, D)."""
    dhidden = dout.new_empty(num_tokens, dout.shape[1])
    require().pool_bwd(dout, cu_seqlens.contiguous(), argmax, dhidden, mode)
    return dhidden


def l2_normalize_fwd(x: Tensor) -> Tensor:
    """See `fastbert.ops.l2_normalize`."""
    y = torch.empty_like(x, dtype=torch.float32)
    require().l2_normalize_fwd(x, y)
    return y


def cross_entropy_fwd(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Loss (M) fp32 and log-sum-exp (M) fp64 of each row; the loss of an ignored row is 0."""
    losses, lse = _rows(logits), logits.new_empty(logits.shape[0], dtype=torch.float64)
    require().cross_entropy_fwd(logits, labels, losses, lse, ignore_index)
    return losses, lse


def cross_entropy_bwd(scale: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int) -> Tensor:
    """dlogits (M, V); `scale` () fp32 is the gradient of each labelled row's loss."""
    dlogits = torch.empty_like(logits)
    require().cross_entropy_bwd(scale, logits, labels, lse, dlogits, ignore_index)
    return dlogits


def int8_linear_fwd(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """y (T, N), some rows at a time, so that their integer sums stay in cache."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    wide = [None if v is None else _parameter(v) for v in (weight_scale, bias)]
    rows = _INT8_ROWS * torch.get_num_threads()
    for part, y_part in zip(x.split(rows), y.split(rows), strict=True):
        q, scale = torch.empty_like(part, dtype=torch.int8), _rows(part)
        require().int8_linear_quantize(part, q, scale)
        require().int8_linear_scale(torch._int_mm(q, weight.mT), scale, *wide, y_part)
    return y


def plan_mask_fwd(mask: Tensor) -> tuple[Tensor, Tensor, int]:
    """See `fastbert.ops.plan_mask`."""
    cu_seqlens = torch.empty(mask.shape[0] + 1, dtype=torch.int32)
    num_tokens, max_seqlen = require().mask_lengths(mask, cu_seqlens)
    indices = torch.empty(num_tokens, dtype=torch.int64)
    require().mask_indices(mask, indices)
    return indices, cu_seqlens, max_seqlen


def plan_batches_fwd(lengths: Tensor, budget_tokens: int, max_sequences: int | None) -> tuple[Tensor, list[int]]:
    """See `fastbert.ops.plan_batches`."""
    order = torch.empty_like(lengths)
    bounds = require().batches(lengths, order, budget_tokens, -1 if max_sequences is None else max_sequences)
    return order, bounds


def plan_concat_fwd(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor, int]:
    """See `fastbert.ops.plan_concat`. Anything with `__index__` is an int; one past 64 bits raises OverflowError."""
    num_tokens = sum(map(len, sequences))
    ids, positions = torch.empty(num_tokens, dtype=torch.int64), torch.empty(num_tokens, dtype=torch.int64)
    cu_seqlens = torch.empty(len(sequences) + 1, dtype=torch.int32)
    return ids, positions, cu_seqlens, require().concat(sequences, ids, positions, cu_seqlens)
