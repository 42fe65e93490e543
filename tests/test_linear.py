"""Linear layers with epilogues, the folded norm and float8: references here, kernels in Triton's interpreter.

`tests/test_kernels.py` runs this file again with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastbert import kernels, ops, use_backend
from fastbert.ops.float8_linear import float8_linear_ref, quantize_rows_float8
from fastbert.ops.linear import linear_add_norm_ref, linear_add_ref, linear_gelu_ref
from fastbert.testing import assert_within_budget

on_kernels = pytest.mark.skipif(
    not (kernels.interpreted() or (kernels.available() and torch.cuda.is_available())),
    reason="runs in the interpreter, or on a GPU",
)
DEVICE = "cuda" if torch.cuda.is_available() and not kernels.interpreted() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
SHAPES = [(1, 16, 16), (37, 24, 20), (70, 96, 64), (65, 40, 129)]  # T, K, N


def _inputs(shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    T, K, N = shape
    g = torch.Generator().manual_seed(seed)
    made = {
        "x": torch.randn(T, K, generator=g),
        "weight": torch.randn(N, K, generator=g) * K**-0.5,
        "bias": torch.randn(N, generator=g),
        "residual": torch.randn(T, N, generator=g),
        "gamma": 1 + 0.3 * torch.randn(K, generator=g),
        "beta": 0.3 * torch.randn(K, generator=g),
    }
    return {k: v.to(dtype).to(DEVICE) for k, v in made.items()}


def _linear(i: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return i["x"], i["weight"], i["bias"]


def _wide(i: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.double() for k, v in i.items()}


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_epilogues_are_within_budget(shape, dtype, poisoned_empty):
    i = _inputs(shape, dtype)
    for form in ("none", "tanh"):
        ours = kernels.linear_gelu_fwd(*_linear(i), form)
        assert_within_budget(ours, linear_gelu_ref(*_linear(i), form), linear_gelu_ref(*_linear(_wide(i)), form))
    none = torch.zeros_like(i["residual"])
    ours, exact = kernels.linear_fwd(*_linear(i)), linear_add_ref(*_linear(_wide(i)), none.double())
    assert_within_budget(ours, linear_add_ref(*_linear(i), none), exact)
    ours = kernels.linear_add_fwd(*_linear(i), i["residual"])
    exact = linear_add_ref(*_linear(_wide(i)), _wide(i)["residual"])
    assert_within_budget(ours, linear_add_ref(*_linear(i), i["residual"]), exact)
    with pytest.raises(AssertionError, match="budget"):  # the residual is forgotten
        assert_within_budget(kernels.linear_add_fwd(*_linear(i), 0 * i["residual"]), ours, exact)


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (33, 300, 24)], ids=str)
def test_a_product_whose_sums_the_norm_adds_up_is_within_budget(shape, dtype, poisoned_empty, monkeypatch):
    from fastbert.kernels import configs

    i = _inputs(shape, dtype)
    norm = _inputs((1, shape[2], 1), dtype, seed=1)
    rest = (norm["gamma"], norm["beta"], 1e-5)
    wide = _wide(norm)
    same = linear_add_norm_ref(*_linear(i), i["residual"], *rest)
    exact = linear_add_norm_ref(*_linear(_wide(i)), _wide(i)["residual"], wide["gamma"], wide["beta"], 1e-5)
    for programs in (2, 1000):  # one chunk, as many as there are steps
        monkeypatch.setattr(configs, "linear_programs", lambda n=programs: n)
        ours = kernels.linear_add_norm_fwd(*_linear(i), i["residual"], *rest)
        assert_within_budget(ours, same, exact)
    wrong = kernels.linear_add_norm_fwd(i["x"], i["weight"], 0 * i["bias"], i["residual"], *rest)
    with pytest.raises(AssertionError, match="budget"):  # the bias is forgotten
        assert_within_budget(wrong, same, exact)


@on_kernels
def test_tanh_for_erf_fails():
    i = _inputs(SHAPES[2], torch.float32)
    wrong = kernels.linear_gelu_fwd(*_linear(i), "tanh")
    with pytest.raises(AssertionError, match="budget"):
        assert_within_budget(wrong, linear_gelu_ref(*_linear(i)), linear_gelu_ref(*_linear(_wide(i))))


def _folded_ref(i: dict[str, torch.Tensor], form: str, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """LN(x) W^T + b with GELU, and LN(x) + x W^T (K = N): what the folded kernels compute, step by step."""
    wide = torch.promote_types(i["x"].dtype, torch.float32)
    normed = F.layer_norm(i["x"].to(wide), i["x"].shape[1:], i["gamma"].to(wide), i["beta"].to(wide), eps)
    y = F.linear(normed.to(i["x"].dtype), i["weight"], i["bias"])
    y = F.gelu(y.to(wide), approximate="tanh" if form == "tanh" else "none") if form else y
    return y.to(i["x"].dtype), normed


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_a_folded_norm_is_within_budget(shape, dtype, offset, poisoned_empty):
    """z comes from a GEMM with its statistics, and the norm of z is only ever applied to the sums of the next one."""
    from fastbert.kernels.linear import fold_norm_fwd, linear_rows_fwd, norm_linear_fwd

    T, K, _ = shape
    i, before = _inputs(shape, dtype), _inputs((T, 32, K), dtype, seed=1)
    before["residual"] = before["residual"] + offset
    rows = linear_rows_fwd(*_linear(before), before["residual"], i["gamma"], i["beta"], 1e-5)
    assert torch.equal(rows.z, kernels.linear_add_fwd(*_linear(before), before["residual"]))
    i["x"] = rows.z
    folded = fold_norm_fwd(i["weight"], i["bias"], i["gamma"], i["beta"])
    for form in ("", "erf", "tanh"):
        ours = norm_linear_fwd(rows, folded, form)
        assert_within_budget(ours, _folded_ref(i, form, 1e-5)[0], _folded_ref(_wide(i), form, 1e-5)[0], factor=4.0)
    # The residual of the next GEMM is LN(z) too.
    after = _inputs((T, 32, K), dtype, seed=2)
    ours = linear_rows_fwd(*_linear(after), rows, i["gamma"], i["beta"], 1e-5).z
    same = linear_add_ref(*_linear(after), _folded_ref(i, "", 1e-5)[1].to(dtype))
    exact = linear_add_ref(*_linear(_wide(after)), _folded_ref(_wide(i), "", 1e-5)[1])
    assert_within_budget(ours, same, exact)
    # Mutants: the sum u of the weights forgotten, another eps.
    exact = _folded_ref(_wide(i), "", 1e-5)[0]
    for wrong in (
        norm_linear_fwd(rows, (folded[0], 0 * folded[1] + 1, folded[2])),
        norm_linear_fwd(rows._replace(eps=0.5), folded),
    ):
        with pytest.raises(AssertionError, match="budget"):
            assert_within_budget(wrong, _folded_ref(i, "", 1e-5)[0], exact, factor=4.0)


# float8


def _float8(i: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    weight, scale = quantize_rows_float8(i["weight"].float())
    return i["x"], weight, scale, i["bias"]


def test_float8_rows_keep_their_largest_value():
    x = torch.tensor([[1.0, -3.0, 0.25], [0.0, 0.0, 0.0], [1e-20, 5e-21, 0.0], [6e4, 1.0, -6e4]])
    q, scale = quantize_rows_float8(x)
    back = q.float() * scale[:, None]
    assert (back - x).abs().max(1).values.le(x.abs().max(1).values / 16).all()
    assert q.float().abs().max(1).values.tolist() == [448.0, 0.0, 448.0, 448.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_float8_reference_is_near_float(dtype):
    """Both operands carry 3 bits after the point: relative error about 2^-4 / sqrt(3) a product, averaged over K."""
    i = _inputs((50, 256, 64), dtype)
    y, exact = float8_linear_ref(*_float8(i)), F.linear(*_linear(_wide(i)))
    assert (y.double() - exact).norm() / exact.norm() < 0.05
    with use_backend("reference"):
        assert torch.equal(ops.float8_linear(*_float8(i)), y)
    x, weight, scale, bias = _float8(i)
    assert (float8_linear_ref(x, weight, scale * 1.2, bias).double() - exact).norm() / exact.norm() > 0.05


@on_kernels
def test_float8_quantisation_kernel(poisoned_empty):
    """On values that float8 has: the interpreter loses the carry of a mantissa that rounds up to a power of two."""
    from fastbert.kernels.float8 import quantize_rows_fwd

    g = torch.Generator().manual_seed(0)
    q = torch.randint(-448, 449, (37, 24), generator=g).float().to(torch.float8_e4m3fn)
    q[:, 3], q[5] = torch.tensor(448.0).to(q.dtype), torch.tensor(0.0).to(q.dtype)
    exponents = torch.randint(-12, 3, (37,), generator=g).float()
    found, scale = quantize_rows_fwd((q.float() * exponents.exp2()[:, None]).to(DEVICE))
    assert torch.equal(found.float().cpu(), q.float())
    exponents[5] = -torch.inf
    torch.testing.assert_close(scale.cpu(), exponents.exp2(), rtol=3e-7, atol=0)  # a GPU divides to two units


# Hopper's tensor cores add products of 8 bits to 13 binary places: fp32 results show that, the others do not.
@on_kernels
@pytest.mark.parametrize("dtype", DTYPES[1:] if DEVICE == "cuda" else DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float8_kernel_is_within_budget(shape, dtype, poisoned_empty, monkeypatch):
    from fastbert.kernels import linear

    monkeypatch.setattr(linear, "quantize_rows_fwd", quantize_rows_float8)  # tested above
    i = _inputs(shape, dtype)
    with use_backend("triton"):
        ours = ops.float8_linear(*_float8(i))
    exact = float8_linear_ref(*_float8(_wide(i)))
    assert_within_budget(ours, float8_linear_ref(*_float8(i)), exact)
    x, weight, scale, bias = _float8(i)
    with pytest.raises(AssertionError, match="budget"):
        assert_within_budget(kernels.float8_linear_fwd(x, weight, scale * 1.1, bias), ours, exact)


@on_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_quantised_by_the_kernel_that_makes_them(shape, poisoned_empty, monkeypatch):
    """Norm, GELU, linear layer. Storage is fp32 here: scales must cancel, and a float8 that the interpreter would round
    wrongly hides nothing."""
    from fastbert.kernels import float8

    monkeypatch.setattr(float8, "FLOAT8", torch.float32)
    i, after = _inputs(shape, torch.float32), _inputs((shape[0], shape[2], shape[1]), torch.float32, seed=1)
    T, K, N = shape
    z, up, down = i["x"], torch.rand(N, device=DEVICE) + 0.5, torch.rand(K, device=DEVICE) + 0.5
    y, rows = kernels.add_layer_norm_float8_fwd(z, after["residual"], i["gamma"], i["beta"], 1e-5)
    same = ops.add_layer_norm(z, after["residual"], i["gamma"], i["beta"], 1e-5)
    torch.testing.assert_close(y, same)
    assert rows.q.abs().amax(1).allclose(torch.tensor(448.0, device=DEVICE))
    torch.testing.assert_close(rows.q * rows.scale.T, y)
    inner = kernels.float8_gelu_fwd(rows, i["weight"], up, i["bias"], "none")
    right = F.gelu(y @ i["weight"].T * up + i["bias"])
    assert inner.scale.shape == (-(-N // inner.cols), T)
    back = inner.q * inner.scale.T.repeat_interleave(inner.cols, 1)[:, :N]
    torch.testing.assert_close(back, right, atol=1e-5, rtol=1e-5)
    assert inner.q.abs().max() <= 448.01
    found = kernels.float8_rows_linear_fwd(inner, after["weight"], down, after["bias"], torch.float32)
    exact = right @ after["weight"].T * down + after["bias"]
    torch.testing.assert_close(found, exact, atol=1e-4, rtol=1e-4)
    if inner.scale.shape[0] > 1:  # the mutant: every group has the first one's scale
        wrong = inner._replace(scale=inner.scale[:1].expand_as(inner.scale).contiguous())
        found = kernels.float8_rows_linear_fwd(wrong, after["weight"], down, after["bias"], torch.float32)
        assert (found - exact).abs().max() > 1e-2


# The ops


def test_without_a_kernel_they_are_the_two_ops():
    i = _inputs(SHAPES[1], torch.float32)
    with use_backend("reference"), torch.no_grad():
        assert torch.equal(ops.linear_add(*_linear(i), i["residual"]), F.linear(*_linear(i)) + i["residual"])
        assert torch.equal(ops.linear_gelu(*_linear(i)), F.gelu(F.linear(*_linear(i))))


def test_errors_name_both_sides():
    i = _inputs((5, 16, 8), torch.float32)
    x, weight, bias = _linear(i)
    with pytest.raises(ValueError, match=r"got \(5, 16\) and \(8, 15\)"):
        ops.linear_gelu(x, weight[:, :15], bias)
    with pytest.raises(ValueError, match=r"bias has shape \(7,\) but weight has 8 rows"):
        ops.linear_gelu(x, weight, bias[:7])
    with pytest.raises(ValueError, match=r"x is torch\.float16 on .* but weight is torch.float32"):
        ops.linear_add(x.half(), weight, bias, i["residual"])
    with pytest.raises(ValueError, match=r"expected torch.float32 \(5, 8\)"):
        ops.linear_add(x, weight, bias, i["residual"][:4])
    with pytest.raises(ValueError, match="approximate must be one of"):
        ops.linear_gelu(x, weight, bias, "sigmoid")
    with pytest.raises(RuntimeError, match="no backward"):
        ops.linear_gelu(x.requires_grad_(), weight, bias)
    q, scale = quantize_rows_float8(weight)
    with pytest.raises(ValueError, match=r"weight must be torch\.float8_e4m3fn, got torch\.float32"):
        ops.float8_linear(x, weight, scale)
    with pytest.raises(ValueError, match=r"weight has 15 features but x has shape \(5, 16\)"):
        ops.float8_linear(x, q[:, :15], scale)
    with pytest.raises(ValueError, match="weight has 8 rows"):
        ops.float8_linear(x, q, scale[:3])
    with pytest.raises(RuntimeError, match="no backward"):
        ops.float8_linear(x.detach().requires_grad_(), q, scale)


def test_epilogues_are_those_that_were_measured():
    """`configs.EPILOGUES` is filled by what `python -m benchmarks.gpu` measures."""
    if kernels.available():
        from fastbert.kernels import configs

        assert set(configs.EPILOGUES) == {90}
        assert set(configs.EPILOGUES[90]) == {"linear", "linear_gelu", "linear_add_norm"}


@pytest.mark.skipif(not kernels.available(), reason="Triton is not installed")
def test_where_the_linear_kernels_are_used(monkeypatch):
    """For 16 bits and so many rows as they were measured with: fp32 has small tiles of multiply-adds."""
    from fastbert.kernels import configs

    monkeypatch.setattr(configs, "architecture", lambda: 90)
    monkeypatch.setattr(kernels, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert kernels.supports("linear_gelu", "cuda", torch.bfloat16)
    assert not kernels.supports("linear_gelu", "cuda", torch.float32)
    assert not kernels.supports("norm_linear", "cuda", torch.bfloat16)
    base, small = (3072, 768), (384, 1536)
    assert [kernels.pays("linear_gelu", T, base) for T in (1, 1024, 2048, 4096)] == [True, True, False, True]
    assert [kernels.pays("linear", T, base) for T in (192, 193, 8192, 16384)] == [True, False, False, True]
    assert [kernels.pays("linear_add_norm", T, small) for T in (1, 384, 385, 16384)] == [True, True, False, False]
    assert not kernels.pays("linear_add", 1, base)
