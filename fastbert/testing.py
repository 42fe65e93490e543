"""The error budget, and the inputs on which every op is tested and timed. Tests and benchmarks share both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastbert import ops
from fastbert.ops.add_layer_norm import add_layer_norm_ref
from fastbert.ops.attention import attention_ref
from fastbert.ops.cross_entropy import cross_entropy_ref
from fastbert.ops.embed import embed_ref
from fastbert.ops.gelu import gelu_ref
from fastbert.ops.int8_linear import int8_linear_ref, quantize_rows
from fastbert.ops.pool import MODES, pool_ref

Inputs = dict[str, Any]

FORWARD_FACTOR, GRADIENT_FACTOR = 2.0, 3.0


def assert_within_budget(
    ours: torch.Tensor, same: torch.Tensor, exact: torch.Tensor, factor: float = FORWARD_FACTOR, what: str = "output"
) -> None:
    """Fail unless max|ours - exact| <= factor * max|same - exact| + eps(dtype) * max|exact|.

    Args:
        ours: the result under test, in the tested dtype.
        same: the reference computed in the tested dtype.
        exact: the reference computed in fp64 on the same (rounded) inputs.
        factor: 2 for outputs, 3 for gradients.

    Raises:
        AssertionError: past the budget, or NaN or infinity where the exact result is finite; it prints both errors.
    """
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == same.dtype, f"{what}: dtype {ours.dtype}, expected {same.dtype}"
    if exact.numel() == 0:
        return
    finite = torch.isfinite(exact)
    wrong = int((torch.isfinite(ours) != finite).sum())
    assert wrong == 0, f"{what}: {wrong} of {exact.numel()} values are not finite where they should be (or the reverse)"
    exact = torch.where(finite, exact, 0.0)
    error, allowed = ((torch.where(finite, x.double(), 0.0) - exact).abs().max().item() for x in (ours, same))
    budget = factor * allowed + torch.finfo(ours.dtype).eps * exact.abs().max().item()
    assert error <= budget, f"{what}: error {error:.3e} > budget {budget:.3e} ({factor} x reference {allowed:.3e})"


@dataclass(frozen=True)
class Case:
    """One op on one set of inputs. `make(generator)` gives its keyword arguments, floating tensors in fp64; those named
    in `wide` are fp32 whatever dtype is tested, as parameters are under autocast. An op that does not train has no
    backward, and no input requires a gradient."""

    op: str
    name: str
    make: Callable[[torch.Generator], Inputs]
    wide: tuple[str, ...] = ()
    trains: bool = True

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Inputs:
        """Fresh inputs, rounded to `dtype`, that require gradients where the op has them."""
        made = self.make(torch.Generator().manual_seed(seed))
        return {k: self._place(v, torch.float32 if k in self.wide else dtype, device) for k, v in made.items()}

    def _place(self, value: Any, dtype: torch.dtype, device: str) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.is_floating_point():
            return value.to(dtype).to(device).requires_grad_(self.trains)
        return value.to(device)

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


REFERENCES: dict[str, Callable[..., torch.Tensor]] = {
    "add_layer_norm": add_layer_norm_ref,
    "attention": attention_ref,
    "attention_rel_bias": attention_ref,
    "attention_window": attention_ref,
    "cross_entropy": cross_entropy_ref,
    "embed": embed_ref,
    "gelu": gelu_ref,
    "int8_linear": int8_linear_ref,
    "pool": pool_ref,
}

PUBLIC: dict[str, Callable[..., torch.Tensor]] = {
    name: getattr(ops, name.removesuffix("_rel_bias").removesuffix("_window")) for name in REFERENCES
}


def widen(inputs: Mapping[str, Any]) -> Inputs:
    """The same (rounded) inputs in fp64."""
    wide = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    return {**inputs, **{k: v.detach().double().requires_grad_(v.requires_grad) for k, v in wide.items()}}


def forward_backward(function: Callable[..., torch.Tensor], inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Output and the gradient of each floating input, keyed `output`, `d<name>`; the upstream gradient is fixed."""
    leaves = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.requires_grad}
    output = function(**inputs)
    if not leaves:
        return {"output": output}
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    grads = torch.autograd.grad(output, list(leaves.values()), upstream.to(output.device, output.dtype))
    return {"output": output.detach(), **{f"d{k}": g for k, g in zip(leaves, grads, strict=True)}}


def check_case(
    case: Case, dtype: torch.dtype, device: str = "cpu", function: Callable[..., torch.Tensor] | None = None
) -> None:
    """Hold `function` (default: the public op, on whatever backend is in force) to the budget, with all gradients."""
    inputs = case.inputs(dtype, device)
    reference = REFERENCES[case.op]
    exact = forward_backward(reference, widen(inputs))
    same = forward_backward(reference, inputs)
    ours = forward_backward(function or PUBLIC[case.op], inputs)
    for key in exact:
        factor = FORWARD_FACTOR if key == "output" else GRADIENT_FACTOR
        assert_within_budget(ours[key], same[key], exact[key], factor, f"{case} {key}")


def cu_seqlens_of(lengths: list[int]) -> torch.Tensor:
    """(S + 1) int32 from S lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _normal(g: torch.Generator, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64) * scale


def _gelu(T: int, F: int, *, bias: bool = True, approximate: str = "none", scale: float = 2.0) -> Callable[..., Inputs]:
    return lambda g: {
        "x": _normal(g, T, F, scale=scale),
        "bias": _normal(g, F) if bias else None,
        "approximate": approximate,
    }


def _add_layer_norm(
    T: int, D: int, *, residual: bool = True, p: float = 0.0, eps: float = 1e-12, offset: float = 0.0,
    linear: bool = False,
) -> Callable[..., Inputs]:  # fmt: skip
    return lambda g: {
        "x": _normal(g, T, D) + offset,
        **({"x_bias": _normal(g, D)} if linear else {}),
        "residual": _normal(g, T, D) if residual else None,
        "weight": 1 + _normal(g, D, scale=0.2),
        "bias": _normal(g, D, scale=0.2),
        "eps": eps,
        "dropout_p": p,
        "seed": 1234,
    }


def _embed(T: int, D: int, *, types: bool = True, p: float = 0.0, padding_idx: int | None = 0) -> Callable[..., Inputs]:
    V, P, N = 50, 40, 2

    def make(g: torch.Generator) -> Inputs:
        return {
            "input_ids": torch.randint(0, V, (T,), generator=g),
            "position_ids": torch.randint(0, P, (T,), generator=g),
            "type_ids": torch.randint(0, N, (T,), generator=g) if types else None,
            "word": _normal(g, V, D),
            "position": _normal(g, P, D),
            "token_type": _normal(g, N, D) if types else None,
            "weight": 1 + _normal(g, D, scale=0.2),
            "bias": _normal(g, D, scale=0.2),
            "eps": 1e-12,
            "padding_idx": padding_idx,
            "dropout_p": p,
            "seed": 99,
        }

    return make


def _attention(lengths: list[int], H: int, K: int, *, p: float = 0.0, scale: float = 1.0) -> Callable[..., Inputs]:
    return lambda g: {
        "qkv": _normal(g, sum(lengths), 3, H, K, scale=scale),
        "cu_seqlens": cu_seqlens_of(lengths),
        "max_seqlen": max(lengths),
        "dropout_p": p,
        "seed": 5,
    }


def _attention_rel_bias(lengths: list[int], H: int, K: int, R: int, *, p: float = 0.0) -> Callable[..., Inputs]:
    plain = _attention(lengths, H, K, p=p)
    return lambda g: {**plain(g), "rel_bias": _normal(g, H, 2 * R - 1)}


def _attention_window(lengths: list[int], H: int, K: int, window: int, *, p: float = 0.0) -> Callable[..., Inputs]:
    plain = _attention(lengths, H, K, p=p)
    return lambda g: {**plain(g), "window": window}


def _pool(lengths: list[int], D: int, mode: str) -> Callable[..., Inputs]:
    return lambda g: {"hidden": _normal(g, sum(lengths), D), "cu_seqlens": cu_seqlens_of(lengths), "mode": mode}


def _cross_entropy(
    M: int, V: int, *, ignored: int = 0, scale: float = 3.0, reduction: str = "mean"
) -> Callable[..., Inputs]:
    def make(g: torch.Generator) -> Inputs:
        labels = torch.randint(0, V, (M,), generator=g)
        labels[torch.randperm(M, generator=g)[:ignored]] = -100
        return {"logits": _normal(g, M, V, scale=scale), "labels": labels, "reduction": reduction}

    return make


def _int8_linear(T: int, K: int, N: int) -> Callable[..., Inputs]:
    def make(g: torch.Generator) -> Inputs:
        weight, weight_scale = quantize_rows(_normal(g, N, K, scale=K**-0.5))
        x, bias = _normal(g, T, K), _normal(g, N)
        return {"x": x, "weight": weight.mT.contiguous().mT, "weight_scale": weight_scale, "bias": bias}

    return make


_AUTOCAST = ("x_bias", "residual", "weight", "bias")
_RAGGED = [5, 1, 0, 24, 7]  # 37 tokens, with a sequence of one token and an empty one

CASES: list[Case] = [
    Case("gelu", "one_row", _gelu(1, 8)),
    Case("gelu", "ragged", _gelu(37, 13)),
    Case("gelu", "no_bias", _gelu(37, 13, bias=False)),
    Case("gelu", "tanh", _gelu(37, 130, approximate="tanh")),
    Case("gelu", "tails", _gelu(5, 1000, scale=8.0, bias=False)),
    Case("gelu", "bert_base", _gelu(128, 3072)),
    Case("add_layer_norm", "one_row", _add_layer_norm(1, 8)),
    Case("add_layer_norm", "ragged", _add_layer_norm(37, 13)),
    Case("add_layer_norm", "no_residual", _add_layer_norm(37, 33, residual=False)),
    Case("add_layer_norm", "offset", _add_layer_norm(9, 384, offset=50.0)),
    Case("add_layer_norm", "eps", _add_layer_norm(37, 64, eps=0.1)),
    Case("add_layer_norm", "dropout", _add_layer_norm(37, 65, p=0.3)),
    Case("add_layer_norm", "x_bias", _add_layer_norm(37, 65, linear=True)),
    Case("add_layer_norm", "x_bias_dropout", _add_layer_norm(70, 13, p=0.3, linear=True)),
    Case("add_layer_norm", "autocast", _add_layer_norm(37, 65, linear=True), _AUTOCAST),
    Case("add_layer_norm", "autocast_dropout", _add_layer_norm(37, 65, p=0.3, linear=True), _AUTOCAST),
    Case("add_layer_norm", "autocast_no_residual", _add_layer_norm(37, 33, residual=False), ("weight", "bias")),
    *(Case("add_layer_norm", f"rows_{T}", _add_layer_norm(T, 32)) for T in (63, 64, 65)),
    Case("add_layer_norm", "bert_base", _add_layer_norm(128, 768, p=0.1, linear=True)),
    Case("embed", "one_token", _embed(1, 8)),
    Case("embed", "ragged", _embed(37, 13)),
    Case("embed", "no_types", _embed(37, 13, types=False)),
    Case("embed", "no_padding_idx", _embed(37, 16, padding_idx=None)),
    Case("embed", "dropout", _embed(37, 65, p=0.3)),
    Case("embed", "bert_base", _embed(128, 768)),
    Case("attention", "one_token", _attention([1], 1, 8)),
    Case("attention", "ragged", _attention(_RAGGED, 3, 5)),
    Case("attention", "equal_runs", _attention([8, 8, 8, 3, 3, 8], 2, 16)),
    *(Case("attention", f"length_{n}", _attention([n, 2], 2, 32)) for n in (15, 16, 17, 63, 64, 65)),
    Case("attention", "dropout", _attention(_RAGGED, 3, 8, p=0.2)),
    Case("attention", "large_scores", _attention([33, 4], 2, 32, scale=12.0)),
    Case("attention", "bert_base", _attention([128, 7, 40], 12, 64)),
    Case("attention_rel_bias", "one_token", _attention_rel_bias([1], 1, 8, 1)),
    Case("attention_rel_bias", "ragged", _attention_rel_bias(_RAGGED, 3, 5, 9)),
    Case("attention_rel_bias", "equal_runs", _attention_rel_bias([8, 8, 8, 3, 3, 8], 2, 16, 64)),
    *(Case("attention_rel_bias", f"length_{n}", _attention_rel_bias([n, 2], 2, 32, 64)) for n in (63, 64, 65)),
    Case("attention_rel_bias", "dropout", _attention_rel_bias(_RAGGED, 3, 8, 9, p=0.2)),
    Case("attention_rel_bias", "mpnet_base", _attention_rel_bias([140, 7, 40], 12, 64, 128)),
    Case("attention_window", "one_token", _attention_window([1], 1, 8, 8)),
    Case("attention_window", "itself_only", _attention_window([9, 2], 2, 8, 1)),
    Case("attention_window", "ragged", _attention_window(_RAGGED, 3, 5, 6)),
    Case("attention_window", "wider_than_all", _attention_window(_RAGGED, 3, 8, 100)),
    *(Case("attention_window", f"window_{w}", _attention_window([150, 2, 40], 2, 16, w)) for w in (63, 64, 130)),
    Case("attention_window", "bert_base", _attention_window([140, 7, 40], 12, 64, 64)),
    Case("attention_window", "dropout", _attention_window([70, 5], 3, 8, 20, p=0.2)),
    *(Case("pool", f"ragged_{mode}", _pool(_RAGGED, 13, mode)) for mode in MODES),
    *(Case("pool", f"bert_base_{mode}", _pool([128, 7, 40], 768, mode)) for mode in ("mean", "max")),
    Case("cross_entropy", "one_row", _cross_entropy(1, 7)),
    Case("cross_entropy", "ragged", _cross_entropy(37, 131, ignored=9)),
    Case("cross_entropy", "sum", _cross_entropy(37, 131, ignored=9, reduction="sum")),
    Case("cross_entropy", "large_logits", _cross_entropy(5, 64, scale=80.0)),
    Case("cross_entropy", "bert_base", _cross_entropy(19, 30522, ignored=3)),
]

_MIX = [8, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128, 256]  # query, sentence and passage lengths: 744 tokens

# What benchmarks time: MiniLM's and BERT-base's shapes on mixed lengths.
BENCHMARK_CASES: list[Case] = [
    Case("embed", "minilm_mix", _embed(sum(_MIX), 384)),
    Case("attention", "minilm_mix", _attention(_MIX, 12, 32)),
    Case("attention", "minilm_short", _attention([16] * 64, 12, 32)),
    Case("attention", "bert_base_mix", _attention(_MIX, 12, 64)),
    Case("attention", "bert_base_512", _attention([512] * 2, 12, 64)),
    Case("attention_rel_bias", "mpnet_mix", _attention_rel_bias(_MIX, 12, 64, 128)),
    Case("attention_window", "bert_base_512", _attention_window([512] * 2, 12, 64, 128)),
    Case("add_layer_norm", "minilm_mix", _add_layer_norm(sum(_MIX), 384)),
    Case("add_layer_norm", "bert_base_dropout", _add_layer_norm(sum(_MIX), 768, p=0.1)),
    Case("gelu", "minilm_mix", _gelu(sum(_MIX), 1536)),
    Case("gelu", "bert_base_tanh", _gelu(sum(_MIX), 3072, approximate="tanh")),
    *(Case("pool", f"minilm_{mode}", _pool(_MIX, 384, mode)) for mode in ("mean", "cls", "max")),
    Case("cross_entropy", "bert_base", _cross_entropy(110, 30522)),
    Case("int8_linear", "minilm_up", _int8_linear(sum(_MIX), 384, 1536), ("weight_scale",), trains=False),
    Case("int8_linear", "bert_base_out", _int8_linear(sum(_MIX), 768, 768), ("weight_scale",), trains=False),
]
