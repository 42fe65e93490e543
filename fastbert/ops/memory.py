"""What training keeps of each op: the tensors that autograd saves, seen by its own hooks, and what backward computes
again instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastbert.ops.add_layer_norm import add_layer_norm
from fastbert.ops.attention import attention
from fastbert.ops.cross_entropy import cross_entropy
from fastbert.ops.embed import embed
from fastbert.ops.gelu import gelu
from fastbert.ops.pool import pool

RECOMPUTED = {
    "embed": "sum of rows, dropout mask",
    "attention": "probabilities, dropout mask",
    "attention_window": "probabilities, dropout mask",
    "attention_rel_bias": "probabilities, dropout mask, biased scores",
    "add_layer_norm": "x + x_bias, sum, normalised rows, dropout mask",
    "gelu": "x + bias",
    "pool": "-",
    "cross_entropy": "probabilities",
}


@dataclass(frozen=True)
class Saved:
    """Activations of one call that live until its backward pass; parameters and tables are not counted.

    Attributes:
        tensors: shape and dtype of each, in words.
        bytes_per_token: all of them, divided by T.
        recomputed: what backward computes again.
    """

    op: str
    tensors: tuple[str, ...]
    bytes_per_token: float
    recomputed: str


def saved_tensors(function: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    """What autograd saves in a call, each piece of memory once."""
    kept: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.setdefault(x.data_ptr(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        function()
    return list(kept.values())


def training_memory(
    dtype: torch.dtype = torch.bfloat16, device: str = "cpu", T: int = 128, H: int = 12, K: int = 64, V: int = 30522
) -> list[Saved]:
    """Of each op at BERT-base's sizes (hidden size H K), on the backend in force."""
    D = H * K

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype).requires_grad_()

    x, r, w, b = new(T, D), new(T, D), new(D), new(D)
    word, position, kind, qkv, rel_bias = new(50, D), new(T, D), new(2, D), new(T, 3, H, K), new(H, 2 * T - 1)
    inner, bias, logits = new(T, 4 * D), new(4 * D), new(T, V)
    ids, types = torch.arange(T, device=device), torch.zeros(T, dtype=torch.int64, device=device)
    cu = torch.tensor([0, T // 2, T], dtype=torch.int32, device=device)
    parameters = {t.data_ptr() for t in (w, b, word, position, kind, rel_bias, bias)}
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "embed": lambda: embed(ids % 50, ids, types, word, position, kind, w, b, dropout_p=0.1, seed=1),
        "attention": lambda: attention(qkv, cu, T, dropout_p=0.1, seed=1),
        "attention_window": lambda: attention(qkv, cu, T, dropout_p=0.1, seed=1, window=64),
        "attention_rel_bias": lambda: attention(qkv, cu, T, dropout_p=0.1, seed=1, rel_bias=rel_bias),
        "add_layer_norm": lambda: add_layer_norm(x, r, w, b, dropout_p=0.1, seed=1, x_bias=b),
        "gelu": lambda: gelu(inner, bias),
        "pool": lambda: pool(x, cu, "mean"),
        "cross_entropy": lambda: cross_entropy(logits, ids),
    }
    rows = []
    for op, call in calls.items():
        kept = [t for t in saved_tensors(call) if t.data_ptr() not in parameters]
        words = tuple(f"{tuple(t.shape)} {str(t.dtype)[6:]}" for t in kept)
        rows.append(Saved(op, words, sum(t.nbytes for t in kept) / T, RECOMPUTED[op]))
    return rows
