"""The CPU engine against the reference: every family, size, instruction set, schedule; and that it is never stale."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from engine_models import LENGTHS, MODELS, SMALL, assert_engine_within_budget, batch_of, build, engine_run, plan_of

import fastbert
from fastbert import machine, native
from fastbert.engine import choice, cpu, use_engine
from fastbert.hub import DEFAULT_MODEL, resolve
from fastbert.models.encoder import EncoderModel
from fastbert.packing import pack

if not native.available():
    pytest.skip("the native extension was not built", allow_module_level=True)


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


_EVERY_MODEL = """
import torch
from engine_models import MODELS, assert_engine_within_budget, batch_of, build
from fastbert import native
from fastbert.engine import cpu
from fastbert.models.quantize import quantize_int8
from test_engine_int8 import assert_int8_within_budget
torch.set_num_threads({threads})
assert native.isa() == {isa!r}, native.isa()
for name in MODELS:
    for dtype in (torch.float32, torch.bfloat16):
        model = build(name).to(dtype)
        assert_engine_within_budget(model, batch_of(model))
for bits in (16, None):
    cpu._num_narrow = lambda linear: 0 if bits else linear.num_narrow
    for name in MODELS:
        model = quantize_int8(build(name))
        assert_int8_within_budget(model, batch_of(model), bits)
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

    def shifted(self, batch, **pooling):
        cu = batch.cu_seqlens.clone()
        cu[1] += 1
        return run(self, dataclasses.replace(batch, cu_seqlens=cu), **pooling)

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
    assert f" {expected} threads, " in plan_of(model)


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
