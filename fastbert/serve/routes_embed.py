"""Vectors: TEI's /embed, /embed_all, /embed_sparse, /similarity; OpenAI's /v1/embeddings; Cohere's /v2/embed."""

from __future__ import annotations

import uuid
from typing import Any

import numpy as np
from fastapi import APIRouter, Response

from fastbert.serve import answers, wire
from fastbert.serve.call import Call
from fastbert.serve.errors import EmptyInput, Invalid, WrongModel
from fastbert.serve.gate import DirectRoute
from fastbert.serve.infer import as_list, check_count, compute, counted, need, timed
from fastbert.serve.models import Model
from fastbert.serve.schemas import (
    CohereEmbedRequest,
    EmbedAllRequest,
    EmbedRequest,
    EmbedSparseRequest,
    OpenAIEmbeddingsRequest,
    SimilarityRequest,
)
from fastbert.serve.scores import normalize, sparse_terms
from fastbert.vectors import quantize_vectors, similarity

router = APIRouter(route_class=DirectRoute)

_MATRIX = (wire.JSON, wire.RAW, wire.NPY)


@router.post("/embed", **answers.embed)
async def embed(call: Call, body: EmbedRequest) -> Response:
    """Vectors of texts or of token ids, always a list of them.

    `Accept: application/octet-stream` answers the little-endian numbers row after row (`x-embedding-shape` and
    `x-embedding-dtype` say how to read them), `application/x-npy` a NumPy file.
    """
    model = call.model()
    media = wire.accepted(call.sent.get("accept"), _MATRIX)
    if media is None:
        raise Invalid(f"Accept asks for none of {', '.join(_MATRIX)}", "accept")
    inputs, batch = as_list(body.inputs)
    if model.served.kind == "splade":
        matrix = await _splade(call, model, body, inputs, batch)
    else:
        matrix = await _vectors(call, model, inputs, batch, body.dimensions, body, normalized=body.normalize)
    rows = _precise(matrix, body.precision)
    headers = {"x-embedding-shape": ",".join(map(str, rows.shape)), "x-embedding-dtype": str(rows.dtype)}
    if media == wire.JSON:
        content = timed(call, lambda: wire.embeddings_json(rows, body.encoding_format))
        return call.answer(content)
    return call.answer(timed(call, lambda: (wire.raw if media == wire.RAW else wire.npy)(rows)), media, **headers)


async def _splade(call: Call, model: Model, body: EmbedRequest, inputs: list[Any], batch: bool) -> np.ndarray:
    counted(call, batch)
    if body.normalize:
        raise WrongModel("Backend error: `normalize` is not available for SPLADE models", "normalize")
    rows = await compute(
        call, model, inputs, "sparse", batch=batch, truncate=body.truncate,
        direction=body.truncation_direction, prompt_name=body.prompt_name,
    )  # fmt: skip
    return np.stack(rows)[:, : body.dimensions]


async def _vectors(
    call: Call, model: Model, inputs: list[Any], batch: bool, dimensions: int | None, options: Any, normalized: bool
) -> np.ndarray:
    """(N, D) float32: cut to `dimensions`, then scaled, as `Embedder.encode` does it."""
    counted(call, batch)
    need(model, ("embedding",), "Model is not an embedding model")
    width = model.served.dimension
    if dimensions == 0:
        raise Invalid("Input validation error: `dimensions` should be positive", "dimensions")
    if dimensions is not None and width is not None and dimensions > width:
        raise Invalid(
            "Input validation error: `dimensions` should be smaller than the maximum embedding dimension.", "dimensions"
        )
    if dimensions == width:
        dimensions = None
    ready = normalized and dimensions is None  # for a whole batch at once
    rows = await compute(
        call, model, inputs, "unit" if ready else "vectors", batch=batch,
        truncate=getattr(options, "truncate", None),
        direction=getattr(options, "truncation_direction", "Right"),
        prompt_name=getattr(options, "prompt_name", None),
    )  # fmt: skip
    vectors = rows[0][None] if len(rows) == 1 else np.stack(rows)
    if dimensions is not None:
        vectors = np.ascontiguousarray(vectors[:, :dimensions])
    return normalize(vectors) if normalized and not ready else vectors


def _precise(matrix: np.ndarray, precision: str) -> np.ndarray:
    try:
        return quantize_vectors(matrix, precision)
    except ValueError as error:
        raise Invalid(f"Input validation error: {error}", "precision") from error


@router.post("/embed_all", **answers.embed_all)
async def embed_all(call: Call, body: EmbedAllRequest) -> Response:
    """One vector a token, special tokens included, not scaled."""
    model = call.model()
    inputs, batch = as_list(body.inputs)
    counted(call, batch)
    if model.served.kind == "splade":
        raise WrongModel("Backend error: `embed_all` is not available for SPLADE models")
    need(model, ("embedding",), "Model is not an embedding model")
    rows = await compute(
        call, model, inputs, "tokens", batch=batch, truncate=body.truncate,
        direction=body.truncation_direction, prompt_name=body.prompt_name,
    )  # fmt: skip
    return call.answer(timed(call, lambda: wire.dump(rows)))


@router.post("/embed_sparse", **answers.embed_sparse)
async def embed_sparse(call: Call, body: EmbedSparseRequest) -> Response:
    """The terms of a SPLADE model that are not zero, by index."""
    model = call.model()
    inputs, batch = as_list(body.inputs)
    counted(call, batch)
    need(model, ("splade",), "Model is not an embedding model with SPLADE pooling")
    rows = await compute(
        call, model, inputs, "sparse", batch=batch, truncate=body.truncate,
        direction=body.truncation_direction, prompt_name=body.prompt_name,
    )  # fmt: skip
    return call.answer(timed(call, lambda: wire.dump([sparse_terms(row) for row in rows])))


@router.post("/similarity", **answers.similarity)
async def similarities(call: Call, body: SimilarityRequest) -> Response:
    """The cosine of one sentence to each of others."""
    model = call.model()
    sentences = body.inputs.sentences
    if not sentences:
        raise EmptyInput("`inputs.sentences` cannot be empty", "inputs.sentences")
    check_count(call, len(sentences) + 1)
    inputs = [body.inputs.source_sentence, *sentences]
    vectors = await _vectors(call, model, inputs, True, None, body.parameters, normalized=False)
    cosines = similarity("cosine", vectors[:1], vectors[1:])[0].numpy()
    return call.answer(timed(call, lambda: wire.dump(cosines)))


@router.post("/v1/embeddings", **answers.openai_embeddings)
@router.post("/embeddings", **answers.openai_embeddings)
async def openai_embeddings(call: Call, body: OpenAIEmbeddingsRequest) -> Response:
    """OpenAI's embeddings, always of length 1; `base64`, what its Python client asks for, is the quick way."""
    model = call.model(body.model)
    inputs, batch = as_list(body.input)
    matrix = await _vectors(call, model, inputs, batch, body.dimensions, None, normalized=True)
    rows = _precise(matrix, body.precision)
    content = timed(call, lambda: wire.openai_json(rows, body.encoding_format, model.name, call.tokens))
    return call.answer(content)


@router.post("/v2/embed", **answers.cohere_embed)
async def cohere_embed(call: Call, body: CohereEmbedRequest) -> Response:
    """Cohere's embeddings, of length 1; `input_type` is the name of a prompt where the model has one of that name."""
    model = call.model(body.model)
    check_count(call, len(body.texts), "texts")
    prompts = model.served.prompts
    options = EmbedRequest(
        inputs=list[str | list[int]](body.texts),
        truncate=body.truncate != "NONE",
        truncation_direction="Left" if body.truncate == "START" else "Right",
        prompt_name=_input_type(body.input_type, prompts),
    )
    matrix = await _vectors(call, model, list(body.texts), True, body.output_dimension, options, normalized=True)
    found: dict[str, Any] = {}
    for kind in body.embedding_types:
        if kind == "base64":
            found[kind] = [wire.base64_of(row).decode() for row in matrix]
        else:
            found[kind] = _precise(matrix, "float32" if kind == "float" else kind)
    content = {
        "id": str(uuid.uuid4()),
        "embeddings": found,
        "texts": body.texts,
        "meta": {"api_version": {"version": "2"}, "billed_units": {"input_tokens": call.tokens}},
        "response_type": "embeddings_by_type",
    }
    return call.answer(timed(call, lambda: wire.dump(content)))


_COHERE = {"search_query": "query", "search_document": "document", "classification": "", "clustering": ""}


def _input_type(name: str | None, prompts: Any) -> str | None:
    """The prompt an input type stands for: of its own name, or of Cohere's word's usual name, or none."""
    if name is None or name in prompts:
        return name
    if name not in _COHERE:
        raise Invalid(f"input_type {name!r:.80} is no prompt of this model; it has {sorted(prompts)}", "input_type")
    return _COHERE[name] if _COHERE[name] in prompts else None
