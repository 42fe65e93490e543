"""8-bit weights on the CPU engine.

The specification: a float product with the weights that the integers stand for, of activations rounded to 16 bits (or
to 8, where the CPU multiplies those faster), each block of 384 with a scale of its own. Attention multiplies bf16 where
the CPU can.
"""

from __future__ import annotations

import copy

import pytest
import torch
from engine_models import HALF_PRODUCTS, LENGTHS, MODELS, SENTENCES, batch_of, build, engine_run, plan_of

import fastbert
from fastbert import native, use_backend
from fastbert.engine import cpu
from fastbert.models.encoder import EncoderModel
from fastbert.models.quantize import Int8Linear, quantize_int8
from fastbert.packing import PackedBatch, pack
from fastbert.testing import assert_within_budget

if not native.available():
    pytest.skip("the native extension was not built", allow_module_level=True)


class _Rounded(torch.nn.Module):
    """`narrow` leading outputs take an input of 8 bits, the others one of 16; None takes it as it is."""

    def __init__(self, linear: Int8Linear, narrow: int | None, coarse: bool, block: int = 384) -> None:
        super().__init__()
        self.coarse = coarse
        self.register_buffer("weight", linear.weight.double() * linear.weight_scale.double()[:, None])
        self.register_buffer("bias", linear.bias)
        self.register_buffer("input_scale", linear.input_scale)
        self.narrow, self.block = narrow, block

    def forward(self, x):
        x = x * self.input_scale.to(x.dtype)
        y = torch.cat([self.product(x, 8, slice(self.narrow)), self.product(x, 16, slice(self.narrow, None))], 1)
        return y.bfloat16().to(y.dtype) if self.coarse else y

    def product(self, x, bits, rows):
        if self.narrow is None:
            rows = slice(None) if bits == 16 else slice(0)
        else:
            x = torch.cat([self.round(part, bits) for part in x.split(self.block, dim=1)], 1)
        return torch.nn.functional.linear(x, self.weight[rows].to(x.dtype), self.bias[rows].to(x.dtype))

    @staticmethod
    def round(x, bits):
        scale = x.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        return (x / torch.where(scale == 0, 1.0, scale)).round() * scale


def _specified(model: EncoderModel, rounded: bool, bits: int | None) -> EncoderModel:
    """The model in float, its `Int8Linear` layers replaced; `bits` None is each layer's own."""
    twin = copy.deepcopy(model)
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Int8Linear):
                coarse = rounded and name == "qkv" and native.isa() in HALF_PRODUCTS
                narrow = None if not rounded else 0 if bits == 16 else child.num_narrow
                setattr(parent, name, _Rounded(child, narrow, coarse))
    return twin


@torch.no_grad()
def assert_int8_within_budget(model: EncoderModel, batch: PackedBatch, bits: int | None) -> None:
    ours = engine_run(model, batch)
    with use_backend("reference"):
        same = _specified(model, True, bits).forward_packed(batch)
        exact = _specified(model, False, bits).double().forward_packed(batch)
    assert_within_budget(ours, same, exact)


@pytest.fixture(params=[16, None], ids=["pairs", "fours"])
def bits(request, monkeypatch):
    """Bits of activations: 16 in every layer, or each layer's own as on a CPU that multiplies 8 bits faster."""
    own = cpu._num_narrow
    monkeypatch.setattr(cpu, "_num_narrow", lambda linear: 0 if request.param else linear.num_narrow)
    assert own(Int8Linear(torch.nn.Linear(3, 3), 2)) == (2 if native.require().has_fours() else 0)
    return request.param


@pytest.mark.parametrize("name", MODELS)
def test_int8_is_within_budget(name, bits):
    model = quantize_int8(build(name))
    assert_int8_within_budget(model, batch_of(model), bits)
    assert f"int8 with {bits or 8}-bit activations" in plan_of(model)


def _scales_off_by_one(model, monkeypatch):
    model.encoder.layer[1].feed_forward.output.weight_scale.copy_(
        model.encoder.layer[1].feed_forward.output.weight_scale.roll(1)
    )


def _weights_off_by_one(model, monkeypatch):
    linear = model.encoder.layer[0].attention.qkv
    linear.weight[:, 1:-1] = linear.weight[:, :-2].clone()


def _eight_bits_for_sixteen(model, monkeypatch):
    monkeypatch.setattr(cpu, "_num_narrow", lambda linear: len(linear.weight))


def _int8_bias_dropped(model, monkeypatch):
    model.encoder.layer[2].attention.dense.bias.zero_()


@pytest.mark.parametrize(
    "mutate", [_scales_off_by_one, _weights_off_by_one, _eight_bits_for_sixteen, _int8_bias_dropped]
)
def test_int8_mutant_fails(mutate, bits, monkeypatch):
    if mutate is _eight_bits_for_sixteen and bits is None:
        pytest.skip("most layers have 8 bits there; test_values_keep_more_bits_than_queries_and_keys has it")
    model = quantize_int8(build("bert"))
    batch = batch_of(model)
    specification = copy.deepcopy(model)
    mutate(model, monkeypatch)
    with torch.no_grad(), use_backend("reference"):
        same = _specified(specification, True, bits).forward_packed(batch)
        exact = _specified(specification, False, bits).double().forward_packed(batch)
    with pytest.raises(AssertionError, match="budget"):
        assert_within_budget(engine_run(model, batch), same, exact)


def test_values_keep_more_bits_than_queries_and_keys(minilm, monkeypatch):
    """On real weights: what 8 bits cost is halved by 16 bits for the values, and they are the right third of `qkv`."""
    monkeypatch.setattr(cpu, "_num_narrow", lambda linear: linear.num_narrow)
    ids = fastbert.Embedder.from_pretrained(minilm, "float32", device="cpu").tokenizer.encode(SENTENCES).ids

    def vectors(sensitive: tuple[str, ...] | None) -> torch.Tensor:
        model = fastbert.BertModel.from_pretrained(minilm, dtype=torch.float32, add_pooling_layer=False)
        if sensitive is not None:
            quantize_int8(model, sensitive)
            assert model.encoder.layer[0].attention.qkv.num_narrow == {"values": 768, "qkv": 0}.get(*sensitive, 1152)
        with torch.inference_mode():
            return model.pool_packed(pack(ids), "mean", unit=True)

    exact = vectors(None)
    lost = {name: 1 - (vectors((name,)) * exact).sum(1).mean() for name in ("qkv", "values", "nothing")}
    assert lost["values"] < 0.6 * lost["nothing"], lost
    assert lost["values"] < 1.2 * lost["qkv"], lost


def test_bits_are_of_whole_parts():
    model = quantize_int8(build("bert"))
    model.encoder.layer[0].attention.qkv.num_narrow = 95
    with torch.no_grad(), pytest.raises(ValueError, match="qkv takes activations of 8 bits in 95 of 144 rows"):
        cpu.compile(model)


def test_a_large_value_hurts_its_own_block_only(bits):
    model = quantize_int8(build("deep"))
    with torch.no_grad():
        model.embeddings.LayerNorm.weight[3] = 1000.0
    assert_int8_within_budget(model, batch_of(model), bits)


def test_int8_changes_no_bit_with_threads_and_batches(bits, threads):
    model = quantize_int8(build("deep"))
    for lengths in (LENGTHS, [33] * 30, [600, 40, 1]):
        batch = batch_of(model, lengths)
        together = engine_run(model, batch)
        for count in (1, 2, 3):
            threads(count)
            assert torch.equal(engine_run(model, batch), together), count
        types, parts = batch.split(batch.type_ids), batch.split(together)
        for ids, kinds, part in list(zip(batch.split(batch.input_ids), types, parts, strict=True))[:9]:
            assert torch.equal(engine_run(model, pack([ids.tolist()], [kinds.tolist()])), part)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_int8_keeps_what_is_not_finite_in_its_sequence(value, bits):
    model = quantize_int8(build("bert"))
    batch = pack([[5, 6, 7], [8, 9], [6, 6]])
    clean = engine_run(model, batch)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[9] = value
    first, second, third = batch.split(engine_run(model, batch))
    assert not second.isfinite().any()
    assert torch.equal(torch.cat([first, third]), clean[[0, 1, 2, 5, 6]])


def test_int8_takes_rows_of_zeros(bits):
    model = quantize_int8(build("bert-relu"))
    with torch.no_grad():
        model.embeddings.LayerNorm.weight.zero_()
        model.embeddings.LayerNorm.bias.zero_()
        for layer in model.encoder.layer:
            layer.feed_forward.intermediate.bias.fill_(-100.0)  # and what relu leaves of it
    assert_int8_within_budget(model, batch_of(model), bits)


def test_int8_changes_are_seen():
    model = quantize_int8(build("bert"))
    dense = model.encoder.layer[0].attention.dense
    changes = (
        lambda: dense.weight.neg_(),
        lambda: dense.weight_scale.mul_(1.1),
        lambda: dense.bias.add_(0.1),
        lambda: setattr(dense, "weight", dense.weight.clone().neg_()),
        lambda: dense.weight.data.neg_(),
    )
    before = engine_run(model, batch_of(model))
    for change in changes:
        change()
        after = engine_run(model, batch_of(model))
        assert not torch.equal(after, before)
        before = after
