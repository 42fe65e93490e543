"""The CUDA engine without a GPU: everything but the capture itself, on the CPU's kernels; on a GPU the graphs too.

`tests/test_kernels.py` runs this file again in Triton's interpreter, where attention reads the static ranges.
"""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

import fastbert
from fastbert import kernels, native, use_backend, vectors
from fastbert.engine import choice, cuda, cuda_layers, use_engine
from fastbert.engine.dtypes import resolve_dtype
from fastbert.hub import DEFAULT_MODEL, PACKAGED
from fastbert.models.encoder import EncoderModel
from fastbert.models.quantize import Float8Linear, loaded_dtype, quantize_float8, quantize_int8
from fastbert.ops import l2_normalize, pool
from fastbert.packing import PackedBatch, pack

SIZES = {
    "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 80,
    "max_position_embeddings": 300, "initializer_range": 0.1,
}  # fmt: skip
DISTILBERT = {
    "vocab_size": 97, "dim": 48, "n_layers": 2, "n_heads": 3, "hidden_dim": 80, "max_position_embeddings": 300,
}  # fmt: skip
MODELS = {
    "bert": lambda: fastbert.BertModel(fastbert.BertConfig(**SIZES)),
    "bert-tanh": lambda: fastbert.BertModel(fastbert.BertConfig(**SIZES, hidden_act="gelu_new")),
    "bert-relu": lambda: fastbert.BertModel(fastbert.BertConfig(**SIZES, hidden_act="relu")),
    "roberta": lambda: fastbert.RobertaModel(fastbert.RobertaConfig(**SIZES, type_vocab_size=1)),
    "distilbert": lambda: fastbert.DistilBertModel(fastbert.DistilBertConfig(**DISTILBERT)),
    "electra": lambda: fastbert.ElectraModel(fastbert.ElectraConfig(**SIZES, embedding_size=20)),
    "albert": lambda: fastbert.AlbertModel(fastbert.AlbertConfig(**SIZES, embedding_size=20, num_hidden_groups=2)),
    "mpnet": lambda: fastbert.MPNetModel(fastbert.MPNetConfig(**SIZES)),
}
LENGTHS = [5, 1, 0, 24, 7]
BACKEND = "triton" if kernels.interpreted() else "native"

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def build(name: str = "bert") -> EncoderModel:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():  # zeros and ones hide swapped biases and norms
            if key.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model


def batch_of(model: EncoderModel, lengths: list[int] = LENGTHS, seed: int = 0) -> PackedBatch:
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(5, 97, (n,), generator=g).tolist() for n in lengths]
    table = model.embeddings.token_type_embeddings
    types = None
    if table is not None and table.num_embeddings > 1:
        types = [torch.randint(0, 2, (n,), generator=g).tolist() for n in lengths]
    with use_backend("reference"):  # the forced backend may have no packing
        return pack(ids, types, model.position_offset)


def engine_of(model: EncoderModel) -> cuda.Engine:
    engine = cuda.compile(model)
    assert isinstance(engine, cuda.Engine), engine
    return engine


@torch.no_grad()
def chain(model: EncoderModel, batch: PackedBatch) -> torch.Tensor:
    """The chain of ops, token counts as they are."""
    with use_engine("off"):
        return model.forward_packed(batch)


@pytest.fixture(autouse=True)
def backend(request):
    if BACKEND == "native" and not native.available() and not request.node.get_closest_marker("gpu"):
        pytest.skip("the native extension was not built")
    with use_backend(BACKEND):
        yield


# Buckets.


def test_buckets_cover_every_size_and_waste_at_most_an_eighth():
    sizes = [cuda.bucket_of(T) for T in range(1, 70000)]
    assert all(size >= T for T, size in enumerate(sizes, 1))
    assert all(size % 64 == 0 for size in sizes)
    assert all(size - T < max(64, size / 8) for T, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes)
    assert cuda.bucket_of(0) == cuda.SMALLEST
    assert [cuda.bucket_of(T) for T in (64, 65, 1024, 1025, 2048, 2049)] == [64, 128, 1024, 1152, 2048, 2304]
    assert len(set(sizes)) < 80, "each is a graph"


@pytest.mark.parametrize("name", MODELS)
def test_a_bucket_gives_the_bits_of_the_chain(name, poisoned_empty):
    model = build(name)
    engine, batch = engine_of(model), batch_of(model)
    torch.testing.assert_close(engine.run(batch), chain(model, batch), rtol=0, atol=1e-5)


def test_what_was_in_a_bucket_before_leaves_no_trace():
    model = build()
    engine = engine_of(model)
    full, small = batch_of(model, [64]), batch_of(model, [3, 9], seed=1)
    alone = engine_of(model).run(small)
    engine.run(full)
    assert torch.equal(engine.run(small), alone)
    types = replace(small, type_ids=None)
    assert torch.equal(engine.run(types), engine_of(model).run(types)), "types of the batch before"
    assert "captured: 64" in str(engine)


@pytest.mark.parametrize("lengths", [[1], [0, 0, 1, 0], [64], [63, 1], [65], [1] * 130, [0]], ids=str)
def test_batches_at_the_edge_of_a_bucket(lengths):
    model = build()
    batch = batch_of(model, lengths)
    found = engine_of(model).run(batch)
    torch.testing.assert_close(found, chain(model, batch), rtol=0, atol=1e-5)


def test_a_tail_that_is_seen_fails(monkeypatch):
    """The mutant: the tail joins the last sequence."""
    model = build()
    batch = batch_of(model)
    right = chain(model, batch)
    pad = cuda.F.pad

    def joined(x, *args, **kwargs):
        return torch.cat([x[:-1], x.new_full((1,), kwargs["value"])]) if x.dtype == torch.int32 else pad(x, *args)

    monkeypatch.setattr(cuda.F, "pad", joined)
    if kernels.interpreted():
        load = kernels.load_batch

        def load_joined(*ids_and_cu_seqlens):
            *ids, cu_seqlens, target, ranges = ids_and_cu_seqlens
            load(*ids, joined(cu_seqlens, value=ranges.shape[1]), target, ranges)

        monkeypatch.setattr(kernels, "load_batch", load_joined, raising=False)
    assert (engine_of(model).run(batch) - right).abs().max() > 1e-3


def test_out_of_inference_mode_is_written():
    model = build()
    batch, engine = batch_of(model), engine_of(model)
    with torch.inference_mode():
        out = torch.empty(batch.num_tokens, SIZES["hidden_size"])
    assert engine.run(batch, out) is out
    assert torch.equal(out, engine.run(batch))


# Vectors in the same graph.


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
@pytest.mark.parametrize("unit", [False, True])
def test_vectors_of_a_graph_are_those_of_its_hidden_states(mode, unit, poisoned_empty):
    model = build()
    engine = engine_of(model)
    for lengths in (LENGTHS, [64], [1] * 130, [2] * cuda.VECTORS, [3, 9]):
        batch = batch_of(model, lengths)
        hidden, vectors = engine.run(batch), engine.run(batch, pooling=mode, unit=unit)
        if len(lengths) > cuda.VECTORS:
            assert vectors is None
            continue
        right = pool(hidden, batch.cu_seqlens, mode)
        right = l2_normalize(right) if unit else right
        assert vectors.dtype == right.dtype
        torch.testing.assert_close(vectors, right, rtol=0, atol=1e-6)
        with pytest.raises(AssertionError):  # another pooling
            torch.testing.assert_close(engine.run(batch, pooling="lasttoken", unit=unit), right, rtol=0, atol=1e-6)
    assert engine.has_captured(batch, (mode, unit))
    assert not engine.has_captured(batch, (mode, not unit))


@pytest.mark.parametrize("lengths", [LENGTHS, [0], [64], [1] * 64, [1] * 70], ids=str)
def test_a_batch_that_is_staged_is_the_batch_that_is_loaded(lengths):
    model, cpu = build(), torch.device("cpu")
    batch = batch_of(model, lengths)
    staged, loaded = cuda._Bucket(128, cpu), cuda._Bucket(128, cpu)
    for before in (batch_of(model, [100, 28]), batch, replace(batch, type_ids=None)):
        staged.stage(before)
        loaded.load(before, by_ranges=kernels.interpreted())
        assert torch.equal(staged.ids, loaded.ids)
        if before.num_sequences <= cuda.VECTORS:
            assert torch.equal(staged.places, loaded.places)
        if kernels.interpreted():
            assert torch.equal(staged.ranges, loaded.ranges)
    T = batch.num_tokens
    assert staged.ranges[:, T:].eq(T).all(), "the tail sees keys"


# What is asked of a caller.


def test_the_callers_buffer_is_written():
    model = build()
    engine, batch = engine_of(model), batch_of(model)
    out = torch.full((batch.num_tokens, 48), float("nan"))
    assert engine.run(batch, out) is out
    assert torch.equal(out, engine.run(batch))
    with pytest.raises(ValueError, match=r"out is torch.float32 \(5, 48\), expected torch.float32 \(37, 48\)"):
        engine.run(batch, out[:5])


def test_wrong_ids_are_an_error_and_harm_nothing():
    model = build()
    engine, batch = engine_of(model), batch_of(model)
    right = engine.run(batch)
    for name, value in (("input_ids", 97), ("position_ids", 300), ("type_ids", 2), ("input_ids", -1)):
        wrong = getattr(batch, name).clone()
        wrong[3] = value
        with pytest.raises(IndexError, match=f"{name} has values from"):
            engine.run(replace(batch, **{name: wrong}))
    with pytest.raises(ValueError, match="cu_seqlens ends at 30 but there are 37"):
        engine.run(replace(batch, cu_seqlens=batch.cu_seqlens[:-1]))
    assert torch.equal(engine.run(batch), right)


def test_too_many_tokens_run_as_ops(monkeypatch):
    monkeypatch.setattr(cuda, "LARGEST", 36)
    model = build()
    assert engine_of(model).run(batch_of(model)) is None


# Freshness: weights are the model's own memory.


def test_a_write_to_a_weight_is_seen_without_a_capture(monkeypatch):
    monkeypatch.setattr(cuda, "form_of", cuda_layers.Chain)
    model = build()
    engine, batch = engine_of(model), batch_of(model)
    before = engine.run(batch)
    model.encoder.layer[1].feed_forward.output.weight.data.mul_(1.5)  # torch does not count this one
    assert engine.is_fresh(model)
    after = engine.run(batch)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, chain(model, batch), rtol=0, atol=1e-5)


def _replace_weight(model):
    linear = model.encoder.layer[0].attention.dense
    linear.weight = torch.nn.Parameter(linear.weight.detach() * 2)


def _move_data(model):
    linear = model.encoder.layer[0].attention.dense
    linear.weight.data = linear.weight.data.clone()


CHANGES = {
    "parameter": _replace_weight,
    "data": _move_data,
    "dtype": lambda model: model.double(),
    "eps": lambda model: setattr(model.encoder.layer[0].output_LayerNorm, "eps", 0.5),
    "hook": lambda model: model.encoder.layer[0].register_forward_hook(lambda *_: None),
    "layer": lambda model: setattr(model.encoder, "layer", model.encoder.layer[:1]),
    "training": lambda model: model.train(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_moves_or_alters_the_model_is_seen(change):
    model = build()
    engine = engine_of(model)
    assert engine.is_fresh(model)
    CHANGES[change](model)
    assert not engine.is_fresh(model)


def test_another_backend_is_another_engine():
    model = build()
    engine = engine_of(model)
    with use_backend("reference"):
        assert not engine.is_fresh(model)


def test_what_it_does_not_know_is_named():
    model = build()
    model.encoder.layer[0].attention.dense = torch.nn.Sequential(model.encoder.layer[0].attention.dense)
    assert "Sequential) is not a module that the engine knows" in cuda.compile(model)
    assert "Int8Linear) is not a module that the engine knows" in cuda.compile(quantize_int8(build()))
    assert "float64" in cuda.compile(build().double())


def test_on_cuda_the_reference_is_not_captured(monkeypatch):
    model = build()
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr(cuda, "refusal", lambda *_: None)
    with use_backend("reference"):
        assert "no kernels are the default on CUDA" in cuda.compile(model)
        with torch.no_grad():
            assert "no kernels are the default on CUDA" in model.execution_plan()
            with use_engine("off"):
                assert "off" in model.execution_plan()


@pytest.mark.skipif(kernels.interpreted(), reason="the interpreter rounds float8 wrongly")
def test_float8_weights():
    """The precision is opt-in: near the float model, not equal to it; and the engine takes it."""
    model, batch = build(), batch_of(build())
    right = chain(model, batch)
    with use_backend("reference"):
        found = engine_of(quantize_float8(model)).run(batch)
        assert torch.equal(found, chain(model, batch)) or (found - chain(model, batch)).abs().max() < 1e-5
    error = (found - right).norm() / right.norm()
    assert 1e-4 < error < 0.2, error
    with pytest.raises(ValueError, match="already in int8 or float8"):
        quantize_float8(model)
    with pytest.raises(ValueError, match=r"GPUs of compute capability 8\.9 or newer"):
        resolve_dtype("float8", torch.device("cpu"))
    assert (loaded_dtype("float8"), loaded_dtype("float16")) == ("bfloat16", "float16")


# The forms of the layers.


in_kernels = pytest.mark.skipif(not kernels.interpreted(), reason="runs in the interpreter")


@in_kernels
@pytest.mark.parametrize("name", ["bert", "bert-tanh", "bert-relu", "albert", "mpnet"])
def test_folded_norms_give_what_the_chain_gives(name, poisoned_empty):
    model = build(name)
    with torch.no_grad():  # ones would hide a forgotten weight
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
    engine, batch = engine_of(model), batch_of(model)
    assert isinstance(engine._layers, cuda_layers.Folded)
    right = chain(model, batch)
    torch.testing.assert_close(engine.run(batch), right, rtol=0, atol=2e-5)
    layers = list(cuda.layers_of(model.encoder))
    layers[0].attention_LayerNorm.weight.data.mul_(1.1)  # the copy stays: the mutant
    assert (engine.run(batch) - chain(model, batch)).abs().max() > 1e-3


@in_kernels
def test_a_write_to_a_folded_weight_is_seen():
    model = build()
    engine = engine_of(model)
    assert engine.is_fresh(model)
    with torch.no_grad():
        model.encoder.layer[1].attention.qkv.weight.mul_(1.5)
    assert not engine.is_fresh(model)


@in_kernels
def test_float8_rows_go_from_kernel_to_kernel(poisoned_empty, monkeypatch):
    """Storage is fp32, so that only scales can go wrong: the model of the quantised weights, exactly."""
    from fastbert.kernels import float8

    monkeypatch.setattr(float8, "FLOAT8", torch.float32)
    model, batch, calls = quantize_float8(build()), batch_of(build()), []
    exact = build()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, Float8Linear):
                module.weight = module.weight.float()
                exact.get_submodule(name).weight.copy_(module.weight * module.weight_scale[:, None])
    monkeypatch.setattr(
        "fastbert.models.quantize.float8_linear",
        lambda x, w, s, b: calls.append(1) or torch.nn.functional.linear(x, w * s[:, None], b),
    )
    engine = engine_of(model)
    assert isinstance(engine._layers, cuda_layers.Float8)
    torch.testing.assert_close(engine.run(batch), chain(exact, batch), rtol=0, atol=2e-5)
    calls.clear()
    engine.run(batch)
    assert len(calls) == 3, "the first product, and attention's output in two layers, are quantised apart"


# On a GPU.


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_graphs_give_the_bits_of_the_chain(name, dtype):
    model = build(name).to("cuda", dtype)
    host = batch_of(model, [*LENGTHS, 64, 3])
    device = host.to("cuda")
    with use_backend("triton"), torch.inference_mode():
        engine = engine_of(model)
        assert "cuda engine" in model.execution_plan()
        first, again = engine.run(device), engine.run(device)
        assert torch.equal(first, again), "two replays differ"
        assert torch.equal(engine.run(host), first), "pinned staging"
        pinned = torch.empty(host.num_tokens, 48, dtype=dtype, pin_memory=True)
        engine.run(host, pinned)
        torch.cuda.synchronize()
        assert torch.equal(pinned, first.cpu())
        other = batch_of(model, [9, 2], seed=3).to("cuda")
        engine.run(other)
        assert torch.equal(engine.run(device), first), "the bucket keeps what another batch left"
        right = chain(model, device)
    # GEMMs over a bucket and over T rows may be different kernels of the vendor: the last bit may differ
    atol = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    torch.testing.assert_close(first, right, rtol=0, atol=atol)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_call_computes_while_the_host_looks_whether_the_model_is_the_same(dtype):
    """And vectors come from the graph."""
    model = build().to("cuda", dtype)
    host = batch_of(model, [9, 30, 1])
    with use_backend("triton"), torch.no_grad():
        for batch in (host, host.to("cuda")):
            for _ in range(2):
                found = model.pool_packed(batch, "mean", unit=True)
                hidden = model.forward_packed(batch)
                right = l2_normalize(pool(hidden, host.cu_seqlens.to("cuda"), "mean"))
                torch.testing.assert_close(found, right, rtol=0, atol=1e-5)
        engine = choice._compiled[model]
        layer = model.encoder.layer[1].feed_forward.output
        layer.weight = torch.nn.Parameter(layer.weight * 1.5, requires_grad=False)
        after = model.forward_packed(host)
        assert choice._compiled[model] is not engine
        torch.testing.assert_close(after, chain(model, host.to("cuda")), rtol=0, atol=1e-1)
        assert (after - hidden).abs().max() > 1e-2, "the old weights"
        wrong = replace(host, input_ids=host.input_ids + 90)
        with pytest.raises(IndexError, match="input_ids has values from"):
            model.forward_packed(wrong)
        model.resize_token_embeddings(200)
        assert model.forward_packed(wrong).isfinite().all(), "ids that only the old table lacks"


@pytest.mark.gpu
@gpu
def test_streams_take_turns():
    model = build().to("cuda", torch.bfloat16)
    batches = [batch_of(model, [40 - i, i + 1], seed=i).to("cuda") for i in range(8)]
    with use_backend("triton"), torch.inference_mode():
        engine = engine_of(model)
        right = [engine.run(batch) for batch in batches]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in range(4)]
        found = []
        for i, batch in enumerate(batches * 5):
            with torch.cuda.stream(streams[i % 4]):
                found.append(engine.run(batch))
        torch.cuda.synchronize()
    for i, hidden in enumerate(found):
        assert torch.equal(hidden, right[i % 8])


def test_which_backend_this_was():
    """So that the interpreter's run of this file is one."""
    assert ("triton" if os.environ.get("TRITON_INTERPRET") == "1" else "native") == BACKEND
    assert choice._ENGINES["cuda"] is cuda


# The embedder beside the engine: batches go in from the host, vectors come out one copy behind.


class _FarTensor(torch.Tensor):
    """On the CPU, but says that it is on a GPU."""

    device = torch.device("cuda")


def test_vectors_are_written_one_copy_behind_the_device(monkeypatch):
    """A copy has arrived only when it was waited for, and only the one before the latest is."""
    waited = []

    def to_host(x):
        values, arrived = torch.Tensor(x).clone(), torch.full(x.shape, float("nan"))

        def wait():
            waited.append(len(waited))
            arrived.copy_(values)

        return arrived, wait

    monkeypatch.setattr(vectors, "_to_host", to_host)
    monkeypatch.setattr(vectors, "COPY", 4)
    right = torch.arange(30.0).view(10, 3)
    order, out = [7, 2, 9, 0, 1, 8, 3, 5, 6, 4], torch.full((10, 3), float("nan"))
    collector = vectors.Collector(out)
    waits = []
    for lo in range(0, 10, 2):
        rows = order[lo : lo + 2]
        collector.add(rows, right[rows].as_subclass(_FarTensor))
        waits.append(len(waited))
    assert waits == [0, 0, 0, 1, 1], "the host waited for a copy that was only just begun"
    assert collector.finish() is out
    assert torch.equal(out, right)


def test_a_batch_on_the_host_is_moved_where_no_engine_stages_it():
    model = build()
    moved = []

    class Batch(PackedBatch):
        def to(self, device, non_blocking=False):
            moved.append(torch.device(device))
            return super().to(device, non_blocking)

    batch = batch_of(model)
    host = Batch(batch.input_ids, batch.position_ids, batch.type_ids, batch.cu_seqlens, batch.max_seqlen)
    assert torch.equal(chain(model, host), chain(model, batch))
    assert moved == [torch.device("cpu")]


@pytest.mark.gpu
@gpu
@pytest.mark.skipif(find_spec(PACKAGED[DEFAULT_MODEL][0]) is None, reason="needs weights: requirements-weights.txt")
def test_embedder_on_a_gpu_equals_its_own_ops(minilm):
    embedder = fastbert.Embedder.from_pretrained(minilm, device="cuda", dtype="float32")
    texts = [f"text {'word ' * (i % 40)}{i}" for i in range(300)]
    with use_backend("triton"):
        found = embedder.encode(texts, token_budget=1000)
        with use_engine("off"):
            right = embedder.encode(texts, token_budget=1000)
    assert abs(found - right).max() < 1e-5
