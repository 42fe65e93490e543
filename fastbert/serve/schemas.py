"""Requests, as pydantic reads them from the body's bytes and as `/openapi.json` describes them.

Field names, defaults and unions are those of text-embeddings-inference, OpenAI, Cohere, Jina and the Hugging Face
tasks. Unknown fields are ignored, as those servers do.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

TokenId = Annotated[int, Field(strict=True, ge=0, le=2**32 - 1)]
Ids = list[TokenId]
Count = Annotated[int, Field(strict=True, ge=0, le=2**63 - 1)]
Flag = Annotated[bool, Field(strict=True)]

# The first form that fits, as serde's untagged enums choose. An empty list counts as token ids.
Inputs = Annotated[str | Ids | list[str | Ids], Field(union_mode="left_to_right")]
Texts = Annotated[str | list[str], Field(union_mode="left_to_right")]
Sequences = list[Annotated[list[str], Field(min_length=1, max_length=2)]]
PredictInputs = Annotated[
    str | Annotated[list[str], Field(min_length=1, max_length=2)] | Annotated[Sequences, Field(min_length=1)],
    Field(union_mode="left_to_right"),
]


def _direction(value: Any) -> Any:
    return value.capitalize() if value in ("left", "right") else value


Direction = Annotated[Literal["Right", "Left"], BeforeValidator(_direction)]
EncodingFormat = Literal["float", "base64"]
Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]


class _Request(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True, protected_namespaces=())


class _Truncated(_Request):
    truncate: Flag | None = Field(default=None, description="Cut what is too long; null: as the server is set.")
    truncation_direction: Direction = Field(default="Right", description="Which end is cut; lower case is read too.")


class _Prompted(_Truncated):
    prompt_name: str | None = Field(default=None, description="One of the model's prompts, put before every text.")


class EmbedRequest(_Prompted):
    """Texts, or token ids as they are, to vectors."""

    inputs: Inputs
    normalize: Flag = Field(default=True, description="Scale vectors to length 1.")
    dimensions: Count | None = Field(default=None, description="Keep so many leading features, before scaling.")
    encoding_format: EncodingFormat = "float"
    precision: Precision = Field(default="float32", description="Bits a feature; int8 and uint8 need several inputs.")


class EmbedAllRequest(_Prompted):
    """Texts to one vector a token."""

    inputs: Inputs


class EmbedSparseRequest(_Prompted):
    """Texts to the non-zero terms of a SPLADE model."""

    inputs: Inputs


class SimilarityInput(_Request):
    """What is compared with what."""

    source_sentence: str
    sentences: list[str]


class SimilarityRequest(_Request):
    """The cosine of one sentence to others."""

    inputs: SimilarityInput
    parameters: _Prompted | None = None


class PredictParameters(_Request):
    """Parameters of the Hugging Face text-classification task; a request with them is answered in that task's shape."""

    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = None
    top_k: Annotated[int, Field(strict=True, ge=1)] | None = None


class PredictRequest(_Truncated):
    """A text, a pair of texts, or a batch of them, to scores of labels."""

    inputs: PredictInputs
    raw_scores: Flag = Field(default=False, description="Logits instead of probabilities.")
    parameters: PredictParameters | None = None


class ClassifyRequest(_Request):
    """infinity's form."""

    input: list[str]
    model: str | None = None
    raw_scores: Flag = False


class RerankRequest(_Truncated):
    """text-embeddings-inference's form."""

    query: str
    texts: list[str]
    raw_scores: Flag = False
    return_text: Flag = False


class Document(_Request):
    """A document that carries its text in a field."""

    text: str


class RerankDocumentsRequest(_Request):
    """The form of Cohere, Jina, vLLM and infinity."""

    model: str | None = None
    query: str
    documents: list[str | Document]
    raw_scores: Flag = False
    top_n: Annotated[int, Field(strict=True, ge=1)] | None = None
    return_documents: Flag = False
    max_tokens_per_doc: Annotated[int, Field(strict=True, ge=1)] | None = Field(
        default=None, description="Tokens of a document that are read at most."
    )


def _form(value: Any) -> str:
    return "documents form" if isinstance(value, dict) and "documents" in value else "texts form"


AnyRerankRequest = Annotated[
    Annotated[RerankRequest, Tag("texts form")] | Annotated[RerankDocumentsRequest, Tag("documents form")],
    Discriminator(_form),
]


class TokenizeRequest(_Request):
    """Texts to tokens."""

    inputs: Texts
    add_special_tokens: Flag = True
    prompt_name: str | None = None


class DecodeRequest(_Request):
    """Token ids to texts."""

    ids: Annotated[Ids | list[Ids], Field(union_mode="left_to_right")]
    skip_special_tokens: Flag = True


class TokenClassificationParameters(_Request):
    """Parameters of the Hugging Face token-classification task."""

    aggregation_strategy: Literal["none", "simple", "first", "average", "max"] = "simple"
    ignore_labels: list[str] = ["O"]


class TokenClassificationRequest(_Truncated):
    """Texts to entities with their places in the text."""

    inputs: Texts
    parameters: TokenClassificationParameters = TokenClassificationParameters()


class FillMaskParameters(_Request):
    """Parameters of the Hugging Face fill-mask task."""

    top_k: Annotated[int, Field(strict=True, ge=1)] = 5
    targets: list[str] | None = Field(default=None, description="Words to choose from; null: the whole vocabulary.")


class FillMaskRequest(_Truncated):
    """Texts with mask tokens to the words that fit."""

    inputs: Texts
    parameters: FillMaskParameters = FillMaskParameters()


class VertexRequest(_Request):
    """Requests of any kind, for Vertex AI."""

    instances: list[dict[str, Any]]


class OpenAIEmbeddingsRequest(_Request):
    """OpenAI's request, with `precision` beside it."""

    input: Inputs
    model: str | None = None
    user: str | None = None
    encoding_format: EncodingFormat = "float"
    dimensions: Count | None = None
    precision: Precision = "float32"


class CohereEmbedRequest(_Request):
    """Cohere's version 2 request; `input_type` names a prompt."""

    model: str | None = None
    texts: list[str]
    input_type: str | None = None
    embedding_types: list[Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]] = ["float"]
    output_dimension: Count | None = None
    truncate: Literal["NONE", "START", "END"] = "END"
