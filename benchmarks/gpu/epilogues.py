"""GEMMs with epilogues and in float8, beside the vendor's GEMM and a kernel after it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.gpu.report import Report, checked, forced, tensors
from fastbert import kernels, ops
from fastbert.ops.float8_linear import float8_linear_ref, quantize_rows_float8


def epilogues(report: Report) -> Iterator[None]:
    """What `kernels/configs.EPILOGUES` should name on this architecture: one kernel against GEMM and kernel."""
    at = report.at
    D, N = at.config.hidden_size, at.config.intermediate_size
    with torch.no_grad():
        for T in dict.fromkeys((min(128, at.tokens), at.tokens)):
            x, up, inner, down = tensors(at, T, D), tensors(at, N, D), tensors(at, T, N), tensors(at, D, N)
            up, down = up * D**-0.5, down * N**-0.5
            b_up, b_down, residual = tensors(at, N), tensors(at, D), tensors(at, T, D)
            flop = 2 * T * D * N
            nbytes = x.nbytes + up.nbytes + inner.nbytes
            runs = {
                "fused": lambda x=x, up=up, b=b_up: kernels.linear_gelu_fwd(x, up, b, "none"),
                "cublas + fastbert": forced(lambda x=x, up=up, b=b_up: ops.gelu(F.linear(x, up, b)), at),
            }
            good = checked("linear_gelu", at, runs, F.gelu(F.linear(x, up, b_up)))
            report.add("linear_gelu", f"T{T}", "forward", good, nbytes, flop)
            runs = {
                "fused": lambda x=inner, w=down, b=b_down, r=residual: kernels.linear_add_fwd(x, w, b, r),
                "cublas + torch": lambda x=inner, w=down, b=b_down, r=residual: F.linear(x, w, b) + r,
            }
            good = checked("linear_add", at, runs, F.linear(inner, down, b_down) + residual)
            report.add("linear_add", f"T{T}", "forward", good, nbytes + x.nbytes, flop)
            gamma = torch.ones_like(b_down)
            if T <= 128:
                norm = (residual, gamma, b_down)
                runs = {
                    "fused": lambda x=inner, w=down, b=b_down, n=norm: kernels.linear_add_norm_fwd(x, w, b, *n, 1e-12),
                    "cublas + fastbert": forced(
                        lambda x=inner, w=down, b=b_down, n=norm: ops.add_layer_norm(F.linear(x, w), *n, x_bias=b), at
                    ),
                }
                right = F.layer_norm(F.linear(inner, down, b_down) + residual, (D,), gamma, b_down, 1e-12)
                good = checked("linear_add_norm", at, runs, right)
                report.add("linear_add_norm", f"T{T}", "forward", good, nbytes + x.nbytes, flop)
            yield
            half = (inner, down, b_down, residual, gamma, b_down, up, b_up)
            runs = {"fused": partial(folded_half, *half), "cublas + fastbert": forced(partial(half_layer, *half), at)}
            good = checked("norm_linear", at, runs, half_layer(*half))
            report.add("norm_linear", f"T{T}", "forward", good, 2 * nbytes, 2 * flop)
            yield
            weight, scale = quantize_rows_float8(up)
            runs = {
                "float8": forced(lambda x=x, w=weight, s=scale, b=b_up: ops.float8_linear(x, w, s, b), at),
                "torch._scaled_mm": partial(scaled_mm, x, weight, scale, b_up),
            }
            good = checked("float8_linear", at, runs, float8_linear_ref(x, weight, scale, b_up))
            if good:
                good["cublas, not 8 bits"] = lambda x=x, up=up, b=b_up: F.linear(x, up, b)
            report.add("float8_linear", f"T{T}", "forward", good, nbytes, flop)
            yield


def half_layer(
    x: torch.Tensor, down: torch.Tensor, b_down: torch.Tensor, residual: torch.Tensor, gamma: torch.Tensor,
    beta: torch.Tensor, up: torch.Tensor, b_up: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """A GEMM, the norm of its rows, and the GEMM and GELU after it."""
    y = ops.add_layer_norm(F.linear(x, down), residual, gamma, beta, x_bias=b_down)
    return ops.gelu(F.linear(y, up, b_up))


def folded_half(
    x: torch.Tensor, down: torch.Tensor, b_down: torch.Tensor, residual: torch.Tensor, gamma: torch.Tensor,
    beta: torch.Tensor, up: torch.Tensor, b_up: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The same with the norm in the two GEMMs; weights are folded before, as a frozen model's are."""
    key = up.data_ptr()
    if key not in _folded:
        _folded.clear()
        _folded[key] = kernels.fold_norm_fwd(up, b_up, gamma, beta)
    rows = kernels.linear_rows_fwd(x, down, b_down, residual, gamma, beta, 1e-12)
    return kernels.norm_linear_fwd(rows, _folded[key], "erf")


_folded: dict[int, tuple[torch.Tensor, ...]] = {}


def scaled_mm(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """torch's float8 product with our quantisation of the rows."""
    q, row_scale = kernels.quantize_rows_fwd(x)
    return torch._scaled_mm(q, weight.mT, scale_a=row_scale[:, None], scale_b=scale[None], bias=bias, out_dtype=x.dtype)
