"""Labels, ranks, entities and words for masks against the pipelines of transformers, over HTTP."""

from __future__ import annotations

from itertools import combinations

import httpx
import numpy as np
import pytest
import torch
import transformers
from transformers.pipelines.token_classification import AggregationStrategy

from fastbert.serve import scores
from fastbert.serve.entities import entities
from fastbert.tokenizer import Tokenizer
from tests.serving import ENTITIES, HEADS, live, tiny_model

TEXTS = [
    "Jane Hutchinson-Brown lives in Kotobuki near San Francisco.",
    "Ünïcödé Müllerová, 漢字 🚢 and unbelievably long words",
    "x",
]
STRATEGIES = ("none", "simple", "first", "average", "max")


@pytest.fixture(scope="module")
def folders(minilm, tmp_path_factory):
    return {kind: tiny_model(kind, tmp_path_factory.mktemp(kind), minilm) for kind in HEADS}


@pytest.fixture(scope="module")
def client(folders):
    with live(folders, warmup=False) as server, httpx.Client(base_url=server.address, timeout=60) as found:
        yield found


def post(client, path, kind, **body):
    response = client.post(path, json=body, headers={"x-model": kind})
    assert response.status_code == 200, response.text
    return response.json()


def _equal(found, exact):
    assert len(found) == len(exact)
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours.pop("score") == pytest.approx(float(theirs.pop("score")), abs=2e-5)
        assert ours == theirs


@pytest.fixture(scope="module")
def their_entities(folders):
    return transformers.pipeline("token-classification", str(folders["token-classification"]), device="cpu")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_entities_are_those_of_the_pipeline(client, their_entities, strategy):
    options = {"aggregation_strategy": strategy}
    found = post(client, "/token-classification", "token-classification", inputs=TEXTS, parameters=options)
    exact = [their_entities(text, **options) for text in TEXTS]
    assert any(exact)
    for ours, theirs in zip(found, exact, strict=True):
        _equal(ours, theirs)
    for text, ours in zip(TEXTS, found, strict=True):
        assert all(text[e["start"] : e["end"]] for e in ours)
    if strategy == "simple":
        assert post(client, "/", "token-classification", inputs=TEXTS[0]) == [
            {**e, "score": pytest.approx(e["score"])} for e in _again(client)
        ]


def _again(client):
    return post(client, "/token-classification", "token-classification", inputs=TEXTS[0])


def test_aggregation_of_random_scores(minilm, their_entities):
    """Labels at random, so that every rule about prefixes, words and neighbours decides somewhere."""
    tokenizer = Tokenizer.from_folder(minilm, 128)
    generator = np.random.default_rng(0)
    told_apart = set()
    for text in TEXTS * 12:
        encoding = tokenizer.backend.encode(text)
        logits = generator.normal(size=(len(encoding.ids), len(ENTITIES))).astype(np.float32) * 2
        pre = their_entities.gather_pre_entities(
            text, np.array(encoding.ids), scores.softmax(logits), encoding.offsets,
            np.array(encoding.special_tokens_mask), AggregationStrategy.NONE,
        )  # fmt: skip
        results = {}
        for strategy in STRATEGIES:
            kind = AggregationStrategy(strategy)
            theirs = their_entities.aggregate(pre, kind)
            ours = entities(text, encoding, logits, tokenizer.backend, ENTITIES, strategy, ())
            _equal([dict(e) for e in ours], [dict(e) for e in theirs])
            results[strategy] = [(e["start"], e["end"], e.get("entity_group")) for e in ours]
        told_apart |= {(a, b) for a, b in combinations(STRATEGIES, 2) if results[a] != results[b]}
    assert told_apart == set(combinations(STRATEGIES, 2))


def test_ignored_labels(client):
    everything = post(
        client, "/token-classification", "token-classification", inputs=TEXTS[0], parameters={"ignore_labels": []}
    )
    names = {e["entity_group"] for e in everything}
    assert len(names) > 1
    for name in names:
        options = {"ignore_labels": [name]}
        rest = post(client, "/token-classification", "token-classification", inputs=TEXTS[0], parameters=options)
        assert [e["start"] for e in rest] == [e["start"] for e in everything if e["entity_group"] != name]


@pytest.mark.parametrize("text", ["Paris is the [MASK] of France.", "The [MASK] sat on the [MASK].", "[MASK]"])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"targets": ["cat", "dog", "paris", "mat"]}])
def test_words_for_masks_are_those_of_the_pipeline(client, folders, text, options):
    theirs = transformers.pipeline("fill-mask", str(folders["fill-mask"]), device="cpu")
    found = post(client, "/fill-mask", "fill-mask", inputs=text, parameters=options)
    exact = theirs(text, **options)
    if text.count("[MASK]") == 1:
        found, exact = [found], [exact]
    for ours, row in zip(found, exact, strict=True):
        _equal(ours, row)


def test_labels_are_softmax_of_the_logits(client, folders):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folders["classifier"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["classifier"])
    pairs = [("a text", "and another"), ("one more", "text")]
    with torch.no_grad():
        logits = model(**tokenizer(*map(list, zip(*pairs, strict=True)), padding=True, return_tensors="pt")).logits
    found = post(client, "/predict", "classifier", inputs=[list(pair) for pair in pairs])
    raw = post(client, "/predict", "classifier", inputs=[list(pair) for pair in pairs], raw_scores=True)
    sigmoids = post(
        client, "/predict", "classifier", inputs=["a text", "and another"], parameters={"function_to_apply": "sigmoid"}
    )
    for rows, exact in ((found, logits.softmax(-1)), (raw, logits), ([sigmoids], logits[:1].sigmoid())):
        for row, numbers in zip(rows, exact, strict=True):
            assert [p["score"] for p in row] == sorted((p["score"] for p in row), reverse=True)
            by_label = {p["label"]: p["score"] for p in row}
            for label, number in zip(("bad", "so-so", "good"), numbers.tolist(), strict=True):
                assert by_label[label] == pytest.approx(number, abs=1e-4)


def test_ranks_are_sigmoids_of_the_logits(client, folders):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folders["reranker"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["reranker"])
    query, texts = "What is Deep Learning?", ["Deep learning is...", "x", "a cake recipe with two eggs"]
    with torch.no_grad():
        logits = model(**tokenizer([query] * 3, texts, padding=True, return_tensors="pt")).logits[:, 0]
    order = logits.argsort(descending=True).tolist()
    found = post(client, "/rerank", "reranker", query=query, texts=texts, return_text=True)
    assert [(row["index"], row["text"]) for row in found] == [(i, texts[i]) for i in order]
    assert [row["score"] for row in found] == pytest.approx(logits[order].sigmoid().tolist(), abs=1e-5)
    raw = post(client, "/rerank", "reranker", query=query, texts=texts, raw_scores=True)
    assert [row["score"] for row in raw] == pytest.approx(logits[order].tolist(), abs=1e-4)
    cohere = post(client, "/v1/rerank", "reranker", query=query, documents=texts, top_n=2, return_documents=True)
    assert [(row["index"], row["document"]["text"]) for row in cohere["results"]] == [(i, texts[i]) for i in order[:2]]
    cut = post(client, "/v2/rerank", "reranker", query=query, documents=["a cake recipe"], max_tokens_per_doc=2)
    short = post(client, "/v2/rerank", "reranker", query=query, documents=["a cake"])
    assert cut["results"] == short["results"]
    assert cut["usage"] == short["usage"]


def test_probabilities_do_not_overflow():
    extreme = np.array([-100.0, 1.0, 95.0], dtype=np.float32)
    assert np.isfinite(scores.softmax(extreme)).all()
    with np.errstate(over="raise"):
        assert scores.sigmoid(np.array([-200.0, 0.0, 200.0], dtype=np.float32)).tolist() == [
            pytest.approx(0.0, abs=1e-30), 0.5, 1.0,
        ]  # fmt: skip
    # What TEI subtracts, the logit of the greatest absolute value, overflows here.
    with np.errstate(over="ignore", invalid="ignore"):
        theirs = np.exp(extreme - extreme[np.abs(extreme).argmax()])
        assert not np.isfinite(theirs / theirs.sum()).all()
