"""The ops as `torch.compile` sees them: each `<op>_fwd` and `<op>_bwd` is a node of the graph, not a break in it.

It has the form of a backend: `dispatch` hands it out while a call is traced, and each node asks `dispatch` for the real
one when the graph runs. Nothing here computes; a fake says what comes out. Seeds are tensors here (0-d, on the CPU), so
that every run of a compiled step draws new ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastbert.ops.dispatch import backend_for
from fastbert.ops.dropout import Seed
from fastbert.ops.plan import plan_mask

_library = torch.library.Library("fastbert", "DEF")
_ops = torch.ops.fastbert


def _register(schema: str, compute: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, torch.compiler.disable(compute), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastbert::{name}", fake, lib=_library)


def _real(op: str, x: Tensor) -> Any:
    backend = backend_for(op, x)
    if backend is None:
        raise NotImplementedError(
            f"a graph was traced with a kernel for {op} on {x.device.type}, but the reference is in force now: "
            "run it under the backend it was compiled with, or compile it again"
        )
    return backend


def _seeded(op: Callable[..., Any]) -> Callable[..., Any]:
    """The op with its last argument, a seed, made a tensor."""
    return lambda *args: op(*args[:-1], torch.as_tensor(args[-1]))


def _rows(x: Tensor) -> Tensor:
    """(T) fp32, for (T, ...) rows."""
    return x.new_empty(math.prod(x.shape[:-1]), dtype=torch.float32)


def _like(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else torch.empty_like(t) for t in tensors)


# plan_mask: how many tokens are kept, and the longest sequence, are known when the graph runs


def _plan_mask_fake(mask: Tensor) -> tuple[Tensor, Tensor, Any]:
    context = torch.library.get_ctx()
    num_tokens, max_seqlen = context.new_dynamic_size(), context.new_dynamic_size()
    indices = mask.new_empty(num_tokens, dtype=torch.int64)
    return indices, mask.new_empty(mask.shape[0] + 1, dtype=torch.int32), max_seqlen


_register("plan_mask(Tensor mask) -> (Tensor, Tensor, SymInt)", plan_mask, _plan_mask_fake)
plan_mask_node = _ops.plan_mask


# gelu

_register(
    "gelu_fwd(Tensor x, Tensor? bias, str approximate) -> Tensor",
    lambda x, bias, approximate: _real("gelu", x).gelu_fwd(x, bias, approximate),
    lambda x, bias, approximate: torch.empty_like(x),
)
_register(
    "gelu_bwd(Tensor dy, Tensor x, Tensor? bias, str approximate) -> (Tensor, Tensor?)",
    lambda dy, x, bias, approximate: _real("gelu", x).gelu_bwd(dy, x, bias, approximate),
    lambda dy, x, bias, approximate: _like(x, bias),
)
gelu_fwd, gelu_bwd = _ops.gelu_fwd, _ops.gelu_bwd


# add_layer_norm


def _add_layer_norm_fwd_fake(x: Tensor, x_bias: Tensor | None, residual: Tensor | None, *rest: Any) -> Any:
    return torch.empty_like(x if residual is None else residual), _rows(x), _rows(x)


def _add_layer_norm_bwd(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    dx, dx_bias, dresidual, *parameters = _real("add_layer_norm", x).add_layer_norm_bwd(
        dy, x, *rest[:-1], int(rest[-1])
    )
    return dx, dx_bias, None if dresidual is dx else dresidual, *parameters  # an output must not be another one's alias


def _one_gradient(x: Tensor, residual: Tensor | None, p: float) -> bool:
    """Whether the residual's gradient is dx."""
    return residual is not None and residual.dtype == x.dtype and p == 0.0


def _add_layer_norm_bwd_fake(
    dy: Tensor, x: Tensor, x_bias: Tensor | None, residual: Tensor | None, weight: Tensor, mean: Any, rstd: Any,
    p: float, seed: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    return _like(x, x_bias, None if _one_gradient(x, residual, p) else residual, weight, weight)


_register(
    "add_layer_norm_fwd(Tensor x, Tensor? x_bias, Tensor? residual, Tensor weight, Tensor bias, float eps, "
    "float dropout_p, Tensor seed) -> (Tensor, Tensor, Tensor)",
    lambda x, *rest: _real("add_layer_norm", x).add_layer_norm_fwd(x, *rest[:-1], int(rest[-1])),
    _add_layer_norm_fwd_fake,
)
_register(
    "add_layer_norm_bwd(Tensor dy, Tensor x, Tensor? x_bias, Tensor? residual, Tensor weight, Tensor mean, "
    "Tensor rstd, float dropout_p, Tensor seed) -> (Tensor, Tensor?, Tensor?, Tensor, Tensor)",
    _add_layer_norm_bwd,
    _add_layer_norm_bwd_fake,
)
add_layer_norm_fwd = _seeded(_ops.add_layer_norm_fwd)


def add_layer_norm_bwd(
    dy: Tensor, x: Tensor, x_bias: Tensor | None, residual: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor,
    p: float, seed: Seed,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dx, dx_bias, dresidual, dweight, dbias; dresidual is dx where they are equal."""
    dx, dx_bias, dresidual, *parameters = _seeded(_ops.add_layer_norm_bwd)(
        dy, x, x_bias, residual, weight, mean, rstd, p, seed
    )
    return dx, dx_bias, dx if _one_gradient(x, residual, p) else dresidual, *parameters


# embed

_TABLES = "Tensor input_ids, Tensor position_ids, Tensor? type_ids, Tensor word, Tensor position, Tensor? token_type"


def _embed_fwd_fake(input_ids: Tensor, position_ids: Tensor, type_ids: Tensor | None, word: Tensor, *rest: Any) -> Any:
    y = word.new_empty(input_ids.shape[0], word.shape[1])
    return y, _rows(y), _rows(y)


_register(
    f"embed_fwd({_TABLES}, Tensor weight, Tensor bias, float eps, float dropout_p, Tensor seed) "
    "-> (Tensor, Tensor, Tensor)",
    lambda *args: _real("embed", args[3]).embed_fwd(*args[:-1], int(args[-1])),
    _embed_fwd_fake,
)
_register(
    f"embed_bwd(Tensor dy, {_TABLES}, Tensor weight, Tensor mean, Tensor rstd, int? padding_idx, float dropout_p, "
    "Tensor seed) -> (Tensor, Tensor, Tensor?, Tensor, Tensor)",
    lambda *args: _real("embed", args[4]).embed_bwd(*args[:-1], int(args[-1])),
    lambda dy, ids, positions, types, word, position, token_type, weight, *rest: _like(
        word, position, token_type, weight, weight
    ),
)
embed_fwd, embed_bwd = _seeded(_ops.embed_fwd), _seeded(_ops.embed_bwd)


# attention, alone, in a window, and with a relative bias

_TAIL = "Tensor cu_seqlens, SymInt max_seqlen, float scale, float dropout_p, Tensor seed"


def _attention_fwd_fake(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    T, _, H, K = qkv.shape
    return qkv.new_empty(T, H, K), qkv.new_empty(T, H, dtype=torch.float32)


_register(
    f"attention_fwd(Tensor qkv, {_TAIL}) -> (Tensor, Tensor)",
    lambda qkv, *rest: _real("attention", qkv).attention_fwd(qkv, *rest[:-1], int(rest[-1])),
    _attention_fwd_fake,
)
_register(
    f"attention_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor lse, {_TAIL}) -> Tensor",
    lambda dout, qkv, *rest: _real("attention", qkv).attention_bwd(dout, qkv, *rest[:-1], int(rest[-1])),
    lambda dout, qkv, *rest: torch.empty_like(qkv),
)
_register(
    f"attention_window_fwd(Tensor qkv, SymInt window, {_TAIL}) -> (Tensor, Tensor)",
    lambda qkv, *rest: _real("attention_window", qkv).attention_window_fwd(qkv, *rest[:-1], int(rest[-1])),
    _attention_fwd_fake,
)
_register(
    f"attention_window_bwd(Tensor dout, Tensor qkv, SymInt window, Tensor out, Tensor lse, {_TAIL}) -> Tensor",
    lambda dout, qkv, *rest: _real("attention_window", qkv).attention_window_bwd(dout, qkv, *rest[:-1], int(rest[-1])),
    lambda dout, qkv, *rest: torch.empty_like(qkv),
)
_register(
    f"attention_rel_bias_fwd(Tensor qkv, Tensor rel_bias, {_TAIL}) -> (Tensor, Tensor)",
    lambda qkv, *rest: _real("attention_rel_bias", qkv).attention_rel_bias_fwd(qkv, *rest[:-1], int(rest[-1])),
    _attention_fwd_fake,
)
_register(
    f"attention_rel_bias_bwd(Tensor dout, Tensor qkv, Tensor rel_bias, Tensor out, Tensor lse, {_TAIL}) "
    "-> (Tensor, Tensor)",
    lambda dout, qkv, *rest: _real("attention_rel_bias", qkv).attention_rel_bias_bwd(
        dout, qkv, *rest[:-1], int(rest[-1])
    ),
    lambda dout, qkv, rel_bias, *rest: _like(qkv, rel_bias),
)
attention_fwd, attention_bwd = _seeded(_ops.attention_fwd), _seeded(_ops.attention_bwd)
attention_window_fwd = _seeded(_ops.attention_window_fwd)
attention_window_bwd = _seeded(_ops.attention_window_bwd)
attention_rel_bias_fwd = _seeded(_ops.attention_rel_bias_fwd)
attention_rel_bias_bwd = _seeded(_ops.attention_rel_bias_bwd)


# pool


def _pool_fwd_fake(hidden: Tensor, cu_seqlens: Tensor, mode: str) -> tuple[Tensor, Tensor | None]:
    out = hidden.new_empty(cu_seqlens.shape[0] - 1, hidden.shape[1])
    return out, torch.empty_like(out, dtype=torch.int32) if mode == "max" else None


_register(
    "pool_fwd(Tensor hidden, Tensor cu_seqlens, str mode) -> (Tensor, Tensor?)",
    lambda hidden, cu_seqlens, mode: _real("pool", hidden).pool_fwd(hidden, cu_seqlens, mode),
    _pool_fwd_fake,
)
_register(
    "pool_bwd(Tensor dout, Tensor cu_seqlens, str mode, SymInt num_tokens, Tensor? argmax) -> Tensor",
    lambda dout, *rest: _real("pool", dout).pool_bwd(dout, *rest),
    lambda dout, cu_seqlens, mode, num_tokens, argmax: dout.new_empty(num_tokens, dout.shape[1]),
)
pool_fwd, pool_bwd = _ops.pool_fwd, _ops.pool_bwd


# cross_entropy


def _cross_entropy_fwd_fake(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    M = logits.shape[0]
    if logits.device.type == "cpu":
        return _rows(logits), logits.new_empty(M, dtype=torch.float64)
    return _rows(logits), logits.new_empty(2, M, dtype=torch.float32)


_register(
    "cross_entropy_fwd(Tensor logits, Tensor labels, int ignore_index) -> (Tensor, Tensor)",
    lambda logits, *rest: _real("cross_entropy", logits).cross_entropy_fwd(logits, *rest),
    _cross_entropy_fwd_fake,
)
_register(
    "cross_entropy_bwd(Tensor scale, Tensor logits, Tensor labels, Tensor lse, int ignore_index) -> Tensor",
    lambda scale, logits, *rest: _real("cross_entropy", logits).cross_entropy_bwd(scale, logits, *rest),
    lambda scale, logits, *rest: torch.empty_like(logits),
)
cross_entropy_fwd, cross_entropy_bwd = _ops.cross_entropy_fwd, _ops.cross_entropy_bwd


# Linear layers with 8-bit weights: no backward


def _linear_fake(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_register(
    "int8_linear_fwd(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias) -> Tensor",
    lambda x, *rest: _real("int8_linear", x).int8_linear_fwd(x, *rest),
    _linear_fake,
)
_register(
    "float8_linear_fwd(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias) -> Tensor",
    lambda x, *rest: _real("float8_linear", x).float8_linear_fwd(x, *rest),
    _linear_fake,
)
int8_linear_fwd, float8_linear_fwd = _ops.int8_linear_fwd, _ops.float8_linear_fwd
