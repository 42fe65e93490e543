"""The native backend beyond the op grid: plans, argument checks, instruction sets, threads, batches, the build."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert import native, ops, testing
from fastbert.ops import dispatch
from fastbert.ops.int8_linear import int8_linear_ref, quantize_rows
from fastbert.ops.plan import plan_batches_ref, plan_concat_ref, plan_mask_ref

if not native.available():
    pytest.skip("the native extension was not built", allow_module_level=True)

C = native.require()
FLOATS = (torch.float32, torch.bfloat16)
NATIVE_OPS = sorted({case.op for case in testing.CASES if native.supports(case.op, "cpu", torch.float32)})


def _equal(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        else:
            assert a == b
            assert type(a) is type(b)


# Plans are exact: equal to their references, dtypes included.


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 6), st.integers(0, 9), st.data())
def test_plan_mask_equals_reference(B, L, data):
    bits = data.draw(st.lists(st.booleans(), min_size=B * L, max_size=B * L))
    mask = torch.tensor(bits, dtype=torch.bool).view(B, L)
    if L > 0 or B == 0:  # the reference's max of no columns is 0 too, but torch's sum over them needs a column
        _equal(native.plan_mask_fwd(mask), plan_mask_ref(mask))


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(0, 40), max_size=40),
    st.integers(1, 90),
    st.one_of(st.none(), st.integers(1, 6)),
)
def test_plan_batches_equals_reference(lengths, budget, max_sequences):
    tensor = torch.tensor(lengths, dtype=torch.int64)
    _equal(native.plan_batches_fwd(tensor, budget, max_sequences), plan_batches_ref(tensor, budget, max_sequences))


def test_plan_batches_does_not_overflow():
    lengths = torch.tensor([2**62, 2**62, 2**62, 1], dtype=torch.int64)
    order, bounds = native.plan_batches_fwd(lengths, 2**63 - 1, None)
    assert order.tolist() == [0, 1, 2, 3]
    assert bounds == [0, 1, 2, 4]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=7), max_size=7))
def test_plan_concat_equals_reference(sequences):
    _equal(native.plan_concat_fwd(sequences), plan_concat_ref(sequences))


@pytest.mark.parametrize(
    "sequences",
    [[(1, 2), (3,)], ([1, 2], [3]), [np.array([1, 2]), np.array([3])], [torch.tensor([1, 2]), [3]], [range(1, 3), [3]]],
    ids=["tuples", "outer tuple", "numpy", "torch", "range"],
)
def test_plan_concat_takes_anything_with_index(sequences):
    ids, positions, cu_seqlens, max_seqlen = native.plan_concat_fwd(sequences)
    assert (ids.tolist(), positions.tolist(), cu_seqlens.tolist(), max_seqlen) == ([1, 2, 3], [0, 1, 0], [0, 2, 3], 2)


@pytest.mark.parametrize("wrong", [1.0, "1", None, [1], np.float32(1)])
def test_plan_concat_refuses_what_is_not_an_int(wrong):
    with pytest.raises(TypeError):
        native.plan_concat_fwd([[1, wrong]])


def test_plan_concat_refuses_ids_past_64_bits():
    with pytest.raises(OverflowError):
        native.plan_concat_fwd([[2**63]])


def test_plan_concat_survives_a_list_that_changes_under_it():
    class Id:
        def __index__(self):
            sequences[1].clear()
            return 1

    sequences = [[Id()], [2, 3]]
    with pytest.raises(RuntimeError, match="changed"):
        native.plan_concat_fwd(sequences)


# A window: keys that no query of a block sees are not multiplied.


@pytest.mark.parametrize("window", [0, 1, 46, 94, 2**62])
def test_a_window_is_a_bias_that_forbids(window):
    """Blocks of 24 queries over 200 keys, whole vectors of keys on either side: the kernel with a bias looks at all."""
    torch.manual_seed(0)
    qkv, dout, rest = torch.randn(230, 3, 2, 20), torch.randn(230, 2, 20), (200, 0.3, 0.2, 5)
    cu, half = torch.tensor([0, 200, 200, 230]).int(), min(window // 2, 200)
    forbids = torch.zeros(2, 2 * half + 3)
    forbids[:, [0, -1]] = -torch.inf
    out, lse = native.attention_window_fwd(qkv, window, cu, *rest)
    exact, exact_lse = native.attention_rel_bias_fwd(qkv, forbids, cu, *rest)
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-5, atol=1e-6)
    dqkv = native.attention_window_bwd(dout, qkv, window, out, lse, cu, *rest)
    exact = native.attention_rel_bias_bwd(dout, qkv, forbids, out, lse, cu, *rest)[0]
    torch.testing.assert_close(dqkv, exact, rtol=1e-5, atol=1e-5)


def test_a_window_one_key_wider_fails(monkeypatch):
    right = native._attention_fwd
    monkeypatch.setattr(native, "_attention_fwd", lambda qkv, bias, half, *rest: right(qkv, bias, half + 1, *rest))
    case = next(c for c in testing.CASES if str(c) == "attention_window-window_64")
    with ops.use_backend("native"), pytest.raises(AssertionError, match="budget"):
        testing.check_case(case, torch.float32)


# Checks: a tensor that does not fit is an error that names it, never a read past its end.

X = torch.zeros(4, 8)
CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (X.double(), X, TypeError, r"x must be torch.float32 or torch.bfloat16, got torch.float64"),
        (X, X.bfloat16(), TypeError, r"y is torch.bfloat16 but x is torch.float32"),
        (X.numpy(), X, TypeError, r"x must be a torch tensor, got numpy.ndarray"),
        (X.t(), X, ValueError, r"x must be contiguous"),
        (X[:, :4], X, ValueError, r"x must be contiguous"),
        (X, X[:3], ValueError, r"y must have shape \[4, 8\], got torch.Size\(\[3, 8\]\)"),
        (X, X.to("meta"), ValueError, r"y is not a plain tensor on the CPU: .*meta"),
        (X, X.to_sparse(), ValueError, r"y is not a plain tensor on the CPU"),
        pytest.param(X, "cuda", ValueError, r"y must be on the CPU, got cuda:0", marks=CUDA),
    ],
    ids=["dtype", "dtypes differ", "numpy", "transposed", "strided", "shape", "meta", "sparse", "cuda"],
)
def test_views_are_checked(x, y, error, message):
    with pytest.raises(error, match=message):
        C.gelu_fwd(x, None, X.to(y) if isinstance(y, str) else y, False)


def test_a_bias_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"bias must have shape \[8\], got torch.Size\(\[7\]\)"):
        C.gelu_fwd(X, torch.zeros(7), X.clone(), False)


def test_views_take_strides_that_do_not_matter():
    x = torch.randn(1, 8).as_strided((1, 8), (99, 1))
    y = torch.empty(1, 8)
    C.gelu_fwd(x, None, y, False)
    torch.testing.assert_close(y, torch.nn.functional.gelu(x))


@pytest.mark.parametrize(
    ("cu_seqlens", "max_seqlen", "message"),
    [
        ([0, 3], 4, "must run from 0 to the number of tokens, 4"),
        ([1, 4], 4, "must run from 0"),
        ([0, 4], 3, "a length of 4, expected 0 to max_seqlen = 3"),
        ([0, 5, 4], 9, "sequence 1 a length of -1"),
        ([], 4, "must run from 0"),
    ],
)
def test_cu_seqlens_are_checked(cu_seqlens, max_seqlen, message):
    qkv = torch.zeros(4, 3, 1, 8)
    with pytest.raises(ValueError, match=message):
        native.attention_fwd(qkv, torch.tensor(cu_seqlens, dtype=torch.int32), max_seqlen, 1.0, 0.0, 0)


@pytest.mark.parametrize(
    ("rel_bias", "error", "message"),
    [
        (torch.zeros(2, 3), ValueError, r"rel_bias must have shape \[1, 3\], got torch.Size\(\[2, 3\]\)"),
        (torch.zeros(1, 4), ValueError, "rel_bias must have an odd number of offsets, got 4"),
        (torch.zeros(3), ValueError, "rel_bias must have 2 dimensions"),
        (torch.zeros(1, 3).bfloat16(), TypeError, "rel_bias must be torch.float32, got torch.bfloat16"),
        (None, ValueError, "drel_bias goes with rel_bias, and only with it"),
    ],
    ids=["heads", "even", "ndim", "dtype", "gradient of none"],
)
def test_rel_bias_is_checked(rel_bias, error, message):
    qkv, out, lse = torch.zeros(4, 3, 1, 8), torch.zeros(4, 1, 8), torch.zeros(4, 1)
    cu = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(error, match=message):
        C.attention_bwd(out, qkv, rel_bias, out, lse, cu, qkv.clone(), torch.zeros(1, 3), 4, 4, 1.0, 0.0, 0)


# Instruction sets: each one that this CPU offers is held to the same budget, in a process of its own.


def _python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )


_GRID = """
import torch
from fastbert import native, ops, testing
torch.set_num_threads(1)
assert native.isa() == {isa!r}, native.isa()
checked = 0
with ops.use_backend("native"):
    for case in testing.CASES:
        if "_base" in case.name or not native.supports(case.op, "cpu", torch.float32):
            continue
        for dtype in (torch.float32, torch.bfloat16):
            testing.check_case(case, dtype)
            checked += 1
print(checked)
"""


@pytest.mark.parametrize("isa", [name for name in C.supported_isas() if name != native.isa()])
def test_every_instruction_set_is_within_budget(isa):
    done = _python(_GRID.format(isa=isa), FASTBERT_ISA=isa)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 40


def test_an_unknown_instruction_set_is_an_error():
    done = _python("import fastbert.native as n; n.isa()", FASTBERT_ISA="avx1024")
    assert done.returncode != 0
    assert "FASTBERT_ISA=avx1024: unknown instruction set 'avx1024'; this CPU offers " in done.stderr
    assert all(name in done.stderr for name in C.supported_isas())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_roof_counts_what_it_does(isa, dtype):
    """Two operations a product, of whole vectors, on every thread: narrower numbers never do fewer."""
    operations = C.peak_operations(dtype, 10)
    assert C.peak_operations(dtype, 30) == 3 * operations > 0
    assert operations >= C.peak_operations("float32", 10)
    lanes = {"portable": 4, "avx2": 8, "avxvnni": 8}.get(C.isa(), 16)
    if dtype == "float32":
        assert operations == 10 * 12 * 2 * lanes * torch.get_num_threads()
    assert native.peak_flop_s(getattr(torch, dtype), seconds=1e-4, windows=2) > 0


def test_the_roof_of_what_no_unit_multiplies_is_refused():
    with pytest.raises(ValueError, match="expected float32, bfloat16 or int8 and rounds >= 1, got float16 and 5"):
        C.peak_operations("float16", 5)
    with pytest.raises(ValueError, match="got int8 and 0"):
        C.peak_operations("int8", 0)


def test_the_best_instruction_set_is_the_default():
    done = _python("import fastbert.native as n; print(n.isa())", FASTBERT_ISA="")
    assert done.stdout.strip() == C.supported_isas()[-1]


def test_instruction_sets_share_no_inline_functions():
    """A function compiled for AVX-512 and folded by the linker into portable code faults on a lesser CPU."""
    root = Path(__file__).parent.parent
    for path in (root / "csrc" / "cpu").iterdir():
        included = [line.split()[1] for line in path.read_text().splitlines() if line.startswith("#include")]
        allowed = {"<cstdint>", "<cstdlib>", "<cstring>", "<immintrin.h>", "<omp.h>"}
        assert not {name for name in included if name.startswith("<")} - allowed, path


@pytest.fixture(params=C.supported_isas())
def isa(request):
    """Each instruction set in turn, in this process."""
    before = native.isa()
    C.set_isa(request.param)
    yield request.param
    C.set_isa(before)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("T", "K", "N"), [(0, 8, 4), (1, 5, 7), (37, 130, 29), (200, 384, 100)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_linear_equals_the_reference(isa, monkeypatch, dtype, T, K, N, with_bias):
    monkeypatch.setattr(native, "_INT8_ROWS", 16)
    g = torch.Generator().manual_seed(T)
    x = (torch.randn(T, K, generator=g) * torch.logspace(-9, 9, T)[:, None]).to(dtype)
    x[5:6] = 0
    x[6:7, 1:] = 0  # the largest value alone: 127
    x[7:8, 0], x[7:8, 1:] = 127, torch.arange(1, K) % 250 / 2 - 62  # a scale of 1, and halves
    weight, weight_scale = quantize_rows(torch.randn(N, K, generator=g))
    bias = torch.randn(N, generator=g) if with_bias else None
    y = native.int8_linear_fwd(x, weight.mT.contiguous().mT, weight_scale, bias)
    assert torch.equal(y, int8_linear_ref(x, weight, weight_scale, bias))


def test_int8_linear_keeps_nan_in_its_row(isa):
    x = torch.randn(3, 40)
    x[1, 37] = float("nan")
    y = native.int8_linear_fwd(x, torch.ones(5, 40, dtype=torch.int8), torch.ones(5), None)
    assert y.isnan().all(1).tolist() == [False, True, False]
    assert y[[0, 2]].isfinite().all()


def test_int8_linear_is_checked():
    with pytest.raises(TypeError, match=r"q must be torch.int8, got torch.float32"):
        C.int8_linear_quantize(X, X.clone(), torch.zeros(4))
    with pytest.raises(TypeError, match=r"sums must be torch.int32, got torch.int8"):
        C.int8_linear_scale(X.to(torch.int8), torch.zeros(4), torch.zeros(8), None, X.clone())
    with pytest.raises(ValueError, match=r"weight_scale must have shape \[8\], got torch.Size\(\[4\]\)"):
        C.int8_linear_scale(X.int(), torch.zeros(4), torch.zeros(4), None, X.clone())


# Threads and batches: neither changes a bit of a result.


def _case(op: str) -> testing.Case:
    return next(case for case in testing.CASES if case.op == op and "_base" in case.name)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("op", NATIVE_OPS)
def test_results_do_not_depend_on_the_number_of_threads(op, dtype):
    inputs = _case(op).inputs(dtype)
    threads = torch.get_num_threads()
    results = []
    with ops.use_backend("native"):
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(testing.forward_backward(testing.PUBLIC[op], inputs))
    torch.set_num_threads(threads)
    for key, one in results[0].items():
        assert torch.equal(one, results[1][key]), key


@pytest.mark.parametrize("num_offsets", [0, 1, 41, 255], ids=lambda n: f"{n}_offsets")
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_sequence_alone_equals_itself_in_a_batch(dtype, num_offsets):
    lengths = [5, 33, 1, 70]
    qkv = torch.randn(sum(lengths), 3, 2, 24).to(dtype)
    bias = torch.randn(2, num_offsets) if num_offsets else None
    cu = testing.cu_seqlens_of(lengths)
    with ops.use_backend("native"):
        together = ops.attention(qkv, cu, 99, rel_bias=bias)  # max_seqlen may be more than the longest has
        pooled = ops.pool(together.flatten(1), cu, "mean")
        for i, (lo, hi) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
            own = torch.tensor([0, hi - lo], dtype=torch.int32)
            alone = ops.attention(qkv[lo:hi], own, hi - lo, rel_bias=bias)
            assert torch.equal(alone, together[lo:hi])
            one = ops.pool(alone.flatten(1), own, "mean")
            assert torch.equal(one[0], pooled[i])


@pytest.mark.parametrize("op", ["gelu", "add_layer_norm"])
def test_a_row_alone_equals_itself_in_a_batch(op):
    x = torch.randn(200, 100)
    arguments = () if op == "gelu" else (torch.randn(200, 100), torch.randn(100), torch.randn(100))
    with ops.use_backend("native"):
        together = testing.PUBLIC[op](x, *arguments)
        alone = testing.PUBLIC[op](x[7:8], *(a[7:8] if a.ndim == 2 else a for a in arguments))
    assert torch.equal(alone[0], together[7])


# Values at the edge.


def test_nan_and_infinity_come_out_as_in_torch():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 100.0, -100.0, 0.0, 5.6, -5.6]).repeat(5)
    for form in ("none", "tanh"):
        y, expected = native.gelu_fwd(x[None], None, form)[0], torch.nn.functional.gelu(x, approximate=form)
        kept = torch.isfinite(expected)
        torch.testing.assert_close(y[kept], expected[kept], rtol=1e-6, atol=2e-7)
        assert torch.isnan(y[0])
        assert y[1] == float("inf")
    z = torch.randn(2, 20)
    z[0, 3] = float("nan")
    y, _, _ = native.add_layer_norm_fwd(z, None, None, torch.ones(20), torch.zeros(20), 1e-12, 0.0, 0)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()
    qkv = torch.randn(6, 3, 1, 8)
    qkv[1, 1, 0, 2] = float("nan")
    out, _ = native.attention_fwd(qkv, torch.tensor([0, 3, 6], dtype=torch.int32), 3, 1.0, 0.0, 0)
    assert out[:3].isnan().all()
    assert out[3:].isfinite().all()


def test_nan_in_the_bias_stays_in_the_rows_that_see_its_offset():
    bias = torch.zeros(1, 7)
    bias[0, 5] = float("nan")  # the key two after the query
    out, _ = native.attention_rel_bias_fwd(torch.randn(3, 3, 1, 8), bias, testing.cu_seqlens_of([3]), 3, 1.0, 0.0, 0)
    assert out[0].isnan().all()
    assert out[1:].isfinite().all()


def test_no_bias_is_a_bias_of_zero():
    qkv, cu = torch.randn(40, 3, 2, 8), testing.cu_seqlens_of([33, 7])
    with ops.use_backend("native"):
        assert torch.equal(ops.attention(qkv, cu, 33), ops.attention(qkv, cu, 33, rel_bias=torch.zeros(2, 5)))


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_scale_of_any_sign_is_within_budget(dtype, scale):
    ragged = next(case for case in testing.CASES if str(case) == "attention-ragged")
    case = testing.Case("attention", f"scale_{scale}", lambda g: ragged.make(g) | {"scale": scale})
    with ops.use_backend("native"):
        testing.check_case(case, dtype)


def test_bfloat16_rounds_to_nearest_even_as_torch():
    x = torch.randn(1, 4096) * torch.logspace(-30, 30, 4096)
    pooled, _ = native.pool_fwd(x.bfloat16(), torch.tensor([0, 1], dtype=torch.int32), "mean")
    assert torch.equal(pooled, x.bfloat16())
    rows = torch.stack([x[0].bfloat16(), (2 * x[0]).bfloat16()])
    summed, _ = native.pool_fwd(rows, torch.tensor([0, 2], dtype=torch.int32), "mean_sqrt_len_tokens")
    expected = (rows.float().sum(0) * torch.tensor(0.5).sqrt()).bfloat16()
    assert torch.equal(summed[0], expected)


def test_a_negative_padding_idx_counts_from_the_end():
    ids, dy = torch.tensor([4, 1]), torch.randn(2, 8)
    word = torch.randn(5, 8)
    args = (ids, torch.zeros(2, dtype=torch.int64), None, word, torch.randn(1, 8), None, torch.ones(8))
    _, mean, rstd = native.embed_fwd(*args, torch.zeros(8), 1e-12, 0.0, 0)
    dword = native.embed_bwd(dy, *args, mean, rstd, -1, 0.0, 0)[0]
    assert not dword[4].any()
    assert dword[1].any()


def test_parameters_of_another_dtype_are_taken():
    """A bf16 activation with fp32 bias: the bias is used as it is, and its gradient has its dtype."""
    qkv, rel_bias = torch.randn(5, 3, 2, 8).bfloat16(), torch.randn(2, 9, requires_grad=True)
    with ops.use_backend("native"):
        ops.attention(qkv, testing.cu_seqlens_of([5]), 5, rel_bias=rel_bias).float().square().sum().backward()
    assert rel_bias.grad is not None
    assert rel_bias.grad.dtype == torch.float32
    assert rel_bias.grad.any()
    x = torch.randn(5, 16).bfloat16().requires_grad_()
    bias = torch.randn(16, requires_grad=True)
    with ops.use_backend("native"):
        ops.gelu(x, bias).sum().backward()
    assert bias.grad is not None
    assert bias.grad.dtype == torch.float32


def test_empty_inputs():
    empty = torch.empty(0, 8)
    assert native.gelu_fwd(empty, None, "none").shape == (0, 8)
    dx, dbias = native.gelu_bwd(empty, empty, torch.ones(8), "none")
    assert dx.shape == (0, 8)
    assert dbias is not None
    assert not dbias.any()
    out, _ = native.attention_fwd(torch.empty(0, 3, 2, 8), torch.zeros(3, dtype=torch.int32), 0, 1.0, 0.0, 0)
    assert out.shape == (0, 2, 8)
    nothing = (torch.zeros(3, dtype=torch.int32), 0, 1.0, 0.0, 0)
    qkv, bias, lse = torch.empty(0, 3, 2, 8), torch.ones(2, 5), torch.empty(0, 2)
    _, drel_bias = native.attention_rel_bias_bwd(out, qkv, bias, out, lse, *nothing)
    assert drel_bias is not None
    assert not drel_bias.any()
    assert not native.pool_fwd(empty, torch.zeros(3, dtype=torch.int32), "max")[0].any()


# Absence.


def test_an_extension_that_was_not_built_is_an_instruction(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    native.require.cache_clear()
    try:
        assert not native.supports("gelu", "cpu", torch.float32)
        with pytest.raises(ImportError, match=r"C\+\+17 compiler at hand, run `pip install \."):
            native.require()
    finally:
        native.require.cache_clear()


def test_native_is_what_the_cpu_uses_by_default():
    for op in NATIVE_OPS:
        assert dispatch.chosen(op, "cpu", torch.float32) == "native"
        assert not native.supports(op, "cuda", torch.float32)
        assert not native.supports(op, "cpu", torch.float64)
