"""The op kernels that move bytes, beside plain torch and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.gpu.report import Report, Run, checked, forced, tensors
from fastbert import ops


def memory_bound(report: Report) -> Iterator[None]:
    """The op kernels that move bytes, beside plain torch and torch.compile, forward and backward."""
    at = report.at
    T = at.tokens * (1 if at.dry else 4)
    for D in (at.config.hidden_size, at.large.hidden_size):
        x, residual, dy = (tensors(at, T, D) for _ in range(3))
        small = (tensors(at, D) for _ in range(3))
        leaves = [t.detach().requires_grad_() for t in (x, residual, *small)]
        run = partial(_ours, *leaves)
        variants: dict[str, Run] = {"fastbert": forced(run, at), "torch": partial(_add_layer_norm, *leaves)}
        if not at.dry:
            variants["torch.compile"] = partial(torch.compile(_add_layer_norm, dynamic=False), *leaves)
        with torch.no_grad():
            good = checked("add_layer_norm", at, variants, variants["torch"]())
            forward = report.add("add_layer_norm", f"T{T}_D{D}", "forward", good, 3 * x.nbytes, 0)
        both: dict[str, Run] = {name: partial(_both, variant, leaves, dy) for name, variant in variants.items()}
        both["fastbert"] = forced(both["fastbert"], at)
        good = checked("add_layer_norm", at, both, both["torch"]())
        whole = report.add("add_layer_norm", f"T{T}_D{D}", "training", good, 7 * x.nbytes, 0)
        report.subtract("add_layer_norm", f"T{T}_D{D}", whole, forward, 4 * x.nbytes, 0)
        yield
    inner, bias = tensors(at, at.tokens, at.config.intermediate_size), tensors(at, at.config.intermediate_size)
    with torch.no_grad():
        runs = {
            "fastbert": forced(partial(ops.gelu, inner, bias), at),
            "torch": lambda: F.gelu(inner + bias),
        }
        good = checked("gelu", at, runs, F.gelu(inner.float() + bias.float()))
        report.add("gelu", f"T{at.tokens}_F{inner.shape[1]}", "forward", good, 2 * inner.nbytes, 0)
    yield


def _ours(
    x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor, b: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return ops.add_layer_norm(x, residual, w, b, x_bias=bias)


def _add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor, b: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """With the bias of the linear layer before, whose gradient is a sum over all rows."""
    return F.layer_norm(x + bias + residual, w.shape, w, b, 1e-12)


def _both(run: Run, leaves: list[torch.Tensor], dy: torch.Tensor) -> torch.Tensor:
    """Forward and backward; dx."""
    return torch.autograd.grad(run(), leaves, dy)[0]
