"""Scores: TEI's /predict and /rerank, Cohere's and Jina's /v1/rerank and /v2/rerank, entities, words for a mask."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

import numpy as np
import tokenizers
from fastapi import APIRouter, Response

from fastbert.serve import answers, wire
from fastbert.serve.call import Call
from fastbert.serve.entities import entities
from fastbert.serve.errors import EmptyInput, Invalid, WrongModel
from fastbert.serve.gate import DirectRoute
from fastbert.serve.infer import begin, check_count, check_texts, compute, counted, need, submit, timed
from fastbert.serve.models import Model
from fastbert.serve.schemas import (
    AnyRerankRequest,
    ClassifyRequest,
    FillMaskRequest,
    PredictRequest,
    RerankDocumentsRequest,
    RerankRequest,
    TokenClassificationRequest,
)
from fastbert.serve.scores import descending, mask_words, predictions, probabilities, target_ids

router = APIRouter(route_class=DirectRoute)

_CLASSIFIERS = ("classifier", "reranker")


@router.post("/predict", **answers.predict)
async def predict(call: Call, body: PredictRequest) -> Response:
    """Labels with their scores, the best first; for a batch a list of such lists."""
    model = call.model()
    pair = isinstance(body.inputs, list) and len(body.inputs) == 2 and isinstance(body.inputs[0], str)
    batch = isinstance(body.inputs, list) and isinstance(body.inputs[0], list)
    counted(call, batch)
    need(model, _CLASSIFIERS, "Model is not a classifier model")
    inputs = [_sequence(row) for row in body.inputs] if batch else [_sequence(body.inputs)]
    logits = await compute(
        call, model, inputs, "logits", batch=batch, truncate=body.truncate, direction=body.truncation_direction
    )
    function, top = "none" if body.raw_scores else None, None
    if (task := body.parameters) is not None:
        function, top = task.function_to_apply or function, task.top_k
    labels = model.served.id2label
    rows = [predictions(probabilities(row, function), labels)[:top] for row in logits]
    # The Hugging Face task, whose requests carry `parameters`, has a list of lists for a single text too.
    return call.answer(timed(call, lambda: wire.dump(rows if batch or (task is not None and not pair) else rows[0])))


def _sequence(value: Any) -> str | tuple[str, str]:
    if isinstance(value, str):
        return value
    return value[0] if len(value) == 1 else (value[0], value[1])


@router.post("/rerank", **answers.rerank)
async def rerank(call: Call, body: AnyRerankRequest) -> Response:
    """Texts by how well they answer a query: `texts` asks in TEI's form, `documents` in Cohere's, Jina's and vLLM's."""
    if isinstance(body, RerankDocumentsRequest):
        return await rerank_documents(call, body)
    model = call.model()
    if not body.texts:
        raise EmptyInput("`texts` cannot be empty", "texts")
    scores = await _relevance(call, model, body.query, body.texts, body)
    ranks: list[dict[str, Any]] = []
    for index in descending(scores).tolist():
        text = {"text": body.texts[index]} if body.return_text else {}
        ranks.append({"index": index, **text, "score": scores[index]})
    return call.answer(timed(call, lambda: wire.dump(ranks)))


@router.post("/v1/rerank", **answers.rerank_documents)
@router.post("/v2/rerank", **answers.cohere_rerank)
async def rerank_documents(call: Call, body: RerankDocumentsRequest) -> Response:
    """The answer of Cohere and Jina in one: results with `relevance_score`, the best first, and `usage`."""
    model = call.model(body.model)
    texts = [document if isinstance(document, str) else document.text for document in body.documents]
    if not texts:
        raise EmptyInput("`documents` cannot be empty", "documents")
    need(model, ("reranker",), "model is not a re-ranker model")
    if body.max_tokens_per_doc is not None:
        texts = await _cut(model, texts, body.max_tokens_per_doc)
    scores = await _relevance(call, model, body.query, texts, body)
    results: list[dict[str, Any]] = []
    for index in descending(scores).tolist()[: body.top_n]:
        document = {"document": {"text": texts[index]}} if body.return_documents else {}
        results.append({"index": index, "relevance_score": scores[index], **document})
    content = {
        **_signed("rerank", model, call),
        "results": results,
        "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
    }
    return call.answer(timed(call, lambda: wire.dump(content)))


def _signed(kind: str, model: Model, call: Call) -> dict[str, Any]:
    """What infinity's answers, and in part Jina's and vLLM's, carry beside their results."""
    usage = {"prompt_tokens": call.tokens, "total_tokens": call.tokens}
    return {
        "object": kind, "id": f"{kind}-{uuid.uuid4()}", "created": int(time.time()), "model": model.name, "usage": usage
    }  # fmt: skip


@router.post("/classify", **answers.classify)
async def classify(call: Call, body: ClassifyRequest) -> Response:
    """infinity's form of /predict: texts to their labels with scores, the best first."""
    model = call.model(body.model)
    counted(call, batch=True)
    need(model, _CLASSIFIERS, "Model is not a classifier model")
    logits = await compute(call, model, body.input, "logits", batch=True)
    function = "none" if body.raw_scores else None
    rows = [predictions(probabilities(row, function), model.served.id2label) for row in logits]
    return call.answer(timed(call, lambda: wire.dump({**_signed("classify", model, call), "data": rows})))


async def _relevance(
    call: Call, model: Model, query: str, texts: list[str], options: RerankRequest | RerankDocumentsRequest
) -> np.ndarray:
    """(N) float32, one score a text."""
    need(model, ("reranker",), "model is not a re-ranker model")
    counted(call, batch=True)
    check_count(call, len(texts), "texts")
    logits = await compute(
        call, model, [(query, text) for text in texts], "logits", batch=True,
        truncate=getattr(options, "truncate", None), direction=getattr(options, "truncation_direction", "Right"),
    )  # fmt: skip
    function = "none" if options.raw_scores else None
    return np.array([probabilities(row, function)[0] for row in logits], dtype=np.float32)


async def _cut(model: Model, texts: list[str], limit: int) -> list[str]:
    """The beginning of each text that its first `limit` tokens cover."""
    encodings = await model.encodings.whole(texts, add_special_tokens=False)
    return [
        text if len(e.ids) <= limit else text[: e.offsets[limit - 1][1]]
        for text, e in zip(texts, encodings, strict=True)
    ]


@router.post("/token-classification", **answers.token_classification)
async def token_classification(call: Call, body: TokenClassificationRequest) -> Response:
    """Entities with their places in the text; for a list of texts a list of such lists."""
    model = call.model()
    need(model, ("token-classification",), "model is not a token classification model")
    texts, encodings, batch = await _encodings(call, model, body)
    logits = await submit(call, model, [e.ids for e in encodings], "logits", batch)
    task, tokenizer, labels = body.parameters, model.served.tokenizer.backend, model.served.id2label

    def read() -> list[Any]:
        return [
            entities(text, e, row, tokenizer, labels, task.aggregation_strategy, task.ignore_labels)
            for text, e, row in zip(texts, encodings, logits, strict=True)
        ]

    rows = await asyncio.to_thread(read)
    return call.answer(timed(call, lambda: wire.dump(rows if batch else rows[0])))


@router.post("/fill-mask", **answers.fill_mask)
async def fill_mask(call: Call, body: FillMaskRequest) -> Response:
    """The words that fit best where the text has the mask token; with several masks a list for each."""
    model = call.model()
    need(model, ("fill-mask",), "model is not a masked language model")
    tokenizer, mask = model.served.tokenizer.backend, model.served.mask_id
    if mask is None:
        raise WrongModel("Backend error: the model's tokenizer has no mask token")
    _, encodings, batch = await _encodings(call, model, body)
    for index, encoding in enumerate(encodings):
        if mask not in encoding.ids:
            word = tokenizer.id_to_token(mask)
            raise Invalid(f"Input validation error: `inputs`[{index}] has no {word} among its tokens", "inputs")
    targets, top_k = None, body.parameters.top_k
    if body.parameters.targets is not None:
        try:
            targets = target_ids(body.parameters.targets, tokenizer)
        except ValueError as error:
            raise Invalid(f"Input validation error: {error}", "parameters.targets") from error
    logits = await submit(call, model, [e.ids for e in encodings], "mask", batch)

    def read() -> list[Any]:
        rows = [
            mask_words(encoding.ids, mask, row, tokenizer, top_k, targets)
            for encoding, row in zip(encodings, logits, strict=True)
        ]
        return [row[0] if len(row) == 1 else row for row in rows]

    found = await asyncio.to_thread(read)
    return call.answer(timed(call, lambda: wire.dump(found if batch else found[0])))


async def _encodings(
    call: Call, model: Model, body: TokenClassificationRequest | FillMaskRequest
) -> tuple[list[str], list[tokenizers.Encoding], bool]:
    """Texts, their tokens with offsets, and whether they came as a list; too many tokens are cut, or refused."""
    batch = not isinstance(body.inputs, str)
    counted(call, batch)
    begin(call, model, len(body.inputs) if batch else 1)
    texts = check_texts(call, body.inputs)
    call.characters = sum(map(len, texts))
    started = time.perf_counter()
    if call.server.settings.auto_truncate if body.truncate is None else body.truncate:
        encodings = await model.encodings.cut(texts, body.truncation_direction.lower())
    else:
        encodings = await model.encodings.whole(texts)
        longest, limit = max(len(e.ids) for e in encodings), model.served.max_length
        if longest > limit:
            message = f"`inputs` must have less than {limit} tokens. Given: {longest}"
            raise Invalid(f"Input validation error: {message}", "inputs")
    call.num_truncated = sum(bool(e.overflowing) for e in encodings)
    call.stages["tokenize"] = time.perf_counter() - started
    return texts, encodings, batch
