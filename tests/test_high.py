"""Precision "high": fp32 products made of three of bf16 on AMX tiles, here in their emulation, against fp64."""

from __future__ import annotations

import copy
import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from engine_models import LENGTHS, MODELS, assert_engine_within_budget, batch_of, build, engine_run

import fastbert
from fastbert import native, use_backend
from fastbert.engine import cpu
from fastbert.models.quantize import quantize_int8
from fastbert.packing import pack

if not native.available():
    pytest.skip("the native extension was not built", allow_module_level=True)

C = native.require()
CSRC = Path(__file__).parent.parent / "csrc"
TILES = [name for name in C.supported_isas() if name.startswith("amx")]
HIGH = "float32 as three products of bfloat16"
TARGET = 2e-5
# What a product loses to splitting its operands, in units of what fp32 loses to rounding them.
ROUNDINGS = 2**-18 / 2**-24


@pytest.fixture
def precision():
    """Sets torch's precision of fp32 products, and puts it back."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.fixture(params=TILES or [pytest.param(None, marks=pytest.mark.skip(reason="AMX needs AVX-512 even emulated"))])
def tiles(request, precision):
    """An instruction set with tiles is in use, and precision "high" is asked for."""
    before = C.isa()
    C.set_isa(request.param)
    precision("high")
    yield
    C.set_isa(before)


def errors(model, batch) -> tuple[float, float]:
    """Relative errors of the engine and of fp32, both to fp64."""
    ours = engine_run(model, batch)
    with torch.no_grad(), use_backend("reference"):
        exact = copy.deepcopy(model).double().forward_packed(batch)
        same = model.forward_packed(batch)
    return tuple(float((x - exact).abs().max() / exact.abs().max()) for x in (ours, same))


@torch.no_grad()
def plan(model) -> str:
    return model.execution_plan()


@pytest.mark.parametrize("name", MODELS)
def test_every_family_and_size(tiles, name):
    model = build(name)
    assert HIGH in plan(model)
    ours, same = errors(model, batch_of(model))
    assert ours <= ROUNDINGS * same
    if name != "deep":  # which amplifies whatever is rounded seven times as much as the others
        assert ours <= TARGET
    assert ours > 2 * same, "this was exact fp32"


def test_real_weights(tiles, minilm):
    model = fastbert.BertModel.from_pretrained(minilm, add_pooling_layer=False)
    g = torch.Generator().manual_seed(0)
    batch = pack([torch.randint(1000, 30000, (n,), generator=g).tolist() for n in (12, 1, 40)])
    assert errors(model, batch)[0] <= TARGET


@pytest.mark.parametrize("lengths", [LENGTHS, [600, 40, 1]], ids=["few", "long"])
def test_threads_and_batches_change_no_bit(tiles, lengths):
    model = build("bert")
    batch = batch_of(model, lengths)
    together = engine_run(model, batch)
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(engine_run(model, batch), together)
    finally:
        torch.set_num_threads(before)
    types = batch.split(batch.type_ids)
    for ids, kinds, part in zip(batch.split(batch.input_ids), types, batch.split(together), strict=True):
        assert torch.equal(engine_run(model, pack([ids.tolist()], [kinds.tolist()])), part)


def test_weights_without_their_lows_fail(tiles, monkeypatch):
    pair = cpu._linear
    monkeypatch.setattr(cpu, "_linear", lambda linear: (pair(linear)[0].bfloat16().float(), pair(linear)[1]))
    model = build("bert")
    ours, same = errors(model, batch_of(model))
    assert ours > TARGET
    assert ours > ROUNDINGS * same


def test_the_setting_is_seen_and_other_weights_ignore_it(tiles, precision):
    model = build("bert")
    batch = batch_of(model)
    high = engine_run(model, batch)
    precision("highest")
    assert HIGH not in plan(model)
    assert_engine_within_budget(model, batch)
    exact = engine_run(model, batch)
    precision("high")
    assert not torch.equal(exact, high)
    assert torch.equal(engine_run(model, batch), high)
    assert plan(build("bert").bfloat16()).startswith("cpu engine: bfloat16, ")
    assert plan(quantize_int8(model)).startswith("cpu engine: int8 with ")


def test_without_tiles_high_is_exact(precision):
    before = C.isa()
    C.set_isa("portable")
    try:
        model = build("bert")
        exact = engine_run(model, batch_of(model))
        precision("high")
        assert "float32 (exact: only AMX is faster below)" in plan(model)
        assert torch.equal(engine_run(model, batch_of(model)), exact)
        with pytest.raises(ValueError, match="precision high needs AMX"):
            C.Encoder(cpu._weights(model), True)
    finally:
        C.set_isa(before)


# One product alone, compiled here, so that a term of its sum can be left out.

_PRODUCT = """
#include "cpu/linear.h"
using namespace fastbert;
using namespace fastbert::FASTBERT_ISA;

extern "C" void product(const float* x, const float* w, int64_t rows, int64_t in, int64_t out, float* y) {
  const Tiles tiles;
  const int64_t padded = round_up(out, kColumns);
  const float *row[256] = {}, bias[256] = {};
  for (int64_t n = 0; n < out; ++n) row[n] = w + n * in;
  Linear<split> linear{static_cast<split*>(aligned_alloc(64, round_up(panels_nbytes<split>(padded, in), 64))), bias, in,
                       padded, 0, 1};
  pack_linear<split>(row, nullptr, linear);
  Operands<split> operands(round_up(rows, kRows<split>), in);
  char* memory = static_cast<char*>(aligned_alloc(64, round_up(operands.nbytes(), 64)));
  memset(memory, 0, operands.nbytes());
  operands.place(memory);
  for (int64_t r = 0; r < rows; ++r) operands.fill(linear, r, x + r * in, in, 0);
  for (int64_t p = 0; p < padded / kColumns; ++p)
    each_tile<split>(rows, [&](int64_t r, int64_t n) LAMBDA {
      multiply(linear, p, 0, num_blocks(in), n, operands.all().from(r), y + r * padded + p * kColumns, padded);
    });
  free(memory);
  free(const_cast<split*>(linear.panels));
}
"""
_FLAGS = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=fast", "-mavx2", "-mfma", "-mf16c"]
_FLAGS += ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mavx512bf16"]
_FLAGS += ["-DFASTBERT_EMULATE_AMX", "-DFASTBERT_ISA=amxemulated", "-Wno-psabi"]


def product_error(folder: Path, old: str = "", new: str = "") -> float:
    """Relative error of a product (37, 400) by (400, 70), with `old` replaced by `new` in the code of the tiles."""
    text = (CSRC / "cpu" / "amx.h").read_text()
    if old:
        assert text.count(old) == 1, f"amx.h has {old!r} {text.count(old)} times"
    (folder / "cpu").mkdir()
    (folder / "cpu" / "amx.h").write_text(text.replace(old, new) if old else text)
    (folder / "product.cpp").write_text(_PRODUCT)
    command = [
        "g++",
        *_FLAGS,
        f"-I{folder}",
        f"-I{CSRC}",
        str(folder / "product.cpp"),
        "-o",
        str(folder / "product.so"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(37, 400, generator=g), torch.randn(70, 400, generator=g)
    y = torch.full((37, 96), torch.nan)
    sizes = map(ctypes.c_int64, (37, 400, 70))
    x_at, w_at, y_at = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, w, y))
    ctypes.CDLL(str(folder / "product.so")).product(x_at, w_at, *sizes, y_at)
    exact = x.double() @ w.double().mT
    return float((y[:, :70] - exact).abs().max() / exact.abs().max())


@pytest.mark.skipif(not TILES or shutil.which("g++") is None, reason="needs g++ and AVX-512 with bf16")
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", ""),
        ("MULTIPLY();  // a's lows, b's highs", ""),
        ("MULTIPLY();  // a's highs, b's lows", ""),
        ("LOAD_B(b + kHalf);", ""),
        ("LOAD_A(a + kTileBytes);", "LOAD_A(a);"),
    ],
    ids=["whole", "no a_low b_high", "no a_high b_low", "b_high for b_low", "a_high for a_low"],
)
def test_each_of_the_three_products_is_needed(tmp_path, old, new):
    error = product_error(tmp_path, old, new)
    assert (error <= TARGET) == (not old), error
