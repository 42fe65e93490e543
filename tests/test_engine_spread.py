"""8-bit layers whose inputs are scaled before they are rounded: engine and ops against the specification, and what it
is for."""

from __future__ import annotations

import copy

import pytest
import torch
from engine_models import SENTENCES, batch_of, build, engine_run
from test_engine_int8 import _specified, assert_int8_within_budget, bits  # noqa: F401

import fastbert
from fastbert import use_backend
from fastbert.engine import cpu, use_engine
from fastbert.models import quantize
from fastbert.models.encoder import EncoderModel
from fastbert.models.quantize import Int8Linear, quantize_int8, spread
from fastbert.packing import PackedBatch, pack
from fastbert.testing import assert_within_budget


@torch.no_grad()
def scaled(name: str) -> EncoderModel:
    """A model in 8 bits, all of whose layers scale their inputs; what it computes has changed with it."""
    model = quantize_int8(build(name))
    for linear in model.modules():
        if isinstance(linear, Int8Linear):
            linear.input_scale.mul_(torch.rand(linear.weight.shape[1]) + 0.5)
    return model


@pytest.mark.parametrize("count", [1, 3], ids=["alone", "team"])
@pytest.mark.parametrize("name", ["bert", "electra", "albert-groups", "deep"])
def test_scaled_inputs_are_within_budget(name, count, bits, threads):  # noqa: F811
    threads(count)
    model = scaled(name)
    assert_int8_within_budget(model, batch_of(model), bits)


@pytest.mark.parametrize("count", [1, 3], ids=["alone", "team"])
def test_scales_of_another_depth_block_fail(count, bits, threads):  # noqa: F811
    threads(count)
    model = scaled("deep")
    specification, batch = copy.deepcopy(model), batch_of(model)
    scale = model.encoder.layer[1].feed_forward.output.input_scale
    scale[384:768] = scale[:384].clone()
    with torch.no_grad(), use_backend("reference"):
        same = _specified(specification, True, bits).forward_packed(batch)
        exact = _specified(specification, False, bits).double().forward_packed(batch)
    with pytest.raises(AssertionError, match="budget"):
        assert_within_budget(engine_run(model, batch), same, exact)


def test_a_changed_scale_is_seen():
    model = quantize_int8(build("bert"))
    before = engine_run(model, batch_of(model))
    model.encoder.layer[0].attention.dense.input_scale.mul_(1.1)
    assert not torch.equal(engine_run(model, batch_of(model)), before)


@torch.no_grad()
def lost(model: EncoderModel, batch: PackedBatch, engine: str) -> float:
    """Of the vectors' cosine, by 8 bits in this engine."""
    with use_engine("off"):
        exact = model.pool_packed(batch, "mean", unit=True)
    narrow = quantize_int8(copy.deepcopy(model))
    with use_engine(engine):
        return 1 - (narrow.pool_packed(batch, "mean", unit=True) * exact).sum(1).mean().item()


@pytest.mark.parametrize("engine", ["auto", "off"])
def test_a_channel_that_reaches_far_leaves_the_others_their_levels(engine, minilm, monkeypatch):
    """On real weights 8 bits cost less, and much less where a norm puts one channel far above the others."""
    monkeypatch.setattr(cpu, "_num_narrow", lambda linear: linear.num_narrow)  # where 16 bits are as fast, too
    model = fastbert.BertModel.from_pretrained(minilm, dtype=torch.float32, add_pooling_layer=False)
    batch = pack(fastbert.Embedder.from_pretrained(minilm, "float32", device="cpu").tokenizer.encode(SENTENCES).ids)
    far = copy.deepcopy(model)
    for layer in far.encoder.layer:
        layer.attention_LayerNorm.weight.data[3] = 20.0
    with_scales = [lost(m, batch, engine) for m in (model, far)]
    monkeypatch.setattr(quantize, "spread", lambda norm, linear: torch.ones(linear.in_features))
    without = [lost(m, batch, engine) for m in (model, far)]
    assert with_scales[0] < 0.85 * without[0], (with_scales, without)
    assert with_scales[1] < 0.5 * without[1], (with_scales, without)


def test_spread_is_its_equation_and_one_where_nothing_comes():
    norm, linear = torch.nn.LayerNorm(4), torch.nn.Linear(4, 3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 0.0, 1.0, float("nan")]))
        norm.bias.copy_(torch.tensor([-2.0, 0.0, 0.0, 0.0]))
        linear.weight.copy_(torch.tensor([[0.5, 1.0, 0.0, 1.0], [-2.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0]]))
    torch.testing.assert_close(spread(norm, linear), torch.tensor([2.0**0.15 / 8.0**0.85, 1.0, 1.0, 1.0]))


def test_scaled_and_divided_is_the_same_layer():
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(40, 24), torch.randn(9, 40)
    x[:, 3] *= 30.0
    scale = 1 / x.abs().amax(0)
    with torch.no_grad():
        linear.weight[:, 3] /= 30.0
        exact = linear(x)
        error = {n: [(Int8Linear(linear, n, s)(x) - exact).abs().max() for s in (scale, None)] for n in (0, 24)}
    assert error[24][0] < error[24][1] / 2, error
    assert error[0][0] < error[0][1] / 2, error
