"""Every op x backend x dtype x case against the error budget, and the references against torch's own operators."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fastbert import ops, testing
from fastbert.ops import dispatch
from fastbert.ops.add_layer_norm import add_layer_norm_ref
from fastbert.ops.attention import attention_probs, attention_ref
from fastbert.ops.cross_entropy import cross_entropy_ref
from fastbert.ops.dropout import dropout_keep, dropout_ref, hash32
from fastbert.ops.embed import embed_ref
from fastbert.ops.gelu import gelu_ref
from fastbert.ops.pool import pool_ref

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


# Combinations that a backend claims. What it does not claim is dropped here: `python -m fastbert.ops` prints those.
# The native kernels on CUDA have no backward: tests/test_cuda.py has them.
GRID = [
    pytest.param(
        name, device, dtype, case,
        id=f"{name}-{device}-{str(dtype)[6:]}-{case}", marks=[pytest.mark.gpu] if device == "cuda" else [],
    )
    for name in dispatch.BACKENDS
    for device in DEVICES
    for dtype in DTYPES
    for case in testing.CASES
    if (name, device) != ("native", "cuda") and dispatch.has(name, case.op, device, dtype)
]  # fmt: skip


@pytest.mark.parametrize(("backend", "device", "dtype", "case"), GRID)
def test_backend_within_budget(poisoned_empty, backend, device, dtype, case):
    with ops.use_backend(backend):
        testing.check_case(case, dtype, device)


# The references themselves, in fp64, against torch's padded operators: an independent formulation.


def _sdpa(qkv, cu_seqlens, max_seqlen, dropout_p=0.0, seed=0):
    """One dense attention over all tokens with a block-diagonal mask."""
    T = qkv.shape[0]
    owner = torch.bucketize(torch.arange(T), cu_seqlens.long(), right=True)
    mask = owner[:, None] == owner
    q, k, v = qkv.permute(1, 2, 0, 3)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)


def _sdpa_window(qkv, cu_seqlens, max_seqlen, window, dropout_p=0.0, seed=0):
    """The same with a band of the dense mask."""
    T = qkv.shape[0]
    owner = torch.bucketize(torch.arange(T), cu_seqlens.long(), right=True)
    band = torch.ones(T, T).triu(-(window // 2)).tril(window // 2).bool()
    q, k, v = qkv.permute(1, 2, 0, 3)
    mask = (owner[:, None] == owner) & band
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)


def _sdpa_rel_bias(qkv, cu_seqlens, max_seqlen, rel_bias, dropout_p=0.0, seed=0):
    """The same with a dense additive mask, filled one diagonal after the other."""
    T, R = qkv.shape[0], (rel_bias.shape[1] + 1) // 2
    rows = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        for i in range(start, end):
            near = [rel_bias[:, max(0, min(2 * R - 2, j - i + R - 1))] for j in range(start, end)]
            row = torch.stack(near, 1)
            rows.append(F.pad(row, (start, T - end), value=-math.inf))
    q, k, v = qkv.permute(1, 2, 0, 3)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.stack(rows, 1)).transpose(0, 1)


def _pool_loop(hidden, cu_seqlens, mode):
    rows = []
    for x in hidden.split(cu_seqlens.diff().tolist()):
        n = x.shape[0]
        if n == 0:
            rows.append(hidden.new_zeros(hidden.shape[1]))
        elif mode == "weightedmean":
            w = torch.arange(1, n + 1, dtype=x.dtype)[:, None]
            rows.append((x * w).sum(0) / w.sum())
        else:
            rows.append(
                {
                    "cls": lambda x: x[0],
                    "lasttoken": lambda x: x[-1],
                    "max": lambda x: x.max(0).values,
                    "mean": lambda x: x.mean(0),
                    "mean_sqrt_len_tokens": lambda x: x.sum(0) / math.sqrt(len(x)),
                }[mode](x)
            )
    return torch.stack(rows)


def _nn_embed(input_ids, position_ids, type_ids, word, position, token_type, weight, bias, eps, padding_idx, **_):
    z = F.embedding(input_ids, word, padding_idx=padding_idx) + position[position_ids]
    z = z if token_type is None else z + token_type[type_ids]
    return F.layer_norm(z, z.shape[-1:], weight, bias, eps)


def _nn_add_layer_norm(x, residual, weight, bias, eps, x_bias=None, **_):
    z = sum(part for part in (x, residual, x_bias) if part is not None)
    return F.layer_norm(z, z.shape[-1:], weight, bias, eps)


INDEPENDENT = {
    "gelu": lambda x, bias, approximate: F.gelu(x if bias is None else x + bias, approximate=approximate),
    "add_layer_norm": _nn_add_layer_norm,
    "embed": _nn_embed,
    "attention": _sdpa,
    "attention_rel_bias": _sdpa_rel_bias,
    "attention_window": _sdpa_window,
    "pool": _pool_loop,
    "cross_entropy": lambda logits, labels, reduction: getattr(
        torch.logsumexp(logits, 1)[labels != -100]
        - logits[labels != -100].gather(1, labels[labels != -100][:, None])[:, 0],
        reduction,
    )(),
}


@pytest.mark.parametrize("case", [c for c in testing.CASES if "dropout" not in c.name], ids=str)
def test_reference_equals_torch(case):
    inputs = testing.widen(case.inputs(torch.float64))
    inputs |= {"dropout_p": 0.0} if "dropout_p" in inputs else {}
    reference = testing.forward_backward(testing.REFERENCES[case.op], inputs)
    independent = testing.forward_backward(INDEPENDENT[case.op], inputs)
    for key, exact in independent.items():
        error = (reference[key] - exact).abs().max().item()
        assert error <= 1e-12 * max(1.0, exact.abs().max().item()), f"{case} {key}: {error:.2e}"


# Mutants: a plausible mistake in each op must fail the same oracle.


def _tanh_for_erf(x, bias, approximate):
    return gelu_ref(x, bias, "tanh")


def _eps_1e_3(x, residual, weight, bias, eps, dropout_p, seed):
    return add_layer_norm_ref(x, residual, weight, bias, eps + 1e-3, dropout_p, seed)


def _residual_dropped_too(x, residual, weight, bias, eps, dropout_p, seed):
    return add_layer_norm_ref(x + residual, torch.zeros_like(x), weight, bias, eps, dropout_p, seed)


def _bias_after_dropout(x, residual, weight, bias, eps, dropout_p, seed, x_bias):
    return add_layer_norm_ref(x, residual + x_bias, weight, bias, eps, dropout_p, seed)


def _boundary_off_by_one(qkv, cu_seqlens, **rest):
    shifted = cu_seqlens.clone()
    shifted[1:-1] = (shifted[1:-1] + 1).clamp(max=int(cu_seqlens[-1]))
    return attention_ref(qkv, shifted, **rest)


def _one_sequence(qkv, cu_seqlens, max_seqlen, **rest):
    return attention_ref(qkv, cu_seqlens[[0, -1]], qkv.shape[0], **rest)


def _unscaled(qkv, cu_seqlens, max_seqlen, **rest):
    return attention_ref(qkv, cu_seqlens, max_seqlen, scale=1.0, **rest)


def _window_one_wider(window, **rest):
    return attention_ref(window=window + 2, **rest)


def _window_whole_not_half(window, **rest):
    return attention_ref(window=2 * window, **rest)


def _window_forgotten(window, **rest):
    return attention_ref(**rest)


def _offset_of_the_query(rel_bias, **rest):
    return attention_ref(rel_bias=rel_bias.flip(1), **rest)


def _clamped_one_early(rel_bias, **rest):
    ends = [rel_bias[:, 1:2], rel_bias[:, 1:-1], rel_bias[:, -2:-1]]
    return attention_ref(rel_bias=torch.cat(ends, 1), **rest)


def _bias_scaled_too(rel_bias, qkv, **rest):
    return attention_ref(qkv=qkv, rel_bias=rel_bias * qkv.shape[-1] ** -0.5, **rest)


def _types_ignored(token_type, **rest):
    return embed_ref(token_type=token_type * 0, **rest)


def _padding_row_trained(padding_idx, **rest):
    return embed_ref(padding_idx=None, **rest)


def _mean_over_n_plus_1(hidden, cu_seqlens, mode):
    n = cu_seqlens.diff()[:, None]
    return pool_ref(hidden, cu_seqlens, mode) * n / (n + 1)


def _mean_over_all_rows(logits, labels, reduction):
    kept = (labels != -100).sum() / len(labels)
    return cross_entropy_ref(logits, labels, reduction=reduction) * kept


# A tanh GELU and a wrong eps differ by less than one rounding of bf16, so mutants are judged in fp32.
@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("gelu-ragged", _tanh_for_erf),
        ("add_layer_norm-ragged", _eps_1e_3),
        ("add_layer_norm-dropout", _residual_dropped_too),
        ("add_layer_norm-x_bias_dropout", _bias_after_dropout),
        ("add_layer_norm-autocast_dropout", _bias_after_dropout),
        ("attention-ragged", _boundary_off_by_one),
        ("attention-equal_runs", _one_sequence),
        ("attention-bert_base", _unscaled),
        ("attention_rel_bias-ragged", _offset_of_the_query),
        ("attention_rel_bias-ragged", _clamped_one_early),
        ("attention_rel_bias-mpnet_base", _clamped_one_early),
        ("attention_rel_bias-length_64", _bias_scaled_too),
        ("attention_window-ragged", _window_one_wider),
        ("attention_window-window_130", _window_one_wider),
        ("attention_window-window_64", _window_whole_not_half),
        ("attention_window-dropout", _window_forgotten),
        ("embed-ragged", _types_ignored),
        ("embed-bert_base", _padding_row_trained),
        ("pool-ragged_mean", _mean_over_n_plus_1),
        ("cross_entropy-ragged", _mean_over_all_rows),
    ],
    ids=lambda v: v if isinstance(v, str) else v.__name__.strip("_"),
)
def test_mutant_fails(name, mutant):
    case = next(c for c in testing.CASES if str(c) == name)
    with pytest.raises(AssertionError, match=r"budget|finite"):
        testing.check_case(case, torch.float32, function=mutant)


def test_oracle_rejects_nan_shape_and_dtype():
    exact = torch.ones(3, dtype=torch.float64)
    same = torch.ones(3)
    testing.assert_within_budget(torch.ones(3), same, exact)
    with pytest.raises(AssertionError, match="finite"):
        testing.assert_within_budget(torch.tensor([1.0, float("nan"), 1.0]), same, exact)
    with pytest.raises(AssertionError, match="shape"):
        testing.assert_within_budget(torch.ones(4), same, exact)
    with pytest.raises(AssertionError, match="dtype"):
        testing.assert_within_budget(torch.ones(3).half(), same, exact)


# Dropout: a pure function of seed and position.


def test_hash_is_lowbias32():
    def plain(x):
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    values = [0, 1, 2, 2**16, 2**31, 2**32 - 1, 123456789]
    assert hash32(torch.tensor(values)).tolist() == [plain(v) for v in values]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_rate_and_mean(p):
    rows, cols = torch.arange(400)[:, None], torch.arange(500)
    n = 400 * 500
    sigma = math.sqrt(p * (1 - p) / n)
    keeps = torch.stack([dropout_keep(seed, rows, cols, p) for seed in (0, 1, 2**31)])
    assert ((keeps.double().mean((1, 2)) - (1 - p)).abs() < 4 * sigma).all()
    assert (keeps.double().mean((0, 1)) - (1 - p)).abs().max() < 6 * math.sqrt(p * (1 - p) / 1200)  # no bad column
    agree = (keeps[0] == keeps[1]).double().mean()
    assert abs(agree - (p * p + (1 - p) ** 2)) < 5e-3  # two seeds are independent
    x = torch.ones(400, 500)
    assert abs(dropout_ref(x, p, 3).mean() - 1) < 4 * sigma / (1 - p)


@pytest.mark.parametrize("op", ["attention", "attention_rel_bias", "attention_window", "add_layer_norm", "embed"])
def test_dropout_seed_matters_and_repeats(op):
    case = next(c for c in testing.CASES if str(c) == f"{op}-dropout")
    inputs = case.inputs(torch.float32)
    function = testing.PUBLIC[op]
    once, again, other = function(**inputs), function(**inputs), function(**(inputs | {"seed": 4321}))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


# Properties.


def test_sequence_alone_equals_itself_in_a_batch():
    inputs = next(c for c in testing.CASES if str(c) == "attention-bert_base").inputs(torch.float64)
    qkv, cu = inputs["qkv"], inputs["cu_seqlens"]
    together = ops.attention(qkv, cu, 128).split(cu.diff().tolist())
    for i, part in enumerate(together):
        alone = qkv[cu[i] : cu[i + 1]]
        n = alone.shape[0]
        torch.testing.assert_close(ops.attention(alone, torch.tensor([0, n]).int(), n), part, rtol=0, atol=1e-13)


def test_attention_of_one_token_is_its_value():
    qkv = torch.randn(4, 3, 2, 8)
    out = ops.attention(qkv, torch.arange(5).int(), 1)
    torch.testing.assert_close(out, qkv[:, 2], rtol=0, atol=0)


@pytest.mark.parametrize("op", ["attention", "attention_rel_bias", "attention_window"])
def test_attention_probs_are_the_attention(op):
    inputs = next(c for c in testing.CASES if str(c) == f"{op}-ragged").inputs(torch.float64)
    lengths = inputs["cu_seqlens"].diff().tolist()
    probs = attention_probs(
        inputs["qkv"], inputs["cu_seqlens"], rel_bias=inputs.get("rel_bias"), window=inputs.get("window")
    )
    assert [p.shape[-1] for p in probs] == lengths
    values = inputs["qkv"][:, 2].split(lengths)
    out = torch.cat([torch.einsum("hij,jhk->ihk", p, v) for p, v in zip(probs, values, strict=True)])
    torch.testing.assert_close(out, ops.attention(**inputs), rtol=0, atol=1e-13)


class _RelBiasKernel:
    """A backend with the agreed signatures, whose kernels are the reference and its autograd."""

    @staticmethod
    def attention_rel_bias_fwd(qkv, rel_bias, cu_seqlens, max_seqlen, scale, dropout_p, seed):
        out = attention_ref(qkv, cu_seqlens, max_seqlen, scale, dropout_p, seed, rel_bias)
        return out, qkv.new_zeros(qkv.shape[0], qkv.shape[2])

    @staticmethod
    def attention_rel_bias_bwd(dout, qkv, rel_bias, out, lse, cu_seqlens, max_seqlen, scale, dropout_p, seed):
        with torch.enable_grad():
            leaves = [qkv.detach().requires_grad_(), rel_bias.detach().requires_grad_()]
            again = attention_ref(leaves[0], cu_seqlens, max_seqlen, scale, dropout_p, seed, leaves[1])
        assert torch.equal(again, out)
        return torch.autograd.grad(again, leaves, dout)


def test_a_backend_of_attention_rel_bias_gets_its_arguments(monkeypatch):
    case = next(c for c in testing.CASES if str(c) == "attention_rel_bias-dropout")
    asked = []
    module = sys.modules["fastbert.ops.attention"]  # the package has a function of that name
    monkeypatch.setattr(module, "backend_for", lambda op, x: asked.append(op) or _RelBiasKernel)
    testing.check_case(case, torch.float32)
    assert asked == ["attention_rel_bias"]


def test_max_pooling_keeps_nan_as_torch_does():
    hidden = torch.tensor([[1.0, float("nan")], [float("nan"), 2.0], [2.0, 1.0]]).repeat(1, 40)
    cu_seqlens = torch.tensor([0, 3]).int()
    for backend in ("reference", *(b for b in dispatch.BACKENDS if dispatch.has(b, "pool", "cpu", hidden.dtype))):
        with ops.use_backend(backend):
            assert ops.pool(hidden, cu_seqlens, "max").isnan().all(), backend


# Errors, and the dispatch table.


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.gelu(torch.ones(2, 3), torch.ones(4)), ValueError, r"bias has shape \(4,\) but x has 3"),
        (lambda: ops.gelu(torch.ones(2, 3), approximate="erf"), ValueError, "must be one of"),
        (lambda: ops.add_layer_norm(torch.ones(2, 3), None, torch.ones(4), torch.ones(3)), ValueError, "weight has"),
        (
            lambda: ops.add_layer_norm(torch.ones(2, 3), None, torch.ones(3), torch.ones(3), x_bias=torch.ones(2)),
            ValueError,
            r"x_bias has shape \(2,\) but x has 3",
        ),
        (
            lambda: ops.add_layer_norm(torch.ones(2, 3), torch.ones(3, 3), torch.ones(3), torch.ones(3)),
            ValueError,
            r"residual has shape \(3, 3\) but x has \(2, 3\)",
        ),
        (
            lambda: ops.add_layer_norm(torch.ones(2, 3), None, torch.ones(3), torch.ones(3), dropout_p=1.0),
            ValueError,
            r"\[0, 1\)",
        ),
        (lambda: ops.attention(torch.ones(2, 3, 4), torch.zeros(1).int(), 0), ValueError, r"\(T, 3, H, K\)"),
        (lambda: ops.attention(torch.ones(2, 3, 1, 4), torch.tensor([0, 2]), 2), ValueError, "int32"),
        (lambda: ops.attention(torch.ones(2, 3, 1, 4), torch.tensor([0, 3]).int(), 3), ValueError, "ends at 3"),
        (
            lambda: ops.attention(torch.ones(2, 3, 2, 4), torch.tensor([0, 2]).int(), 2, rel_bias=torch.ones(1, 3)),
            ValueError,
            r"got \(1, 3\) for qkv with 2 heads",
        ),
        (
            lambda: ops.attention(torch.ones(2, 3, 2, 4), torch.tensor([0, 2]).int(), 2, rel_bias=torch.ones(2, 4)),
            ValueError,
            "odd number of offsets",
        ),
        (
            lambda: ops.attention(torch.ones(2, 3, 2, 4), torch.tensor([0, 2]).int(), 2, window=-1),
            ValueError,
            "at least 0",
        ),
        (lambda: ops.pool(torch.ones(2, 3), torch.tensor([0, 2]).int(), "median"), ValueError, "weightedmean"),
        (lambda: ops.pool(torch.ones(2, 3), torch.tensor([0, 1]).int()), ValueError, "ends at 1"),
        (lambda: ops.cross_entropy(torch.ones(2, 3), torch.tensor([0, 3])), IndexError, "label 3 is outside"),
        (lambda: ops.cross_entropy(torch.ones(2, 3), torch.tensor([0])), ValueError, r"\(M, V\)"),
        (lambda: ops.cross_entropy(torch.ones(1, 3), torch.tensor([0]), reduction="none"), ValueError, "'none'"),
        (lambda: ops.plan_mask(torch.ones(2, 3)), ValueError, "bool"),
        (lambda: ops.plan_batches(torch.tensor([3, -1]), 8), ValueError, "-1"),
        (lambda: ops.plan_batches(torch.tensor([3]), 0), ValueError, "at least 1"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_ids_outside_a_table_are_named():
    inputs = next(c for c in testing.CASES if str(c) == "embed-ragged").inputs(torch.float32)
    for name, value in (("input_ids", 50), ("position_ids", 40), ("type_ids", -1)):
        ids = inputs[name].clone()
        ids[3] = value
        with pytest.raises(IndexError, match=name):
            ops.embed(**(inputs | {name: ids}))


def test_forcing_a_backend(monkeypatch):
    with pytest.raises(ValueError, match="unknown backend 'cuda'"), ops.use_backend("cuda"):
        pass
    x = torch.ones(2, 3, dtype=torch.complex64)
    with ops.use_backend("triton"), pytest.raises(NotImplementedError, match=r"'triton' has no gelu .* on cpu"):
        ops.gelu(x)
    monkeypatch.setenv("FASTBERT_BACKEND", "reference")
    assert dispatch.backend_for("gelu", torch.ones(2)) is None
    monkeypatch.setenv("FASTBERT_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="FASTBERT_BACKEND: unknown backend 'nonsense'"):
        ops.gelu(torch.ones(2, 3))


def test_table_lists_every_op_and_backend():
    shown = subprocess.run([sys.executable, "-m", "fastbert.ops"], capture_output=True, text=True, check=True).stdout
    for name in (*ops.OPS, *dispatch.BACKENDS, "reference"):
        assert name in shown
