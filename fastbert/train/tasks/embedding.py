"""Vectors of texts: trained so that what belongs together lies together (Reimers & Gurevych 2019)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fastbert.corpus import CorpusError
from fastbert.embedder import Embedder
from fastbert.models.auto import AutoModel
from fastbert.models.config import Config
from fastbert.models.encoder import Encoded, EncoderModel
from fastbert.sentence_folder import SentenceFolder, read_folder
from fastbert.tokenizer import Tokenizer
from fastbert.train import metrics
from fastbert.train.batch import TrainBatch
from fastbert.train.examples import Examples
from fastbert.train.objectives.contrastive import CoSENT, CosineSimilarity, InBatchNegatives
from fastbert.train.objectives.heads import HeadObjective
from fastbert.train.tables import Table
from fastbert.train.tasks.labels import number
from fastbert.train.tasks.task import Task, tokenize
from fastbert.weights import read_json

Tensor = torch.Tensor


class SentenceEncoder(nn.Module):
    """An encoder with its pooling and what follows it: packed texts to vectors. Saved as sentence-transformers does.

    Attributes:
        base_model: the encoder.
        modules_after: applied to the pooled vectors, and trained with the encoder.
    """

    def __init__(self, encoder: EncoderModel, tokenizer: Tokenizer, folder: SentenceFolder) -> None:
        super().__init__()
        self.base_model = encoder
        self.modules_after = folder.modules
        self.pooling = folder.pooling
        self.tokenizer, self.folder = tokenizer, folder

    @property
    def config(self) -> Any:
        """The encoder's configuration."""
        return self.base_model.config

    @property
    def device(self) -> torch.device:
        """Of the first parameter."""
        return self.base_model.device

    def logits(self, encoded: Encoded) -> Tensor:
        """(S, D) vectors: what a head's logits are to other tasks."""
        return self.modules_after(self.pooling(encoded.hidden_TD, encoded.batch.cu_seqlens).float())

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder that `Embedder` and sentence-transformers load."""
        Embedder(self.base_model, self.tokenizer, self.folder).save_pretrained(folder)


@dataclass(frozen=True)
class Embedding(Task):
    """Vectors whose cosine says how much two texts belong together.

    Attributes:
        text_column, text_pair_column: texts that belong together; with a score, any two texts.
        negative_columns: texts that look alike and do not belong to `text_column` (in-batch negatives only).
        label_column: the score of a pair (cosine and cosent only).
        score_range: what cosines of 0 and 1 stand for; None = 0 and 1, or the range of the table if it is wider.
        loss: `in-batch-negatives`: the other pairs of a batch are what a text must not be near to; `cosine`: the cosine
            is the score; `cosent`: cosines are ordered as the scores are.
        scale: of cosines in the softmax of in-batch negatives and cosent.
    """

    name = "embedding"
    pipeline_tag = "sentence-similarity"
    library_name = "sentence-transformers"
    reads_sentence_folder = True
    classes = AutoModel

    text_column: str = "anchor"
    text_pair_column: str = "positive"
    negative_columns: tuple[str, ...] = ()
    label_column: str = "score"
    score_range: tuple[float, float] | None = None
    loss: Literal["in-batch-negatives", "cosine", "cosent"] = "in-batch-negatives"
    scale: float = 20.0

    def __post_init__(self) -> None:
        if self.loss != "in-batch-negatives" and self.negative_columns:
            raise ValueError(f"negative_columns go with the loss in-batch-negatives, not with {self.loss}")

    @property
    def loss_compares_items(self) -> bool:
        """True but for the cosine loss."""
        return self.loss != "cosine"

    def learn(self, table: Table, config: Config) -> Embedding:
        """The range of scores, where the loss asks for one: 0 to 1, or as the table has it."""
        if self.loss == "in-batch-negatives":
            return self
        scores = self._raw_scores(table)
        if scores.min() == scores.max():
            raise CorpusError(f"{table.name}: column {self.label_column!r} holds {scores[0]:g} throughout")
        if self.loss == "cosent" or self.score_range is not None:
            return self
        within = scores.min() >= 0 and scores.max() <= 1
        return replace(self, score_range=(0.0, 1.0) if within else (float(scores.min()), float(scores.max())))

    def tokenizer(self, folder: Path, limit: int, max_length: int | None) -> Tokenizer:
        """As the sentence-transformers folder says."""
        content = read_folder(folder)
        declared = None if content.max_seq_length is None else min(content.max_seq_length, limit)
        length = declared if max_length is None else max_length
        return Tokenizer.from_folder(content.transformer, limit, length, content.do_lower_case)

    def load(self, folder: Path, tokenizer: Tokenizer) -> SentenceEncoder:
        """The encoder, pooling and modules of a sentence-transformers folder; a plain encoder is mean-pooled."""
        content = read_folder(folder)
        family = AutoModel.class_of(read_json(content.transformer / "config.json").get("model_type"))
        options: dict[str, Any] = {"add_pooling_layer": False} if "pooler" in family.head_roots else {}
        return SentenceEncoder(family.from_pretrained(content.transformer, **options), tokenizer, content)

    def examples(self, table: Table, tokenizer: Tokenizer) -> Examples:
        """An item a row, a sequence a text."""
        options = {self.text_column: "text-column", self.text_pair_column: "text-pair-column"}
        options.update(dict.fromkeys(self.negative_columns, "negative-columns"))
        texts = [table.texts(column, option) for column, option in options.items()]
        labels = {} if self.loss == "in-batch-negatives" else {"labels": self._scores(table)}
        ids, _, num_truncated = tokenize(tokenizer, [text for row in zip(*texts, strict=True) for text in row])
        return Examples(ids, None, labels, group=len(texts), num_truncated=num_truncated)

    def _scores(self, table: Table) -> np.ndarray:
        """(N) float32, on 0 to 1 where cosines are to equal them."""
        scores = self._raw_scores(table)
        if self.score_range is not None:
            low, high = self.score_range
            if outside := [i for i, score in enumerate(scores) if not low <= score <= high]:
                raise CorpusError(
                    f"{table.where(outside[0])}: column {self.label_column!r} holds {scores[outside[0]]:g}, outside of "
                    f"the range {low:g} to {high:g} of the training data: name the whole range with --score-range"
                )
            scores = (scores - low) / (high - low)
        return scores.astype(np.float32)

    def _raw_scores(self, table: Table) -> np.ndarray:
        values = table.column(self.label_column, "label-column")
        return np.array([number(value, table.where(i), self.label_column) for i, value in enumerate(values)])

    def objective(self) -> HeadObjective:
        """The loss that was chosen."""
        if self.loss == "in-batch-negatives":
            return InBatchNegatives(scale=self.scale)
        return CoSENT(scale=self.scale) if self.loss == "cosent" else CosineSimilarity()

    def outputs(self, logits: Tensor, batch: TrainBatch) -> Sequence[np.ndarray]:
        """(2, D) unit vectors of each row's first two texts."""
        return list(F.normalize(logits.float()).view(batch.num_items, batch.group, -1)[:, :2].cpu().numpy())

    def metrics(self, examples: Examples, outputs: Sequence[np.ndarray]) -> dict[str, float]:
        """Accuracy@1 and MRR@10 of finding each text's partner among all, or correlations of cosine and score."""
        first, second = np.stack(outputs).swapaxes(0, 1)
        if self.loss == "in-batch-negatives":
            at_1, mrr = metrics.retrieval(first, second)
            return {"accuracy@1": at_1, "mrr@10": mrr}
        cosines, scores = (first * second).sum(1), examples.labels["labels"]
        return {"pearson": metrics.pearson(cosines, scores), "spearman": metrics.spearman(cosines, scores)}
