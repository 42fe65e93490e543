"""The Triton backend without a GPU: the op grid in the interpreter, mutants of kernels, the code that they compile to.

The interpreter is chosen as kernels are imported, so one test runs this file and the op grid again in a process with
TRITON_INTERPRET=1; tests marked `interpreted` run there. Tests marked `gpu` need a CUDA device.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastbert import kernels, ops, testing
from fastbert.ops import dispatch
from fastbert.ops.pool import pool_ref

if not kernels.available():
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton
import triton.language as tl

from fastbert.kernels import add_layer_norm, ahead, attention, common, configs

interpreted = pytest.mark.skipif(not kernels.interpreted(), reason="runs in the process with TRITON_INTERPRET=1")
DEVICE = "cuda" if torch.cuda.is_available() and not kernels.interpreted() else "cpu"
on_kernels = pytest.mark.gpu if DEVICE == "cuda" else interpreted
compiled = pytest.mark.skipif(kernels.interpreted(), reason="the interpreter compiles nothing")

OPS = sorted({case.op for case in testing.CASES})


def _case(name: str) -> testing.Case:
    return next(c for c in testing.CASES if str(c) == name)


@compiled
def test_grid_and_mutants_in_the_interpreter():
    """Large cases run in fp16 alone: they take most of the time, and what they add (12 heads of 64, thousands of
    features) does not depend on the dtype."""
    here = Path(__file__).parent
    names = ("ops", "kernels", "tiles", "cuda_engine", "linear")
    keep = "(triton-cpu and not (float32 and (bert_base or mpnet_base))) or "
    keep += " or ".join(f"test_{name}" for name in names[1:])
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-k",
            keep,
            *(here / f"test_{name}.py" for name in names),
        ],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=here.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    summary = run.stdout.splitlines()[-1]
    num_large = sum("base" in case.name for case in testing.CASES)
    assert int(summary.split(" passed")[0].split()[-1]) >= 2 * len(testing.CASES) - num_large, summary


@interpreted
def test_interpreter_takes_what_it_computes_right():
    for op in OPS:
        assert kernels.supports(op, "cpu", torch.float32)
        assert kernels.supports(op, "cpu", torch.float16)
        assert not kernels.supports(op, "cpu", torch.bfloat16), "the interpreter multiplies the raw bits of bf16"
        assert not kernels.supports(op, "cuda", torch.float32)


# Mutants: a plausible mistake in a kernel must fail the oracle.


@triton.jit
def _another_hash(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68D
    return x ^ (x >> 16)


@triton.jit
def _forgets_the_mean(dy, z, weight, mean, rstd, inside, D: tl.constexpr):
    normed = tl.where(inside, (z - mean[:, None]) * rstd[:, None], 0.0)
    g = dy * weight
    return (g - normed * (tl.sum(g * normed, 1) / D)[:, None]) * rstd[:, None], normed


@triton.jit
def _one_diagonal_late(ds, shift: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :] + shift + 1
    there = (cols >= 0) & (cols < BLOCK)
    return tl.sum(tl.where(there, tl.gather(ds, tl.where(there, cols, 0), 1), 0.0), 0)


def _one_key_more(cu_seqlens, num_tokens):
    return (_token_ranges(cu_seqlens, num_tokens) + torch.tensor([[0], [1]]).int()).clamp(max=num_tokens)


@triton.jit
def _forgets_the_linear_bias(
    x, parts, part_size, x_bias, residual, offsets, inside, rows, cols, seed, threshold, keep_scale
):  # fmt: skip
    return _sum(x, parts, part_size, None, residual, offsets, inside, rows, cols, seed, threshold, keep_scale)


@triton.jit
def _origin_in_the_window(origins, tokens, low, inside):
    return low


def _cut_one_key_early(ranges, window):
    return _cut_ranges(ranges, window) - torch.tensor([[0], [1]]).int()


_cut_ranges = attention.cut_ranges
_sum = add_layer_norm._sum
_token_ranges = attention.token_ranges


MUTANTS = [
    ("add_layer_norm-dropout", common, "hash32", _another_hash),
    ("attention-dropout", common, "hash32", _another_hash),
    ("embed-dropout", common, "hash32", _another_hash),
    ("add_layer_norm-ragged", add_layer_norm, "layer_norm_grad", _forgets_the_mean),
    ("add_layer_norm-x_bias", add_layer_norm, "_sum", _forgets_the_linear_bias),
    ("attention-ragged", attention, "token_ranges", _one_key_more),
    ("attention-length_64", attention, "token_ranges", _one_key_more),
    ("attention_window-window_64", attention, "cut_ranges", _cut_one_key_early),
    ("attention_window-dropout", attention, "_origin", _origin_in_the_window),
    ("attention_rel_bias-ragged", attention, "_diagonal_sums", _one_diagonal_late),
]


@interpreted
@pytest.mark.parametrize(("name", "module", "attribute", "mutant"), MUTANTS, ids=lambda v: v if type(v) is str else "")
def test_mutant_fails(monkeypatch, name, module, attribute, mutant):
    monkeypatch.setattr(module, attribute, mutant)
    with ops.use_backend("triton"), pytest.raises(AssertionError, match="budget"):
        testing.check_case(_case(name), torch.float32)


# Properties of the token grid.


@on_kernels
def test_tokens_after_the_last_sequence_are_inert(poisoned_empty):
    """A batch may be a bucket of a fixed T: what lies after the last sequence changes nothing and gets zeros."""
    inputs = _case("attention-ragged").inputs(torch.float32, DEVICE)
    qkv, cu = inputs["qkv"].detach(), inputs["cu_seqlens"]
    T, rest = qkv.shape[0], (cu, 24, 0.3, 0.2, 5)
    bucket = torch.cat([qkv, qkv.new_full((40, *qkv.shape[1:]), float("nan"))])
    (out, lse), (alone, lse_alone) = attention.attention_fwd(bucket, *rest), attention.attention_fwd(qkv, *rest)
    assert torch.equal(out[:T], alone)
    assert (out[T:] == 0).all()
    dqkv = attention.attention_bwd(torch.ones_like(out), bucket, out, lse, *rest)
    assert torch.equal(dqkv[:T], attention.attention_bwd(torch.ones_like(alone), qkv, alone, lse_alone, *rest))


@on_kernels
def test_maximum_of_nan_infinity_and_ties(poisoned_empty):
    nan, inf = float("nan"), float("inf")
    hidden = torch.tensor([[1.0, nan, -inf, inf, 2.0], [1.0, inf, -inf, nan, 3.0], [0.0, nan, -inf, inf, 3.0]])
    cu = torch.tensor([0, 0, 3], dtype=torch.int32)
    out, argmax = (x.cpu() for x in kernels.pool_fwd(hidden.to(DEVICE), cu.to(DEVICE), "max"))
    torch.testing.assert_close(out[1], torch.tensor([1.0, nan, -inf, nan, 3.0]), equal_nan=True)
    assert argmax.tolist() == [[-1] * 5, [0, 0, 0, 1, 1]]
    torch.testing.assert_close(out, pool_ref(hidden, cu, "max"), equal_nan=True)


@on_kernels
def test_labels_outside_the_vocabulary_give_nan():
    """A GPU is not asked whether labels fit: that would cost a synchronisation."""
    logits, labels = torch.zeros(4, 8, device=DEVICE), torch.tensor([3, 8, -1, -100], device=DEVICE)
    losses, _ = kernels.cross_entropy_fwd(logits, labels, -100)
    assert losses.isnan().tolist() == [False, True, True, False]


@on_kernels
@pytest.mark.parametrize("op", OPS)
def test_no_tokens_at_all(op):
    """T = 0 is a batch like another: empty results, gradients of parameters that are zero."""
    case = next(c for c in testing.CASES if c.op == op and c.name.startswith(("ragged", "one_t")))
    inputs = case.inputs(torch.float32, DEVICE)
    rows = ("x", "residual", "input_ids", "position_ids", "type_ids", "qkv", "hidden", "logits", "labels")
    for name in set(rows) & set(inputs):
        if inputs[name] is not None and inputs[name].shape[0] > 0:
            empty = inputs[name].detach()[:0]
            inputs[name] = empty.requires_grad_() if empty.is_floating_point() else empty
    if "cu_seqlens" in inputs:
        inputs["cu_seqlens"] = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    if op == "cross_entropy":
        inputs["reduction"] = "sum"
    with ops.use_backend("triton"):
        found = testing.forward_backward(testing.PUBLIC[op], inputs)
    for key, value in found.items():
        assert value.isfinite().all(), key
        assert not value.any(), key


# Errors.


def test_tensors_on_two_devices_are_named():
    """A kernel would follow a pointer into another device's memory."""
    for case in testing.CASES:
        if case.name.startswith(("ragged", "one_t")):
            inputs = case.inputs(torch.float32)
            names = [n for n in ("bias", "residual", "position_ids", "cu_seqlens", "labels") if n in inputs]
            inputs[names[0]] = inputs[names[0]].to("meta")
            with pytest.raises(ValueError, match=f"is on cpu but {names[0]} is on meta"):
                testing.PUBLIC[case.op](**inputs)


def test_embedding_tables_on_two_devices_are_named():
    case = next(c for c in testing.CASES if str(c) == "embed-ragged")
    for table in ("position", "token_type"):
        inputs = case.inputs(torch.float32)
        inputs[table] = inputs[table].to("meta")
        with pytest.raises(ValueError, match=f"word is on cpu but {table} is on meta"):
            testing.PUBLIC["embed"](**inputs)


def test_more_tokens_than_lengths_can_count_are_named():
    qkv, cu = torch.empty(2**31, 3, 1, 16, device="meta"), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="qkv has 2147483648 tokens but cu_seqlens counts to 2147483647"):
        ops.attention(qkv, cu, 1)


def test_sizes_past_the_register_file_are_named():
    cu = torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match="head sizes 1 to 128, got 129"):
        attention.attention_fwd(torch.ones(2, 3, 1, 129), cu, 2, 1.0, 0.0, 0)
    with pytest.raises(ValueError, match="20000 features but the kernels take at most 16384"):
        configs.norm_tile(20000, torch.float32)


@pytest.mark.parametrize("op", OPS)
def test_a_dtype_without_kernels_is_named(op):
    inputs = next(c for c in testing.CASES if c.op == op).inputs(torch.float64)
    with ops.use_backend("triton"), pytest.raises(NotImplementedError, match=rf"has no {op} for torch\.float64 on cpu"):
        testing.PUBLIC[op](**inputs)


@compiled
def test_where_the_backend_runs(monkeypatch):
    assert not kernels.supports("gelu", "cpu", torch.float32)
    assert not kernels.supports("int8_linear", "cuda", torch.bfloat16)
    assert not kernels.supports("gelu", "cuda", torch.float64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert not kernels.supports("gelu", "cuda", torch.float16)
    with pytest.raises(RuntimeError, match=r"needs compute capability 8\.0, this GPU has 7\.5"):
        kernels.require()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert all(kernels.supports(op, "cuda", torch.bfloat16) for op in OPS)
    monkeypatch.setattr(kernels, "available", lambda: False)
    assert not kernels.supports("gelu", "cuda", torch.float16)
    with pytest.raises(ImportError, match="pip install triton"):
        kernels.require()


def test_every_op_has_both_directions():
    for op in OPS:
        assert callable(getattr(kernels, f"{op}_fwd"))
        assert callable(getattr(kernels, f"{op}_bwd"))
    with pytest.raises(AttributeError, match="int8_linear_fwd"):
        kernels.int8_linear_fwd  # noqa: B018


# Ahead-of-time compilation: what the compiler made of every kernel for a GPU that is not here.

FLOAT8 = ("float8_linear", "float8_rows_linear", "float8_gelu", "add_layer_norm_float8")

# Registers of a thread: 65536 a multiprocessor, so 80 leave six programs of 128 threads, up to 255 leave two. Triton
# 3.6 and 3.9 differ by up to 50 for one kernel.
MOST_REGISTERS = {
    "linear": 255,
    "short_linear": 128,
    "add_layer_norm_bwd": 255,
    "embed_bwd": 160,
    "attention_fwd": 192,
    "attention_dq": 232,
    "attention_dkv": 255,
}
FEW_REGISTERS = 80
MOST_SPILLED = {"attention_fwd": 16, "attention_dkv": 16}  # bytes: capped, and the fastest so on a GPU
BYTES_MOVED = {"ranges": 4, "cut": 4, "pool_bwd": 16}  # the rest reads 16 bytes at a time


def _check(kernel: ahead.Compiled) -> None:
    what = f"{kernel.call}: {kernel.kernel} on sm_{kernel.architecture}"
    spilled = MOST_SPILLED.get(kernel.kernel, 0)
    assert kernel.spills <= spilled, f"{what} keeps {kernel.spills} bytes of each thread in memory"
    most = MOST_REGISTERS.get(kernel.kernel, FEW_REGISTERS)
    if "rel_bias" in kernel.call:
        most = 255
    assert kernel.registers <= most, f"{what} takes {kernel.registers} registers, more than {most}"
    if kernel.kernel == "linear":
        assert kernel.architecture < 90 or "cp.async.bulk.tensor" in kernel.ptx, f"{what} copies no tiles"
    else:
        width = kernel.widest("st") if kernel.kernel == "pool_bwd" else kernel.widest("ld")
        assert width == BYTES_MOVED.get(kernel.kernel, 16), f"{what} moves {width} bytes at a time"
    if kernel.kernel.startswith(("linear", "short_linear", "attention")):
        small = kernel.kernel == "attention_dq" and "rel_bias" in kernel.call  # tiles of 32 rows: wgmma needs 64
        meant = "wgmma" if kernel.architecture >= 90 and not small else "mma"
        assert kernel.matrix_instruction == meant, f"{what} multiplies with {kernel.matrix_instruction}, not {meant}"
        assert kernel.shared <= (160 if kernel.architecture >= 90 else 99) * 1024, (
            f"{what} takes {kernel.shared} bytes of shared memory"
        )


@compiled
@pytest.mark.parametrize("architecture", ahead.ARCHITECTURES)
def test_compiles_ahead_without_spills(architecture):
    found = ahead.compile_ahead(architecture)
    fused = {"linear_gelu_fwd", "linear_add_fwd", "linear_add_norm_fwd", "linear_rows_fwd", "norm_linear_fwd"}
    fused |= {f"{name}_fwd" for name in FLOAT8} if architecture >= ahead.OLDEST_FLOAT8 else set()
    assert {c.call.split()[0] for c in found} == fused | {f"{op}_{way}" for op in OPS for way in ("fwd", "bwd")}
    for kernel in found:
        _check(kernel)


@compiled
@pytest.mark.parametrize("architecture", ahead.ARCHITECTURES)
def test_widest_heads_do_not_spill(architecture):
    for kernel in ahead.compile_ahead(architecture, head_size=128, match="attention_rel_bias"):
        assert kernel.spills == 0, f"{kernel.kernel} keeps {kernel.spills} bytes of each thread in memory"


@compiled
def test_the_absent_gpu_goes_again():
    driver = triton.runtime.driver
    before = driver._active
    ahead.compile_ahead(80, match="gelu_fwd tanh")
    assert driver._active is before

    def fails():
        with ahead._recording(90):
            raise TypeError(f"sm_{configs.architecture()}")

    with pytest.raises(TypeError, match="sm_90"):
        fails()
    assert driver._active is before


@compiled
def test_limits_catch_a_tile_too_large(monkeypatch):
    monkeypatch.setattr(attention, "attention_dq_tile", lambda *_: configs.Tile(128, 128, 4))
    kernel = next(c for c in ahead.compile_ahead(90, match="attention_bwd") if c.kernel == "attention_dq")
    with pytest.raises(AssertionError, match="in memory"):
        _check(kernel)


# On a GPU.


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("op", OPS)
def test_two_runs_give_the_same_bits(op):
    for case in (c for c in testing.CASES if c.op == op and "base" in c.name):
        with ops.use_backend("triton"):
            once, again = (
                testing.forward_backward(testing.PUBLIC[op], case.inputs(torch.bfloat16, "cuda")) for _ in range(2)
            )
        for key, value in once.items():
            assert torch.equal(value, again[key]), f"{case} {key}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_addresses_past_2_to_the_31():
    T, n = 2**31 // (3 * 12 * 64) + 640, 128
    T -= T % n
    qkv = torch.zeros(T, 3, 12, 64, dtype=torch.bfloat16, device="cuda")
    qkv[-n:] = torch.randn(n, 3, 12, 64)
    cu = torch.arange(0, T + 1, n, dtype=torch.int32, device="cuda")
    with ops.use_backend("triton"):
        alone = ops.attention(qkv[-n:], cu[:2], n)
        assert torch.equal(ops.attention(qkv, cu, n)[-n:], alone)


def test_on_a_gpu_kernels_are_the_default():
    assert dispatch.BACKENDS["triton"] == kernels.__name__
    assert dispatch.DEFAULT["cuda"] == ("triton",)
