"""The CPU engine against the reference: every family, size, instruction set, schedule; and that it is never stale."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

import fastbert
from fastbert import machine, native, use_backend
from fastbert.engine import choice, cpu, use_engine
from fastbert.hub import DEFAULT_MODEL, resolve
from fastbert.models.activations import activation
from fastbert.models.encoder import EncoderModel
from fastbert.models.quantize import Int8Linear, quantize_int8
from fastbert.ops import l2_normalize, pool
from fastbert.ops.pool import MODES
from fastbert.packing import PackedBatch, pack
from fastbert.testing import assert_within_budget

if not native.available():
    pytest.skip("the native extension was not built", allow_module_level=True)

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 700,
    "initializer_range": 0.1,
}
DISTILBERT = {
    "vocab_size": 97,
    "dim": 48,
    "n_layers": 3,
    "n_heads": 4,
    "hidden_dim": 80,
    "max_position_embeddings": 700,
    "initializer_range": 0.1,
}

MODELS = {
    "bert": lambda: fastbert.BertModel(fastbert.BertConfig(**SMALL)),
    "bert-tanh": lambda: fastbert.BertModel(fastbert.BertConfig(**SMALL | {"hidden_act": "gelu_new"})),
    "bert-relu": lambda: fastbert.BertModel(fastbert.BertConfig(**SMALL | {"hidden_act": "relu"})),
    "bert-silu": lambda: fastbert.BertModel(fastbert.BertConfig(**SMALL | {"hidden_act": "silu"})),
    "bert-linear": lambda: fastbert.BertModel(fastbert.BertConfig(**SMALL | {"hidden_act": "linear"})),
    "roberta": lambda: fastbert.RobertaModel(fastbert.RobertaConfig(**SMALL, type_vocab_size=1, layer_norm_eps=1e-5)),
    "distilbert": lambda: fastbert.DistilBertModel(fastbert.DistilBertConfig(**DISTILBERT)),
    "electra": lambda: fastbert.ElectraModel(fastbert.ElectraConfig(**SMALL, embedding_size=20)),
    "electra-square": lambda: fastbert.ElectraModel(fastbert.ElectraConfig(**SMALL, embedding_size=48)),
    "albert": lambda: fastbert.AlbertModel(fastbert.AlbertConfig(**SMALL, embedding_size=100)),
    "albert-groups": lambda: fastbert.AlbertModel(
        fastbert.AlbertConfig(**SMALL, embedding_size=20, num_hidden_groups=2, inner_group_num=2)
    ),
    "mpnet": lambda: fastbert.MPNetModel(fastbert.MPNetConfig(**SMALL, layer_norm_eps=1e-5)),
    # Sizes: heads of 5 (and an odd depth), one head, heads of 64, several depth blocks, a ragged last block.
    "heads-of-5": lambda: _sized(15, 3, 33),
    "one-head": lambda: _sized(36, 1, 100),
    "heads-of-64": lambda: _sized(128, 2, 300),
    "deep": lambda: _sized(400, 5, 801),
}
SENTENCES = [
    "The committee will publish its final report in the first week of May.",
    "She repaired the old radio with parts from a broken clock.",
    "Rain is expected in the north, with strong winds along the coast.",
    "How do I reset the password of my account?",
    "The enzyme loses its activity at temperatures above forty degrees.",
    "Profits fell by a third after the company lost its largest customer.",
    "Children under twelve travel free when they are accompanied by an adult.",
    "The painting was sold to a museum in Vienna shortly before the war.",
]
HALF_PRODUCTS = ("avx512bf16", "amx", "amxemulated")  # multiply bf16
LENGTHS = [5, 1, 0, 24, 7, 33, 16, 17, 70]


def _sized(hidden: int, heads: int, inner: int) -> EncoderModel:
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": inner, "num_hidden_layers": 2}
    return fastbert.BertModel(fastbert.BertConfig(**SMALL | sizes))


def build(name: str, seed: int = 0) -> EncoderModel:
    torch.manual_seed(seed)
    model = MODELS[name]()
    with torch.no_grad():
        for key, parameter in model.named_parameters():  # zeros and ones hide swapped biases and norms
            if key.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif "norm" in key.lower():
                parameter.normal_(1, 0.1)
    return model.eval()


def batch_of(model: EncoderModel, lengths: list[int] = LENGTHS, seed: int = 0) -> PackedBatch:
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(5, 97, (n,), generator=g).tolist() for n in lengths]
    table = model.embeddings.token_type_embeddings
    types = None
    if table is not None and table.num_embeddings > 1:
        types = [torch.randint(0, 2, (n,), generator=g).tolist() for n in lengths]
    return pack(ids, types, model.position_offset)


@torch.no_grad()
def engine_run(model: EncoderModel, batch: PackedBatch) -> torch.Tensor:
    """What the model's engine computes, sure that there is one."""
    assert model.execution_plan().startswith("cpu engine: "), model.execution_plan()
    return model.forward_packed(batch)


@torch.no_grad()
def assert_engine_within_budget(model: EncoderModel, batch: PackedBatch) -> None:
    ours = engine_run(model, batch)
    with use_backend("reference"):
        same = model.forward_packed(batch)
        exact = copy.deepcopy(model).double().forward_packed(batch)
    assert_within_budget(ours, same, exact)


@pytest.fixture
def threads(monkeypatch):
    """Sets the number of threads, however many cores there are, and puts it back."""
    monkeypatch.setattr(machine, "cpu", lambda: machine.Cpu("many cores", "", (), 64, 64, None))
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@dtypes
@pytest.mark.parametrize("name", MODELS)
def test_every_family_and_size_is_within_budget(name, dtype):
    model = build(name).to(dtype)
    assert_engine_within_budget(model, batch_of(model))


@dtypes
def test_real_weights_are_within_budget(dtype, minilm):
    model = fastbert.BertModel.from_pretrained(minilm, dtype=dtype, add_pooling_layer=False)
    g = torch.Generator().manual_seed(0)
    batch = pack([torch.randint(1000, 30000, (n,), generator=g).tolist() for n in (12, 1, 60, 128)])
    assert_engine_within_budget(model, batch)


# 8-bit weights. The specification: a float product with the weights that the integers stand for, of activations rounded
# to 16 bits (or to 8, where the CPU multiplies those faster), each block of 384 with a scale of its own. Attention
# multiplies bf16 where the CPU can.


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
    assert f"int8 with {bits or 8}-bit activations" in _plan(model)


@torch.no_grad()
def _plan(model: EncoderModel) -> str:
    return model.execution_plan()


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


_EVERY_MODEL = """
import torch
from fastbert import native
import test_engine as t
torch.set_num_threads({threads})
assert native.isa() == {isa!r}, native.isa()
for name in t.MODELS:
    for dtype in (torch.float32, torch.bfloat16):
        model = t.build(name).to(dtype)
        t.assert_engine_within_budget(model, t.batch_of(model))
for bits in (16, None):
    t.cpu._num_narrow = lambda linear: 0 if bits else linear.num_narrow
    for name in t.MODELS:
        model = t.quantize_int8(t.build(name))
        t.assert_int8_within_budget(model, t.batch_of(model), bits)
"""


@pytest.mark.parametrize("isa", [name for name in native.require().supported_isas() if name != native.isa()])
def test_every_instruction_set_is_within_budget(isa):
    done = subprocess.run(
        [sys.executable, "-c", _EVERY_MODEL.format(isa=isa, threads=1)],
        env={**os.environ, "FASTBERT_ISA": isa, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


# Mutants: plausible mistakes, each of which the budget must not let pass.


def _column_off_by_one(monkeypatch):
    pair = cpu._linear
    monkeypatch.setattr(cpu, "_linear", lambda linear: (pair(linear)[0].roll(1, 0), pair(linear)[1]))


def _bias_dropped(monkeypatch):
    monkeypatch.setattr(cpu, "_linear", lambda linear: (linear.weight.detach(), None))


def _eps_changed(monkeypatch):
    norm = cpu._norm
    monkeypatch.setattr(cpu, "_norm", lambda module: (*norm(module)[:2], 1e-3))


def _tanh_for_erf(monkeypatch):
    monkeypatch.setattr(cpu, "_ACTIVATIONS", dict.fromkeys(cpu._ACTIVATIONS, "gelu_tanh"))


def _types_ignored(monkeypatch):
    init = cpu.Engine.__init__

    def without_types(self, *args):
        init(self, *args)
        self._has_types = False

    monkeypatch.setattr(cpu.Engine, "__init__", without_types)


def _order_reversed(monkeypatch):
    weights = cpu._weights
    monkeypatch.setattr(cpu, "_weights", lambda model: (w := weights(model)) | {"order": w["order"][::-1]})


def _heads_merged(monkeypatch):
    weights = cpu._weights
    monkeypatch.setattr(cpu, "_weights", lambda model: weights(model) | {"num_heads": 2})


def _rel_bias_transposed(monkeypatch):
    weights = cpu._weights
    monkeypatch.setattr(
        cpu, "_weights", lambda model: (w := weights(model)) | {"rel_bias": w["rel_bias"].flip(1).contiguous()}
    )


def _boundary_off_by_one(monkeypatch):
    run = cpu.Engine.run

    def shifted(self, batch, *pooling):
        cu = batch.cu_seqlens.clone()
        cu[1] += 1
        return run(self, dataclasses.replace(batch, cu_seqlens=cu), *pooling)

    monkeypatch.setattr(cpu.Engine, "run", shifted)


@pytest.mark.parametrize(
    ("name", "mutate"),
    [
        ("bert", _column_off_by_one),
        ("bert", _bias_dropped),
        ("bert", _eps_changed),
        ("bert", _tanh_for_erf),
        ("bert", _types_ignored),
        ("bert", _order_reversed),
        ("bert", _heads_merged),
        ("bert", _boundary_off_by_one),
        ("mpnet", _rel_bias_transposed),
        ("albert-groups", _order_reversed),
    ],
)
def test_mutant_fails(name, mutate, monkeypatch):
    model = build(name)
    assert_engine_within_budget(model, batch_of(model))
    mutate(monkeypatch)
    mutant = build(name)
    with pytest.raises(AssertionError, match="budget"):
        assert_engine_within_budget(mutant, batch_of(mutant))


# Batches and threads: neither changes a bit.


@pytest.mark.parametrize("name", ["bert", "mpnet", "deep"])
@pytest.mark.parametrize("lengths", [LENGTHS, [33] * 30, [600, 40, 1]], ids=["few", "many", "long"])
@dtypes
def test_threads_and_batches_change_no_bit(name, lengths, dtype, threads):
    model = build(name).to(dtype)
    batch = batch_of(model, lengths)
    together = engine_run(model, batch)
    for count in (1, 2, 3, 5):
        threads(count)
        assert torch.equal(engine_run(model, batch), together), count
    parts = batch.split(together)
    types = [None] * len(parts) if batch.type_ids is None else batch.split(batch.type_ids)
    for ids, type_ids, part in list(zip(batch.split(batch.input_ids), types, parts, strict=True))[:9]:
        kinds = None if type_ids is None else [type_ids.tolist()]
        assert torch.equal(engine_run(model, pack([ids.tolist()], kinds, model.position_offset)), part)


@pytest.mark.parametrize(
    ("affinity", "quota", "asked", "expected"),
    [(8, None, 5, 5), (8, None, 1, 1), (3, None, 5, 3), (8, 1.5, 5, 2), (8, 0.2, 5, 1)],
)
def test_threads_are_those_asked_for_that_have_a_core(affinity, quota, asked, expected, threads, monkeypatch):
    monkeypatch.setattr(machine, "cpu", lambda: machine.Cpu("x", "", (), 8, affinity, quota))
    model = build("bert")
    engine_run(model, batch_of(model))
    given = []
    monkeypatch.setattr(
        choice._compiled[model], "_encoder", SimpleNamespace(forward=lambda *args: given.append(args[6]))
    )
    threads(asked)  # after the model was packed
    engine_run(model, batch_of(model))
    assert given == [expected]
    assert f" {expected} threads, " in _plan(model)


def test_permuting_sequences_permutes_results():
    model = build("electra")
    batch = batch_of(model)
    order = [4, 2, 8, 0, 1, 7, 3, 6, 5]
    ids, types = (batch.split(x) for x in (batch.input_ids, batch.type_ids))
    permuted = pack([ids[i].tolist() for i in order], [types[i].tolist() for i in order])
    parts, moved = batch.split(engine_run(model, batch)), permuted.split(engine_run(model, permuted))
    assert all(torch.equal(moved[place], parts[i]) for place, i in enumerate(order))


@pytest.mark.parametrize("lengths", [[1], [0, 0, 1, 0], [512], [3] * 1000, [700, 1]], ids=str)
def test_batches_at_the_edge(lengths):
    model = build("bert")
    assert_engine_within_budget(model, batch_of(model, lengths))


def test_shared_weights_are_packed_once():
    def packed(layers: int) -> int:
        sizes = SMALL | {"num_hidden_layers": layers, "embedding_size": 20}
        return cpu.compile(fastbert.AlbertModel(fastbert.AlbertConfig(**sizes)).eval()).nbytes

    assert packed(12) == packed(1)
    assert cpu.compile(_deep(2)).nbytes > cpu.compile(_deep(1)).nbytes


def _deep(layers: int) -> EncoderModel:
    return fastbert.BertModel(fastbert.BertConfig(**SMALL | {"num_hidden_layers": layers})).eval()


def test_a_batch_without_tokens():
    model = build("bert")
    assert engine_run(model, pack([[], []])).shape == (0, 48)


@pytest.mark.parametrize("unit", [False, True], ids=["pooled", "unit"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vectors_are_the_pooled_hidden_states(mode, dtype, unit):
    model = build("bert").to(dtype)
    batch = batch_of(model)

    def pooled() -> torch.Tensor:
        vectors = pool(model.forward_packed(batch), batch.cu_seqlens, mode)
        return l2_normalize(vectors) if unit else vectors

    with torch.inference_mode():
        vectors = model.pool_packed(batch, mode, unit)
        assert _plan(model).startswith("cpu engine: ")
        assert torch.equal(vectors, pooled())
        assert vectors.dtype == (torch.float32 if unit else dtype)
        with use_engine("off"):
            assert torch.equal(model.pool_packed(batch, mode, unit), pooled())
    assert not vectors[LENGTHS.index(0)].any()
    assert vectors.abs().sum(-1).count_nonzero() == len(LENGTHS) - 1
    assert model.pool_packed(batch, mode, unit).requires_grad, "where autograd records, it runs on ops"


def test_pooling_takes_known_modes_and_a_row_a_sequence():
    model = build("bert")
    batch = batch_of(model)
    with torch.inference_mode(), pytest.raises(ValueError, match="unknown pooling mode 'middle'"):
        model.pool_packed(batch, "middle")
    engine = cpu.compile(model)
    given = (batch.input_ids, batch.position_ids, None, batch.cu_seqlens)
    with pytest.raises(ValueError, match="out"):
        engine._encoder.forward(*given, torch.empty(batch.num_tokens, 48), batch.max_seqlen, 1, "mean")
    with pytest.raises(ValueError, match="vectors of length 1 need a pooling mode"):
        engine.run(batch, None, True)


def test_fully_masked_rows_give_zeros():
    model = build("roberta")
    ids, mask = torch.randint(5, 97, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    mask[1], mask[2, 5:] = 0, 0
    with torch.no_grad():
        out = model(ids, mask).last_hidden_state
        with use_engine("off"):
            torch.testing.assert_close(out, model(ids, mask).last_hidden_state)
    assert not out[1].any()
    assert not out[2, 5:].any()
    assert out[2, :5].all()


def test_large_scores_stay_finite():
    model = build("bert")
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.attention.qkv.weight.mul_(30)
    assert_engine_within_budget(model, batch_of(model))


def test_many_python_threads_at_once():
    model = build("bert")
    batches = [batch_of(model, LENGTHS[i % 4 :] + [i + 1] * (i % 3 * 40), seed=i) for i in range(24)]
    expected = [engine_run(model, batch) for batch in batches]
    fresh = copy.deepcopy(model)  # its first calls race to pack it

    def run(batch):
        with torch.inference_mode():
            return fresh.forward_packed(batch)

    with ThreadPoolExecutor(8) as pool:
        for ours, one in zip(pool.map(run, batches), expected, strict=True):
            assert torch.equal(ours, one)


# Freshness: whatever changes a weight, a setting or a module is seen by the next call.


def _optimizer_step(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    with torch.enable_grad():
        model.forward_packed(batch_of(model)).square().sum().backward()
    optimizer.step()


def _load_state_dict(model):
    model.load_state_dict(build("bert", seed=1).state_dict())


def _assign_state_dict(model):
    model.load_state_dict(build("bert", seed=1).state_dict(), assign=True)


def _round_trip_through_bfloat16(model):
    model.to(torch.bfloat16).to(torch.float32)


def _embedding_row(model):
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[5:].mul_(2)


def _new_table(model):
    model.set_input_embeddings(torch.nn.Embedding(97, 48))


def _new_activation(model):
    for layer in model.encoder.layer:
        layer.feed_forward.act = activation("relu")


def _new_eps(model):
    model.encoder.layer[1].output_LayerNorm.eps = 1.0


def _layer_dropped(model):
    del model.encoder.layer[0]


def _data_pointer(model):
    model.encoder.layer[0].attention.dense.weight.data = torch.randn(48, 48)


def _written_behind_torch(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.1)


@pytest.mark.parametrize(
    "change",
    [
        _written_behind_torch,
        _optimizer_step,
        _load_state_dict,
        _assign_state_dict,
        _round_trip_through_bfloat16,
        _embedding_row,
        _new_table,
        _new_activation,
        _new_eps,
        _layer_dropped,
        _data_pointer,
    ],
)
def test_a_change_is_seen(change, monkeypatch):
    model, stale = build("bert"), build("bert")
    before = engine_run(model, batch_of(model))
    change(model)
    model.eval()
    assert not torch.equal(engine_run(model, batch_of(model)), before)
    assert_engine_within_budget(model, batch_of(model))
    if change not in (_embedding_row, _new_table):  # tables of embeddings are read where they lie
        engine_run(stale, batch_of(stale))
        monkeypatch.setattr(cpu.Engine, "is_fresh", lambda self, model: True)
        change(stale)
        stale.eval()
        with pytest.raises(AssertionError, match="budget"):
            assert_engine_within_budget(stale, batch_of(stale))


def test_dtypes_come_and_go():
    model = build("bert")
    first = engine_run(model, batch_of(model))
    assert engine_run(model.bfloat16(), batch_of(model)).dtype == torch.bfloat16
    rounded = engine_run(model.float(), batch_of(model))
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, first)
    assert_engine_within_budget(model, batch_of(model))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_packed_once(name):
    model = build(name)
    engine_run(model, batch_of(model))
    engine = choice._compiled[model]
    engine_run(model, batch_of(model))
    assert choice._compiled[model] is engine


def test_tied_weights_are_seen():
    torch.manual_seed(0)
    masked = fastbert.BertForMaskedLM(fastbert.BertConfig(**SMALL)).eval()
    before = engine_run(masked.bert, batch_of(masked.bert))
    with torch.no_grad():
        masked.get_output_embeddings().weight.add_(0.5)  # the table of words by its other name
        masked.get_output_embeddings().weight[:, ::2].mul_(3)
    assert not torch.equal(engine_run(masked.bert, batch_of(masked.bert)), before)


def test_copies_and_collected_models_leave_nothing():
    model = build("bert")
    engine_run(model, batch_of(model))
    held = len(choice._compiled)
    twin = copy.deepcopy(model)
    assert len(choice._compiled) == held
    del model
    assert len(choice._compiled) == held - 1
    engine_run(twin, batch_of(twin))


# Stepping aside: a call that the engine cannot honour runs as ops, and says so.


class _Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _hook(model):
    model.encoder.layer[1].register_forward_hook(lambda module, args, out: out * 0)


def _forward_on_the_instance(model):
    model.encoder.layer[1].feed_forward.forward = lambda x: (x * 0, None)


def _another_linear(model):
    model.encoder.layer[1].attention.dense = _Doubled(48, 48)


def _inner_training(model):
    model.encoder.layer[1].attention.train()


def _mixed(model):
    model.encoder.layer[1].to(torch.bfloat16)


def _other_activation(model):
    for layer in model.encoder.layer:
        layer.feed_forward.act = torch.nn.functional.mish


def _half_quantised(model):
    twin = quantize_int8(copy.deepcopy(model))
    model.encoder.layer[1].feed_forward = twin.encoder.layer[1].feed_forward


def _layers_differ(model):
    model.encoder.layer[1].attention.num_heads = 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_hook, "layer.1 (Layer) has a forward hook"),
        (_forward_on_the_instance, "layer.1.feed_forward (FeedForward) has a forward of its own"),
        (_another_linear, "layer.1.attention.dense (_Doubled) is not a module that the engine knows"),
        (_inner_training, "layer.1.attention (SelfAttention) is in training mode"),
        (_mixed, "torch.bfloat16 and torch.float32"),
        (_other_activation, "has an activation that the engine lacks"),
        (_layers_differ, "the layers differ"),
        (lambda model: model.double(), "torch.float64"),
        (_half_quantised, "some of its linear layers have 8-bit weights and some have not"),
        (lambda model: quantize_int8(model.bfloat16()), "torch.bfloat16 and torch.float32"),
        (lambda model: model.train(), "training mode"),
    ],
)
def test_the_engine_steps_aside(change, words):
    model = build("bert")
    engine_run(model, batch_of(model))
    change(model)
    with torch.no_grad():
        plan = model.execution_plan()
        assert plan.startswith("ops: ")
        assert words in plan
        if change is _mixed:
            return
        out = model.forward_packed(batch_of(model))
        with use_engine("off"):
            expected = model.forward_packed(batch_of(model))
    if not model.training and change is not _inner_training:
        assert torch.equal(out, expected)


def test_a_model_past_the_engine_is_warned_about_once():
    model = build("bert")
    _other_activation(model)
    choice._warn.cache_clear()
    slower = pytest.warns(UserWarning, match=r"chain of ops, slower than on an engine: .*has an activation")
    with slower, torch.no_grad():
        model.forward_packed(batch_of(model))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        model.forward_packed(batch_of(model))
        with use_engine("off"):
            build("bert").forward_packed(batch_of(model))
    choice._warn.cache_clear()
    with warnings.catch_warnings(), use_engine("off"), torch.no_grad():
        warnings.simplefilter("error")  # who asks for ops is not told that they are slower
        model.forward_packed(batch_of(model))


def test_a_configuration_that_asks_for_more_is_in_the_plan():
    model = build("bert")
    assert "padded calls as ops" not in _plan(model)
    for name in ("output_hidden_states", "output_attentions"):
        config = fastbert.BertConfig(**SMALL, **{name: True})
        assert _plan(fastbert.BertModel(config).eval()).startswith("cpu engine: float32")
        assert _plan(fastbert.BertModel(config).eval()).endswith(
            "; padded calls as ops: the configuration asks for more than the last layer"
        )


def test_circumstances_step_aside():
    model = build("bert")
    assert model.execution_plan().startswith("ops: autograd records")
    with torch.no_grad():
        with use_engine("off"):
            assert model.execution_plan() == 'ops: use_engine("off") is in force'
        with use_backend("native"):
            assert "'native' is forced" in model.execution_plan()
        with torch.autocast("cpu", torch.bfloat16):
            assert model.execution_plan() == "ops: autocast is on"
        handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
        assert "global forward hook" in model.execution_plan()
        handle.remove()
        assert model.execution_plan() == (
            f"cpu engine: float32, {native.isa()}, {torch.get_num_threads()} threads, 3 layers in "
            f"{model_megabytes(model):.1f} MB of panels"
        )
    with pytest.raises(ValueError, match="unknown mode 'on'; the modes are auto, off"), use_engine("on"):
        pass


def model_megabytes(model: EncoderModel) -> float:
    return cpu.compile(model).nbytes / 1e6


def test_an_engine_made_in_inference_mode_serves():
    with torch.inference_mode():
        model = build("bert")
        assert "made in inference_mode" in model.execution_plan()
        assert model.forward_packed(batch_of(model)).isfinite().all()


def test_what_is_asked_for_is_recorded():
    model = build("bert")
    ids = torch.randint(5, 97, (2, 9))
    with torch.no_grad():
        out = model(ids, output_hidden_states=True, output_attentions=True)
        plain = model(ids)
    assert len(out.hidden_states) == 4
    assert out.attentions[0].shape == (2, 4, 9, 9)
    torch.testing.assert_close(plain.last_hidden_state, out.last_hidden_state)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([[5, 97]], "input_ids has values from 0 to 97 but the table has rows 0 to 96"),
        ([[-1, 3]], "input_ids has values from -1 to 3"),
    ],
)
def test_ids_outside_the_table_are_an_error(ids, words):
    model = build("bert")
    with torch.no_grad(), pytest.raises(IndexError, match=words):
        model.forward_packed(pack(ids))


def test_the_default_model_runs_on_the_engine():
    embedder = fastbert.Embedder.from_pretrained(resolve(DEFAULT_MODEL))
    with torch.inference_mode():
        assert embedder.model.execution_plan().startswith("cpu engine: float32")
    texts = ["a cat sat on the mat", "an entirely different sentence about trains", ""]
    ours = embedder.encode(texts)
    with use_engine("off"):
        expected = embedder.encode(texts)
    torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(expected), rtol=1e-4, atol=1e-5)
