"""What routes answer, for `/openapi.json`: schemas of bodies, statuses of errors. Nothing is computed with these."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, RootModel


class TEIError(BaseModel):
    """An error of the native routes."""

    error: str
    error_type: str


class OpenAIErrorDetail(BaseModel):
    """What went wrong, and in which field."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    """An error of the /v1 routes."""

    error: OpenAIErrorDetail


class CohereError(BaseModel):
    """An error of the /v2 routes."""

    message: str


class Vectors(RootModel[list[list[float] | str]]):
    """One vector an input; with base64 its little-endian bytes."""


class TokenVectors(RootModel[list[list[list[float]]]]):
    """One vector a token, for each input."""


class SparseTerm(BaseModel):
    """A word of the vocabulary and its weight."""

    index: int
    value: float


class SparseVectors(RootModel[list[list[SparseTerm]]]):
    """The terms of each input that are not zero."""


class Cosines(RootModel[list[float]]):
    """One number a sentence."""


class Prediction(BaseModel):
    """A label and its score."""

    score: float
    label: str


class Predictions(RootModel[list[Prediction] | list[list[Prediction]]]):
    """Labels of a text, the best first; of a batch a list of such lists."""


class Rank(BaseModel):
    """A text's place in the request and its score."""

    index: int
    score: float
    text: str | None = None


class RankedDocument(BaseModel):
    """A document's place in the request and its score."""

    index: int
    relevance_score: float
    document: dict[str, str] | None = None


class Signed(BaseModel):
    """What infinity's answers carry beside their results."""

    object: str
    id: str
    created: int
    model: str
    usage: dict[str, int]


class RankedDocuments(Signed):
    """Results, the best first."""

    results: list[RankedDocument]
    meta: dict[str, Any]


class Classified(Signed):
    """Labels of each text, the best first."""

    data: list[list[Prediction]]


class Ranks(RootModel[list[Rank] | RankedDocuments]):
    """A list for `texts`, an object for `documents`."""


class Token(BaseModel):
    """A token; start and stop count bytes of the prompt and text in UTF-8, and are null for special tokens."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class Tokens(RootModel[list[list[Token]]]):
    """Tokens of each text."""


class Decoded(RootModel[list[str]]):
    """Texts of token ids."""


class Entity(BaseModel):
    """A span of the text; `entity` instead of `entity_group` where tokens are not grouped."""

    entity_group: str | None = None
    entity: str | None = None
    score: float
    index: int | None = None
    word: str
    start: int
    end: int


class Entities(RootModel[list[Entity] | list[list[Entity]]]):
    """Entities of a text; of a list of texts a list of such lists."""


class Filling(BaseModel):
    """A word for a mask, and the text with it."""

    score: float
    token: int
    token_str: str
    sequence: str


class Fillings(RootModel[list[Filling] | list[list[Filling]] | list[list[list[Filling]]]]):
    """Words for the mask of a text, the best first; a list deeper for several masks, and for a list of texts."""


class OpenAIEmbedding(BaseModel):
    """One vector, as numbers or as base64."""

    object: Literal["embedding"]
    embedding: list[float] | str
    index: int


class OpenAIEmbeddings(BaseModel):
    """OpenAI's list of vectors."""

    object: Literal["list"]
    data: list[OpenAIEmbedding]
    model: str
    usage: dict[str, int]


class CohereEmbeddings(BaseModel):
    """Vectors by their type."""

    id: str
    embeddings: dict[str, list[list[float] | str]]
    texts: list[str]
    meta: dict[str, Any]
    response_type: str


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelCards(BaseModel):
    """OpenAI's list of models."""

    object: Literal["list"]
    data: list[ModelCard]


class VertexPredictions(BaseModel):
    """One answer an instance."""

    predictions: list[Any]


_STATUSES = {
    400: "The body is not JSON, or an input is empty, or a token id is none of the model's.",
    401: "An API key is needed, or is not known.",
    404: "The model is not served here.",
    408: "The body did not arrive in time.",
    413: "The body is too long.",
    415: "The body is not declared as JSON.",
    422: "JSON of another shape, or a value that does not fit.",
    424: "The model does not compute this, or its computation failed.",
    429: "No room: try again after `Retry-After` seconds.",
    500: "A defect of the server; its log has it under the request id.",
    503: "Starting or draining.",
    504: "The deadline passed.",
}


def _errors(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": model, "description": text} for status, text in _STATUSES.items()}


def _route(
    model: type[BaseModel] | None, tag: str, error: type[BaseModel] = TEIError, **content: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of a route's declaration; `content` are further media types of its answer."""
    responses: dict[int | str, dict[str, Any]] = _errors(error)
    if content:
        responses[200] = {"content": {name.replace("_", "/", 1).replace("_", "-"): c for name, c in content.items()}}
    return {"response_model": model, "responses": responses, "tags": [tag]}


_BINARY = {"schema": {"type": "string", "format": "binary"}}
TEI, OPENAI, COHERE, INFINITY = "text-embeddings-inference", "OpenAI", "Cohere and Jina", "infinity"
TASKS, SERVER = "Tasks", "Server"

embed = _route(Vectors, TEI, application_octet_stream=_BINARY, application_x_npy=_BINARY)
embed_all = _route(TokenVectors, TEI)
embed_sparse = _route(SparseVectors, TEI)
similarity = _route(Cosines, TEI)
predict = _route(Predictions, TEI)
classify = _route(Classified, INFINITY, OpenAIError)
rerank = _route(Ranks, TEI)
tokenize = _route(Tokens, TEI)
decode = _route(Decoded, TEI)
vertex = _route(VertexPredictions, TEI)
default_task: dict[str, Any] = {**_route(None, TEI), "response_model": Any}
token_classification = _route(Entities, TASKS)
fill_mask = _route(Fillings, TASKS)
openai_embeddings = _route(OpenAIEmbeddings, OPENAI, OpenAIError)
openai_models = _route(ModelCards, OPENAI, OpenAIError)
rerank_documents = _route(RankedDocuments, COHERE, OpenAIError)
cohere_rerank = _route(RankedDocuments, COHERE, CohereError)
cohere_embed = _route(CohereEmbeddings, COHERE, CohereError)
