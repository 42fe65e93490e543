"""Attention, forward and backward, beside torch's varlen kernel, cuDNN, FlashAttention and FlexAttention."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.report import Report, Run, checked, forced, tensors
from fastbert import ops
from fastbert.ops.attention import attention_ref


def varlen(qkv: torch.Tensor, cu: torch.Tensor, length: int, window: int | None = None) -> torch.Tensor:
    """torch.nn.attention.varlen, FlashAttention 2 beneath. On a CPU, which has none, the call is held against its
    signature, and our reference computes it. Older ones take no window."""
    from torch.nn.attention.varlen import varlen_attn

    arguments = (*qkv.unbind(1), cu, cu, length, length)
    sides: dict[str, Any] = {} if window is None else {"window_size": (window // 2, window // 2)}
    if qkv.device.type == "cpu":
        inspect.signature(varlen_attn).bind(*arguments, **sides)
        return attention_ref(qkv, cu, length, window=window)
    return varlen_attn(*arguments, **sides)


def padded_sdpa(backend: str, qkv: torch.Tensor, length: int) -> torch.Tensor:
    """scaled_dot_product_attention of equally long sequences with one of its kernels."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    T, _, H, K = qkv.shape
    q, k, v = qkv.view(-1, length, 3, H, K).permute(2, 0, 3, 1, 4)
    with sdpa_kernel(getattr(SDPBackend, backend)):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(T, H, K)


class Flex:
    """FlexAttention with a document mask, its compiled kernel."""

    def __init__(self, qkv: torch.Tensor, length: int) -> None:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        T = qkv.shape[0]
        document = torch.arange(T, device=qkv.device) // length
        self.mask = create_block_mask(
            lambda b, h, i, j: document[i] == document[j], None, None, T, T, device=str(qkv.device)
        )
        self.run = flex_attention if qkv.device.type == "cpu" else torch.compile(flex_attention)
        self.qkv = qkv

    def __call__(self) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in self.qkv.unbind(1))
        return self.run(q, k, v, block_mask=self.mask)[0].transpose(0, 1)


def attention(report: Report) -> Iterator[None]:
    """Heads of 64, equally long sequences, the longest first; forward, then forward and backward."""
    at = report.at
    H, K = at.config.num_attention_heads, at.config.hidden_size // at.config.num_attention_heads
    for length in (at.lengths[-1], *at.lengths[:-1]):
        qkv, dout = tensors(at, at.tokens, 3, H, K), tensors(at, at.tokens, H, K)
        cu = torch.arange(0, at.tokens + 1, length, dtype=torch.int32, device=at.device)
        nbytes, flop = qkv.nbytes / 3 * 4, 4 * at.tokens * length * H * K
        case = f"T{at.tokens}_S{length}"
        runs = {
            "fastbert": forced(partial(ops.attention, qkv, cu, length), at),
            "torch varlen_attn": partial(varlen, qkv, cu, length),
            "cudnn": partial(padded_sdpa, "CUDNN_ATTENTION", qkv, length),
            "flash (padded)": partial(padded_sdpa, "FLASH_ATTENTION", qkv, length),
        }
        if length in (at.lengths[-1], at.lengths[len(at.lengths) // 2]):  # it is compiled for seconds
            flex: list[Flex] = []

            def flexed(qkv: torch.Tensor = qkv, length: int = length, flex: list[Flex] = flex) -> torch.Tensor:
                flex or flex.append(Flex(qkv, length))  # made once, and where it fails, in the check
                return flex[0]()

            runs["flex"] = flexed
        right = padded_sdpa("MATH", qkv, length)
        with torch.no_grad():
            forward = report.add("attention", case, "forward", checked("attention", at, runs, right), nbytes, flop)
        yield
        leaf = qkv.detach().requires_grad_()
        runs = {
            "fastbert": forced(partial(ops.attention, leaf, cu, length), at),
            "torch varlen_attn": partial(varlen, leaf, cu, length),
            "cudnn": partial(padded_sdpa, "CUDNN_ATTENTION", leaf, length),
        }

        def both(run: Run, leaf: torch.Tensor = leaf, dout: torch.Tensor = dout) -> torch.Tensor:
            return torch.autograd.grad(run(), leaf, dout)[0]

        both_ways = {name: partial(both, run) for name, run in runs.items()}
        right = both(partial(padded_sdpa, "MATH", leaf, length))
        good = checked("attention", at, both_ways, right)
        good = {name: forced(run, at) if name == "fastbert" else run for name, run in good.items()}
        whole = report.add("attention", case, "training", good, 3 * nbytes, 3.5 * flop)
        report.subtract("attention", case, whole, forward, 2 * nbytes, 2.5 * flop)
        yield
        if length == at.lengths[-1]:
            in_a_window(report, qkv, cu, length)
            yield


def in_a_window(report: Report, qkv: torch.Tensor, cu: torch.Tensor, length: int) -> None:
    """A quarter of the keys."""
    (T, _, H, K), window, at = qkv.shape, length // 4, report.at
    with torch.no_grad():
        runs = {
            "fastbert": forced(partial(ops.attention, qkv, cu, length, window=window), at),
            "torch varlen_attn": partial(varlen, qkv, cu, length, window),
        }
        good = checked("attention_window", at, runs, attention_ref(qkv, cu, length, window=window))
        flop = 4 * T * (window + 1) * H * K
        report.add("attention_window", f"T{T}_S{length}_W{window}", "forward", good, qkv.nbytes / 3 * 4, flop)
