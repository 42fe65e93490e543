"""Served models of every kind, their tokeniser threads, and the whole way: text, tokens, queue, numbers."""

from __future__ import annotations

import asyncio
import json
import random
import shutil

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastbert
from fastbert.engine.cpu import Engine
from fastbert.models.encoder import Encoded
from fastbert.packing import pack
from fastbert.sentence_folder import Dense
from fastbert.serve.batcher import Batcher
from fastbert.serve.cutting import Cutter
from fastbert.serve.errors import BadIds, Invalid
from fastbert.serve.kinds import Splade, kind_of
from fastbert.serve.readouts import sparse
from fastbert.serve.served import Served, default_threads
from fastbert.serve.tokens import TokenizerPool
from fastbert.serve.work import Work
from fastbert.tokenizer import Tokenizer
from tests.serving import tiny_model

WORDS = "the quick brown fox jumps over lazy dogs naïve café 北京 unbelievable [SEP] x1 ...".split()  # noqa: SIM905


def some_texts(seed, n, longest=60):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(n)]


@pytest.fixture(scope="module")
def embedding(minilm):
    return Served.load(minilm)


@pytest.fixture(scope="module")
def tiny(minilm, tmp_path_factory):
    """Folders of tiny models by kind."""
    kinds = ("classifier", "reranker", "token-classification", "fill-mask", "splade")
    return {kind: tiny_model(kind, tmp_path_factory.mktemp(kind), minilm) for kind in kinds}


@pytest.fixture(scope="module")
def pool(embedding):
    pool = TokenizerPool(embedding, workers=2)
    yield pool
    pool.close()


# Numbers.


def test_vectors_are_those_of_the_embedder_bit_for_bit_in_any_mix(minilm, embedding):
    embedder = fastbert.Embedder.from_pretrained(minilm)
    texts = some_texts(0, 40, 40)
    expected = embedder.encode(texts, batch_size=1)
    states = embedder.encode(texts, output_value="token_embeddings")

    async def client(seed, batcher, pool):
        rng = random.Random(seed)
        rows = rng.sample(range(len(texts)), rng.randint(1, 9))
        output, lane = rng.choice(["vectors", "tokens"]), rng.choice(["interactive", "bulk"])
        tokens = await pool.encode([texts[row] for row in rows])
        done = await batcher.submit(Work(tokens.ids, output=output, lane=lane))
        for row, value in zip(rows, done.values, strict=True):
            assert value.dtype == np.float32
            np.testing.assert_array_equal(value, expected[row] if output == "vectors" else states[row].numpy())

    async def main():
        pool, batcher = TokenizerPool(embedding, workers=2), Batcher(embedding, max_batch_tokens=300)
        await asyncio.gather(*(client(seed, batcher, pool) for seed in range(20)))
        counters = batcher.counters
        assert counters.sequences > 1.5 * counters.batches, "requests were batched"
        assert await batcher.drain()
        pool.close()

    asyncio.run(main())


def values(served, rows, types=None, output=None, prompt_lengths=None):
    output = output or next(iter(served.outputs - {"tokens"}))
    batch = pack(rows, types, served.position_offset)
    outputs = [output] * len(rows) if isinstance(output, str) else output
    return served.compute(batch, outputs, prompt_lengths)


def inputs(seed=0, n=8, mask=None):
    rng = random.Random(seed)
    rows = [[101, *(rng.randrange(1000, 30000) for _ in range(rng.randint(1, 40))), 102] for _ in range(n)]
    for row in rows if mask is not None else ():
        for place in rng.sample(range(1, len(row) - 1), min(2, len(row) - 2)):
            row[place] = mask
    types = [[int(i > len(row) // 2) for i in range(len(row))] for row in rows]
    return rows, types


OUTPUT = {
    "classifier": "logits", "reranker": "logits", "token-classification": "logits", "fill-mask": "mask",
    "splade": "sparse",
}  # fmt: skip


@pytest.mark.parametrize("kind", OUTPUT)
def test_heads_answer_as_the_padded_model_and_alike_in_any_batch(kind, tiny):
    served = Served.load(tiny[kind])
    assert served.kind == kind
    rows, types = inputs(mask=served.mask_id if kind == "fill-mask" else None)
    found = values(served, rows, types, OUTPUT[kind])
    for row, kinds, value in zip(rows, types, found, strict=True):
        (alone,) = values(served, [row], [kinds], OUTPUT[kind])
        np.testing.assert_array_equal(value, alone)
        with torch.inference_mode():
            output = served._model(torch.tensor([row]), token_type_ids=torch.tensor([kinds]))
        expected = output.logits[0]
        if kind == "fill-mask":
            expected = expected[torch.tensor(row) == served.mask_id]
        if kind == "splade":
            expected = expected.relu().log1p().amax(0)
        np.testing.assert_allclose(value, expected.numpy(), rtol=1e-4, atol=1e-5)
        mutant = values(served, [row], None, OUTPUT[kind])[0]
        assert len(row) < 4 or not np.allclose(mutant, expected.numpy(), rtol=1e-4, atol=1e-5), "without segment ids"


def test_one_pass_for_different_outputs(tiny):
    served = Served.load(tiny["splade"])
    rows, types = inputs(mask=served.mask_id)
    wanted = [("sparse", "mask", "tokens")[i % 3] for i in range(len(rows))]
    mixed = values(served, rows, types, wanted)
    for i, output in enumerate(wanted):
        np.testing.assert_array_equal(mixed[i], values(served, rows, types, output)[i])
    shapes = [(30522,), (sum(t == served.mask_id for t in rows[1]), 30522), (len(rows[2]), 32)]
    assert [value.shape for value in mixed[:3]] == shapes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_vectors_alone_are_pooled_in_the_engine_with_the_same_bits(dtype, minilm, monkeypatch):
    served = Served.load(minilm, dtype=dtype)
    rows, _ = inputs()
    mixed = values(served, rows, output=["tokens", *["vectors", "unit"] * 3, "unit"])
    monkeypatch.setattr(served.base, "encode_packed", lambda batch: pytest.fail("hidden states were asked for"))
    alone = values(served, rows, output=["vectors", *["vectors", "unit"] * 3, "unit"])
    assert served._unit_vectors is not None
    monkeypatch.setattr(served, "_unit_vectors", None)
    np.testing.assert_array_equal(alone, values(served, rows, output=["vectors", *["vectors", "unit"] * 3, "unit"]))
    for one, other in zip(mixed[1:], alone[1:], strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(pytest.fail.Exception):
        values(served, rows, output="tokens")


@pytest.mark.parametrize("strategy", ["max", "sum"])
@pytest.mark.parametrize("activation", ["relu", "log1p_relu"])
def test_splade_is_that_of_sentence_transformers(strategy, activation):
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    class Head:
        def logits(self, hidden):
            return hidden

    logits = torch.randn(2, 7, 50)
    features = {"token_embeddings": logits.clone(), "attention_mask": torch.ones(2, 7)}
    expected = SpladePooling(strategy, activation).eval()(features)["sentence_embedding"]
    encoded = Encoded(logits.flatten(0, 1), pack([[1] * 7] * 2))
    found = sparse(Head(), Splade(strategy, activation))(encoded, [0, 1], [0, 0])
    torch.testing.assert_close(torch.from_numpy(np.stack(found)), expected)
    mutant = sparse(Head(), Splade("sum" if strategy == "max" else "max", activation))(encoded, [0, 1], [0, 0])
    assert not torch.allclose(torch.from_numpy(np.stack(mutant)), expected)


@pytest.fixture
def instructor(minilm, tmp_path):
    """A folder whose vectors leave out the prompt, end in a Dense and are cut to 100 features."""
    embedder = fastbert.Embedder.from_pretrained(minilm)
    torch.manual_seed(0)
    embedder.modules.append(Dense({"in_features": 384, "out_features": 200, "bias": True}))
    embedder.prompts, embedder.truncate_dim = {"query": "find this: ", "document": ""}, 100
    embedder.save_pretrained(tmp_path)
    path = tmp_path / "1_Pooling" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "include_prompt": False}))
    return tmp_path


def test_prompts_left_out_dense_and_cut_vectors(instructor):
    served, embedder = Served.load(instructor), fastbert.Embedder.from_pretrained(instructor)
    assert (served.dimension, served.skips_prompt, served.prompts["query"]) == (100, True, "find this: ")
    texts = some_texts(1, 9, longest=12)
    expected = {name: embedder.encode(texts, prompt_name=name) for name in ("query", "document")}

    async def main():
        pool, batcher = TokenizerPool(served, workers=1), Batcher(served)
        names = ["query", "document"] * 4

        async def one(i):
            tokens = await pool.encode([texts[i]], prompt=served.prompts[names[i]])
            assert tokens.prompt_length == (0 if names[i] == "document" else 4), "[CLS] find this :"
            return (await batcher.submit(Work(tokens.ids, prompt_length=tokens.prompt_length))).values[0]

        for i, value in enumerate(await asyncio.gather(*map(one, range(8)))):
            np.testing.assert_array_equal(value, expected[names[i]][i])
            assert not np.array_equal(value, expected[names[i - 1]][i]), "mutant: the other prompt"
        batcher.close()
        pool.close()

    asyncio.run(main())


def test_dense_is_the_same_in_any_batch():
    dense = Dense({"in_features": 384, "out_features": 384, "bias": True})
    x = torch.randn(33, 384)
    with torch.inference_mode():
        full = dense(x)
        assert all(torch.equal(dense(x[i : i + n]), full[i : i + n]) for i in (0, 7) for n in (1, 2, 5, 16))
        torch.testing.assert_close(full, torch.tanh(dense.linear(x)))


# What a folder holds.


@pytest.mark.parametrize(
    ("architecture", "more", "pooling", "kind"),
    [
        ("BertModel", {}, None, "embedding"),
        ("BertForSequenceClassification", {"id2label": {"0": "a", "1": "b"}}, None, "classifier"),
        ("RobertaForSequenceClassification", {"id2label": {"0": "LABEL_0"}}, None, "reranker"),
        ("XLMRobertaForSequenceClassification", {"num_labels": 1}, None, "reranker"),
        ("BertForSequenceClassification", {}, None, "classifier"),
        ("BertForSequenceClassification", {}, "cls", "embedding"),
        ("ElectraForTokenClassification", {}, None, "token-classification"),
        ("BertForMaskedLM", {}, None, "fill-mask"),
        ("BertForMaskedLM", {}, "splade", "splade"),
        ("BertForMaskedLM", {}, "last-token", "embedding"),
        ("ElectraForPreTraining", {}, None, "embedding"),
    ],
)
def test_kinds(architecture, more, pooling, kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], **more}))
    assert kind_of(tmp_path, pooling).name == kind


def test_what_is_not_served_says_so(tmp_path, minilm):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertForQuestionAnswering"]}))
    with pytest.raises(ValueError, match="BertForQuestionAnswering, which has no route"):
        kind_of(tmp_path)
    with pytest.raises(ValueError, match=r"'splade' needs a masked language model, .* BertForQuestionAnswering"):
        kind_of(tmp_path, "splade")
    with pytest.raises(ValueError, match="pooling 'best' is not one of splade, cls"):
        kind_of(tmp_path, "best")
    with pytest.raises(ValueError, match="'splade' needs a masked language model"):
        Served.load(minilm, pooling="splade")


def test_splade_configuration_is_read_and_stays_inside_its_folder(tiny, tmp_path):
    shutil.copytree(tiny["splade"], tmp_path, dirs_exist_ok=True)
    config = {"pooling_strategy": "sum", "activation_function": "log1p_relu"}
    (tmp_path / "1_SpladePooling" / "config.json").write_text(json.dumps(config))
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 17}))
    kind = kind_of(tmp_path)
    assert kind.splade == Splade("sum", "log1p_relu")
    assert Served.load(tmp_path).max_length == 17
    rows = json.loads((tmp_path / "modules.json").read_text())
    rows[1]["path"] = "../elsewhere"
    (tmp_path / "modules.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="outside"):
        kind_of(tmp_path)


def test_attributes(embedding, tiny):
    assert (embedding.kind, embedding.dimension, embedding.pooling) == ("embedding", 384, "mean")
    assert (embedding.max_length, embedding.dtype, embedding.id2label) == (256, "float32", {})
    classifier = Served.load(tiny["classifier"], max_seq_length=20, num_threads=1)
    assert classifier.id2label == {0: "bad", 1: "so-so", 2: "good"}
    assert (classifier.max_length, classifier.num_threads, classifier.dimension) == (20, 1, None)
    assert Served.load(tiny["fill-mask"]).mask_id == 103
    with pytest.raises(ValueError, match="positions for 64 tokens"):
        Served.load(tiny["classifier"], max_seq_length=65)


def test_pooling_instead_of_the_files(minilm):
    served, embedder = Served.load(minilm, pooling="cls"), fastbert.Embedder.from_pretrained(minilm)
    assert served.pooling == "cls"
    ids = embedder.tokenizer.encode(["a short text"]).ids
    states = embedder.encode("a short text", output_value="token_embeddings")
    expected = torch.nn.functional.normalize(states[0], dim=0)
    np.testing.assert_allclose(values(served, ids)[0], expected.numpy(), atol=1e-6)


def test_fingerprint_tells_models_apart(embedding, minilm, tiny):
    assert embedding.fingerprint == Served.load(minilm).fingerprint
    other = Served.load(minilm)
    with torch.no_grad():
        other.base.encoder.layer[3].feed_forward.output.bias[7] += 1e-6
    found = {embedding.fingerprint, other.fingerprint, Served.load(minilm, pooling="cls").fingerprint}
    found |= {Served.load(folder).fingerprint for folder in tiny.values()}
    assert len(found) == 3 + len(tiny)


@pytest.mark.parametrize("kind", ["embedding", "classifier", "token-classification"])
def test_a_pass_on_a_share_of_the_threads_gives_the_same_bits(kind, minilm, tiny, monkeypatch):
    served = Served.load(tiny.get(kind, minilm), num_threads=4)
    assert served.passes_at_once == 2
    threads = []
    run = Engine.run

    def spied(engine, batch, *args, **options):
        threads.append(torch.get_num_threads())
        return run(engine, batch, *args, **options)

    monkeypatch.setattr(Engine, "run", spied)
    monkeypatch.setattr(served, "_unit_vectors", None)  # which holds the method as it was
    rows, _ = inputs(n=20)
    batch = pack(rows, None, served.position_offset)
    outputs = [next(iter(served.outputs - {"tokens"}))] * len(rows)
    before = torch.get_num_threads()
    whole, part = (served.compute(batch, outputs, None, share) for share in (1, 2))
    assert threads == [4, 2]
    assert torch.get_num_threads() == 4, "heads are always computed on as many"
    torch.set_num_threads(before)
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("threads", [1, 3])
def test_what_has_no_halves_computes_one_pass_at_a_time(tiny, threads):
    assert Served.load(tiny["classifier"], num_threads=threads).passes_at_once == 1


def test_threads_are_those_allotted(monkeypatch):
    import fastbert.serve.served as module

    class Cpu:
        usable = 1

    monkeypatch.setattr(module, "cpu", lambda: Cpu)
    assert default_threads() == 1


# Tokens.


def encoded(pool, *args, **options):
    return asyncio.run(pool.encode(*args, **options))


def test_pool_gives_the_tokenizers_ids_in_order(pool, embedding):
    texts = [*some_texts(2, 300, 20), "", "x" * 300_000, "word " * 100_000]
    expected = embedding.tokenizer.encode(texts)
    found = encoded(pool, texts)
    assert (found.ids, found.type_ids, found.truncated) == (expected.ids, None, expected.truncated)

    async def many():
        return await asyncio.gather(*(pool.encode([text * 3]) for text in texts[:100]))

    expected = embedding.tokenizer.encode([text * 3 for text in texts[:100]])
    assert [tokens.ids[0] for tokens in asyncio.run(many())] == expected.ids


def test_texts_pairs_and_ids_together(pool, embedding):
    given = ["one text", ("a question", "an answer"), [101, 2023, 102]]
    found = encoded(pool, given, prompt="say: ")
    expected = embedding.tokenizer.encode(["say: one text", ("say: a question", "an answer")])
    assert found.ids == [*expected.ids, [101, 2023, 102]]
    assert found.type_ids == [*expected.type_ids, [0, 0, 0]]
    assert max(found.type_ids[1]) == 1


@pytest.mark.parametrize("side", ["right", "left"])
def test_long_inputs_are_cut_or_refused(side, pool, embedding):
    text, ids = "one two three four " * 200, list(range(1000, 1400))
    expected = Tokenizer(embedding.tokenizer.backend, 256, {"truncation_side": side}).encode([text]).ids
    found = encoded(pool, [text, ids, "short"], direction=side)
    assert found.ids[0] == expected[0]
    assert found.ids[1] == (ids[:256] if side == "right" else ids[-256:])
    assert found.truncated == [True, True, False]
    assert not encoded(pool, ["x " * 10], truncate=False).truncated[0]
    for long, count in ((text, 802), (ids, 400), (("a b c", text), 806)):
        with pytest.raises(Invalid, match=f"must have less than 256 tokens. Given: {count}$"):
            encoded(pool, [long], truncate=False, direction=side)
    with pytest.raises(Invalid, match=r"less than 5 tokens. Given: 12$"):
        encoded(pool, ["x " * 10], truncate=False, max_length=5)


def test_a_huge_text_is_not_counted_to_its_end(pool, monkeypatch):
    monkeypatch.setattr("fastbert.serve.cutting._COUNTED", 2000)
    with pytest.raises(Invalid, match="Given: more than 1002"):
        encoded(pool, ["y " * 3000], truncate=False)


def test_ids_of_another_tokenizer_are_explained(pool):
    for wrong in (30522, 100264, -1):
        with pytest.raises(
            BadIds, match=f"input 1 has the token id {wrong}.*0 to 30521.*tiktoken.*check_embedding_ctx"
        ):
            encoded(pool, ["text", [101, wrong, 102]])
    with pytest.raises(Invalid, match="max_length is 1, but there are 2 special tokens"):
        encoded(pool, ["text"], max_length=1)
    with pytest.raises(Invalid, match="truncation_direction is 'up'"):
        encoded(pool, ["text"], direction="up")


def test_a_cancelled_request_leaves_the_pool_working(pool):
    async def main():
        task = asyncio.ensure_future(pool.encode(["word " * 5000] * 200))
        await asyncio.sleep(0)
        task.cancel()
        assert isinstance((await asyncio.gather(task, return_exceptions=True))[0], asyncio.CancelledError)
        assert (await pool.encode(["x " * 400])).truncated == [True]

    asyncio.run(main())


phrases = st.lists(st.sampled_from(WORDS), max_size=30).map(" ".join)


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(phrases, st.tuples(phrases, phrases)),
    st.integers(3, 40),
    st.sampled_from(["right", "left"]),
)
def test_cutting_is_that_of_tokenizers(cutter, text, length, side):
    backend = cutter[0]
    backend.enable_truncation(length, direction=side)
    expected = backend.encode(*([text] if isinstance(text, str) else text))
    found = cutter[1].encode(text, length, side)
    assert found == (expected.ids, expected.type_ids, bool(expected.overflowing))


@pytest.fixture(scope="module")
def cutter(minilm):
    tokenizer = Tokenizer.from_folder(minilm, 512)
    return tokenizers.Tokenizer.from_str(tokenizer.backend.to_str()), Cutter(tokenizer)


@settings(max_examples=40, deadline=None)
@given(phrases, st.lists(st.sampled_from([*WORDS, "각" * 9, "x" * 40]), min_size=20, max_size=40), st.booleans())
def test_a_pair_with_a_huge_text_costs_little_and_gives_the_same(minilm_tokenizer, short, words, swap):
    tokenizer, backend = minilm_tokenizer
    long = " ".join(words) * 60
    pair = (long, short) if swap else (short, long)
    kept = tokenizer.checked(pair)
    if 4 * len(short) < tokenizer.max_length - 1:
        assert sum(map(len, kept)) < len(long) + len(short)
    expected, found = backend.encode(*pair), tokenizer.encode([pair])
    assert (found.ids[0], found.type_ids[0], found.truncated[0]) == (expected.ids, expected.type_ids, True)


@pytest.fixture(scope="module")
def minilm_tokenizer(minilm):
    tokenizer = Tokenizer.from_folder(minilm, 512, 64)
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.enable_truncation(64)
    return tokenizer, backend
