"""What kind of model a folder holds: its files say it, or the pooling that is asked for instead."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastbert.sentence_folder import TRANSFORMER_CONFIG_NAMES
from fastbert.typed import field, is_a
from fastbert.weights import read_json

# Names of poolings as servers spell them -> as `fastbert.ops.pool` does.
POOLINGS = {
    "cls": "cls",
    "mean": "mean",
    "max": "max",
    "last-token": "lasttoken",
    "last_token": "lasttoken",
    "lasttoken": "lasttoken",
    "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "weightedmean": "weightedmean",
}
_REFUSED = ("ForQuestionAnswering", "ForMultipleChoice", "ForNextSentencePrediction")


@dataclass(frozen=True)
class Splade:
    """How vocabulary logits become one sparse vector: `strategy` over the tokens of log1p(relu), or of log1p of that.

    `sum` is SPLADE (arXiv 2107.05720), `max` SPLADE v2 (2109.10086), `log1p_relu` OpenSearch's models (2504.14839).
    """

    strategy: str = "max"
    activation: str = "relu"


@dataclass(frozen=True)
class Kind:
    """A folder's kind.

    Attributes:
        name: `embedding`, `splade`, `classifier`, `reranker`, `token-classification` or `fill-mask`.
        transformer: the folder with the encoder's and the tokenizer's files.
        pooling: mode of `fastbert.ops.pool` to use instead of the folder's, or None.
        splade: of a `splade` model.
        max_length: tokens an input, where a sentence-transformers file says it.
    """

    name: str
    transformer: Path
    pooling: str | None = None
    splade: Splade | None = None
    max_length: int | None = None


def kind_of(folder: Path, pooling: str | None = None) -> Kind:
    """The kind of a folder: by `modules.json`, else by the architecture in `config.json`.

    Args:
        folder: a model's files.
        pooling: a name of `POOLINGS` makes vectors of any encoder, `splade` sparse ones of a masked language model.

    Raises:
        ValueError: an unknown pooling, or a model that nothing here serves.
    """
    if pooling not in (None, "splade", *POOLINGS):
        raise ValueError(f"pooling {pooling!r} is not one of splade, {', '.join(POOLINGS)}")
    if (modules := folder / "modules.json").is_file():
        if (kind := _splade(folder, modules)) is not None:
            return kind
        if pooling != "splade":
            return Kind("embedding", folder, POOLINGS.get(pooling or ""))
    values = read_json(folder / "config.json")
    names = field(values, "architectures", list[str], [], folder / "config.json")
    name = names[0] if names else ""
    if pooling == "splade":
        if not name.endswith("ForMaskedLM"):
            raise ValueError(
                f"pooling 'splade' needs a masked language model, {folder} holds a {name or 'bare encoder'}"
            )
        return Kind("splade", folder, splade=Splade())
    if pooling is not None:
        return Kind("embedding", folder, POOLINGS[pooling])
    if name.endswith("ForSequenceClassification"):
        return Kind("reranker" if _num_labels(values) == 1 else "classifier", folder)
    if name.endswith("ForTokenClassification"):
        return Kind("token-classification", folder)
    if name.endswith("ForMaskedLM"):
        return Kind("fill-mask", folder)
    if name.endswith(_REFUSED):
        raise ValueError(
            f"{folder} holds a {name}, which has no route here; pooling='mean' serves its encoder's vectors"
        )
    return Kind("embedding", folder)


def _num_labels(values: Mapping[str, Any]) -> int:
    labels = values.get("id2label")
    return len(labels) if isinstance(labels, Mapping) else field(values, "num_labels", int, 2, "config.json")


def _splade(folder: Path, path: Path) -> Kind | None:
    """A sentence-transformers SparseEncoder: a masked language model, then SPLADE's pooling."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not is_a(rows, list[Mapping[str, Any]]) or len(rows) != 2:
        return None
    kinds = [field(row, "type", str, "", path).rpartition(".")[2] for row in rows]
    if kinds[1] != "SpladePooling":
        return None
    places = [folder / field(row, "path", str, "", path) for row in rows]
    if not all(place.resolve().is_relative_to(folder.resolve()) for place in places):
        raise ValueError(f"{path} names a folder that lies outside {folder}")
    config = places[1] / "config.json"
    values = read_json(config) if config.is_file() else {}
    splade = Splade(
        field(values, "pooling_strategy", Literal["max", "sum"], "max", config),
        field(values, "activation_function", Literal["relu", "log1p_relu"], "relu", config),
    )
    sizes = [places[0] / name for name in TRANSFORMER_CONFIG_NAMES]
    found = next((path for path in sizes if path.is_file()), None)
    length = None if found is None else field(read_json(found), "max_seq_length", int, None, found)
    return Kind("splade", places[0], splade=splade, max_length=length)
