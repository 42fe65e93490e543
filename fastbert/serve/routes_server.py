"""The server about itself: health, models, series, the page; and TEI's routes that stand for a model's own task."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Response
from pydantic import TypeAdapter, ValidationError

import fastbert
from fastbert.serve import answers, schemas, wire
from fastbert.serve.call import Call, said
from fastbert.serve.errors import NotReady
from fastbert.serve.gate import DirectRoute
from fastbert.serve.infer import check_count
from fastbert.serve.models import Model
from fastbert.serve.routes_embed import embed, embed_sparse, similarities
from fastbert.serve.routes_predict import fill_mask, predict, rerank, token_classification
from fastbert.serve.state import State

router = APIRouter(route_class=DirectRoute)
_SERVER: dict[str, Any] = {"tags": [answers.SERVER]}

PAGE = files("fastbert.serve") / "page" / "index.html"
_PAGE_HEADERS = {
    # The page is one file that loads nothing; its script and style are inside.
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


@router.get("/health", **_SERVER)
@router.get("/ping", **_SERVER)
async def health(call: Call) -> Response:
    """200 with an empty body when requests can be answered; 503 while starting and draining."""
    _ready(call.server)
    return Response()


def _ready(state: State) -> None:
    if state.phase != "ready":
        raise NotReady("unhealthy", headers={"retry-after": "1"})


@router.get("/ready", **_SERVER)
async def ready(call: Call) -> Response:
    """Whether traffic may be sent here; turns to 503 before the server stops answering."""
    _ready(call.server)
    return Response(wire.dump({"status": call.server.phase}), media_type=wire.JSON)


@router.get("/live", **_SERVER)
async def live(call: Call) -> Response:
    """Whether the process answers at all."""
    return Response(wire.dump({"status": "live"}), media_type=wire.JSON)


@router.get("/", **_SERVER)
async def root(call: Call) -> Response:
    """The status page for a browser; what /health says for everybody else."""
    if "text/html" not in call.sent.get("accept", ""):
        return await health(call)
    return Response(PAGE.read_bytes(), media_type="text/html", headers=_PAGE_HEADERS)


@router.get("/metrics", **_SERVER)
async def metrics(call: Call) -> Response:
    """Series in Prometheus' text format."""
    return Response(call.server.series.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/stats", **_SERVER)
async def stats(call: Call) -> Response:
    """What the status page shows: the last minute in numbers."""
    return Response(wire.dump(summary(call.server)), media_type=wire.JSON)


def summary(state: State) -> dict[str, Any]:
    """The content of `/stats`."""
    counters = [model.batcher.counters for model in state.models]
    padded = sum(row.padded_tokens for row in counters)
    sizes = state.series.batch_size
    counts = sizes.series[()][0]
    used = max((i + 1 for i, count in enumerate(counts[:-1]) if count), default=0)
    return {
        "status": state.phase,
        "version": fastbert.__version__,
        "uptime_s": time.monotonic() - state.started,
        **state.series.rolling(),
        "inflight": state.inflight,
        "queue_tokens": sum(model.batcher.queue_tokens for model in state.models),
        "padding_saved": 1 - sum(row.tokens for row in counters) / padded if padded else None,
        "batch_sizes": {str(int(bound)): count for bound, count in zip(sizes.bounds[:used], counts, strict=False)},
        "cache_hit_rate": state.cache_hit_rate(),
        "models": [_described(model) for model in state.models],
    }


def _described(model: Model) -> dict[str, Any]:
    served = model.served
    return {
        "name": model.name,
        "kind": served.kind,
        "dimension": served.dimension,
        "max_length": served.max_length,
        "dtype": served.dtype,
        "device": str(served.device),
    }


@router.get("/info", responses=answers.embed["responses"], **_SERVER)
async def info(call: Call) -> Response:
    """The model and the limits of requests, as text-embeddings-inference describes them."""
    model, settings = call.model(), call.server.settings
    served = model.served
    content = {
        "model_id": model.id,
        "model_sha": served.sha,
        "model_dtype": served.dtype,
        "served_model_name": model.name,
        "model_type": _model_type(model),
        "max_concurrent_requests": settings.max_concurrent_requests,
        "max_input_length": served.max_length,
        "max_batch_tokens": model.batcher.max_batch_tokens,
        "max_batch_requests": settings.max_batch_requests,
        "max_client_batch_size": settings.max_client_batch_size,
        "auto_truncate": settings.auto_truncate,
        "tokenization_workers": model.tokens.workers,
        "version": fastbert.__version__,
        "sha": None,
        "docker_label": None,
    }
    return Response(wire.dump(content), media_type=wire.JSON)


def _model_type(model: Model) -> dict[str, Any]:
    served = model.served
    if served.kind in ("embedding", "splade"):
        return {"embedding": {"pooling": served.pooling}}
    if served.kind == "fill-mask":
        return {"fill-mask": {}}
    labels = {str(i): label for i, label in served.id2label.items()}
    return {served.kind: {"id2label": labels, "label2id": {label: int(i) for i, label in labels.items()}}}


@router.get("/models", **answers.openai_models)
@router.get("/v1/models", **answers.openai_models)
async def models(call: Call) -> Response:
    """OpenAI's list of models; infinity has it at `/models`."""
    created = int(time.time() - (time.monotonic() - call.server.started))
    data = [
        {"id": model.name, "object": "model", "created": created, "owned_by": "fastbert"}
        for model in call.server.models
    ]
    return Response(wire.dump({"object": "list", "data": data}), media_type=wire.JSON)


_Answer = Callable[[Call, Any], Coroutine[Any, Any, Response]]


def _task(answer: _Answer, schema: Any) -> tuple[_Answer, TypeAdapter[Any]]:
    return answer, TypeAdapter(schema)


_SIMILARITY = _task(similarities, schemas.SimilarityRequest)
_RERANK = _task(rerank, schemas.AnyRerankRequest)
_TASKS = {
    "embedding": _task(embed, schemas.EmbedRequest),
    "splade": _task(embed_sparse, schemas.EmbedSparseRequest),
    "classifier": _task(predict, schemas.PredictRequest),
    "reranker": _task(predict, schemas.PredictRequest),
    "token-classification": _task(token_classification, schemas.TokenClassificationRequest),
    "fill-mask": _task(fill_mask, schemas.FillMaskRequest),
}


@router.post("/", **answers.default_task)
@router.post("/invocations", **answers.default_task)
async def default_task(call: Call, body: dict[str, Any]) -> Response:
    """The model's own task, by its kind and the body's form: vectors, cosines, labels, ranks, entities or words."""
    kind = call.model().served.kind
    compared = isinstance(body.get("inputs"), dict) or os.environ.get("TASK") == "sentence-similarity"
    if kind == "embedding" and compared:
        chosen = _SIMILARITY
    elif "texts" in body or "documents" in body or (kind == "reranker" and "inputs" not in body):
        chosen = _RERANK
    else:
        chosen = _TASKS[kind]
    answer, adapter = chosen
    try:
        request = adapter.validate_python(body)
    except ValidationError as error:
        raise said(error) from None
    return await answer(call, request)


@router.post("/vertex", **answers.vertex)
async def vertex(call: Call, body: schemas.VertexRequest) -> Response:
    """Any requests, each answered as `/` would, for Vertex AI."""
    if body.instances:
        check_count(call, len(body.instances), "instances")
    found = await asyncio.gather(*(default_task(call, instance) for instance in body.instances))
    return call.answer(b'{"predictions":[' + b",".join(bytes(answer.body) for answer in found) + b"]}")
