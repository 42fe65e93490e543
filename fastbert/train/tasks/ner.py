"""Labels of words: entities (CoNLL-2003), parts of speech."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tokenizers import pre_tokenizers

from fastbert.corpus import CorpusError
from fastbert.models.auto import AutoModelForTokenClassification
from fastbert.models.config import Config
from fastbert.tokenizer import Tokenizer
from fastbert.train import metrics
from fastbert.train.batch import TrainBatch
from fastbert.train.examples import Examples
from fastbert.train.objectives.heads import TokenClassification
from fastbert.train.tables import Table
from fastbert.train.tasks.labels import at_least_two, choose_names, unknown_label
from fastbert.train.tasks.task import WINDOW, Task, valid

IGNORED = -100
OUTSIDE = "O"


@dataclass(frozen=True)
class WordLabels:
    """What metrics need of one sentence.

    Attributes:
        tags: one a word.
        pieces: place of each word's first piece in the sequence; -1 where it has none: cut off, or nothing but
            characters that the tokenizer drops.
    """

    tags: list[str]
    pieces: list[int]


@dataclass(frozen=True)
class WordTagging(Task):
    """One label a word; its first piece bears it.

    Attributes:
        words_column: lists of words, or texts whose words are parted by spaces.
        tags_column: lists of tags, or texts in the same way.
        labels: names in order of their ids; None = learnt from the training table.
        label_all_pieces: train on every piece of a word, not only on the first.
    """

    name = "ner"
    pipeline_tag = "token-classification"
    classes = AutoModelForTokenClassification

    words_column: str = "words"
    tags_column: str = "tags"
    labels: tuple[str, ...] | None = None
    label_all_pieces: bool = False

    def learn(self, table: Table, config: Config) -> WordTagging:
        """Names of the tags."""
        found = {tag for tags in self._rows(table)[1] for tag in tags}
        names = choose_names(found, self.labels, table, self.tags_column, config)
        at_least_two(names, table, self.tags_column)
        return replace(self, labels=names)

    def configure(self, config: Config) -> Config:
        """Names of the tags."""
        names = dict(enumerate(self.labels or ()))
        return config.replace(id2label=names, label2id={n: i for i, n in names.items()})

    def tokenizer(self, folder: Path, limit: int, max_length: int | None) -> Tokenizer:
        """Byte-level tokenizers tell words by the space before them: the first word gets one, too."""
        tokenizer = super().tokenizer(folder, limit, max_length)
        content = json.loads(tokenizer.backend.to_str())
        step = content.get("pre_tokenizer") or {}
        if step.get("type") != "ByteLevel" or step.get("add_prefix_space"):
            return tokenizer
        backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=True, trim_offsets=step["trim_offsets"], use_regex=step["use_regex"]
        )
        return Tokenizer(backend, tokenizer.max_length, {**tokenizer.config, "add_prefix_space": True})

    def examples(self, table: Table, tokenizer: Tokenizer) -> Examples:
        """One sequence a sentence; labels -100 where a piece bears none."""
        rows, tags = self._rows(table)
        words = [[valid(word) for word in row] for row in rows]
        labels = self.labels or ()
        ids_of = {name: i for i, name in enumerate(labels)}
        ids: list[list[int]] = []
        token_labels: list[list[int]] = []
        reference: list[WordLabels] = []
        num_truncated = 0
        for start in range(0, len(words), WINDOW):
            for encoding in tokenizer.backend.encode_batch(words[start : start + WINDOW], is_pretokenized=True):
                row = len(ids)
                for tag in tags[row]:
                    if tag not in ids_of:
                        raise unknown_label(tag, labels, table.where(row), self.tags_column)
                pieces = [-1] * len(tags[row])
                own = [IGNORED] * len(encoding.ids)
                for place, word in enumerate(encoding.word_ids):
                    if word is None:
                        continue
                    if pieces[word] == -1:
                        pieces[word] = place
                    if pieces[word] == place or self.label_all_pieces:
                        own[place] = ids_of[tags[row][word]]
                ids.append(encoding.ids)
                token_labels.append(own)
                reference.append(WordLabels(tags[row], pieces))
                num_truncated += bool(encoding.overflowing)
        return Examples(ids, None, None, {"labels": token_labels}, num_truncated=num_truncated, reference=reference)

    def _rows(self, table: Table) -> tuple[list[list[str]], list[list[str]]]:
        """Words and tags of the sentences, entities in IOB2."""
        words = _lists(table, self.words_column, "words-column")
        tags = _lists(table, self.tags_column, "tags-column")
        for i, (own, theirs) in enumerate(zip(words, tags, strict=True)):
            if len(own) != len(theirs):
                raise CorpusError(f"{table.where(i)}: {len(own)} words but {len(theirs)} tags")
        iob2 = [metrics.to_iob2(row) for row in tags]
        if changed := sum(a != b for a, b in zip(tags, iob2, strict=True)):
            warnings.warn(
                f"{table.name}: {changed} sentences have entities that do not begin with B-: read as IOB2", stacklevel=2
            )
        return words, iob2

    def objective(self) -> TokenClassification:
        """Cross-entropy of the labelled pieces."""
        return TokenClassification()

    def outputs(self, logits: torch.Tensor, batch: TrainBatch) -> Sequence[np.ndarray]:
        """The best label of every piece."""
        return [row.cpu().numpy() for row in batch.packed.split(logits.argmax(-1))]

    def metrics(self, examples: Examples, outputs: Sequence[np.ndarray]) -> dict[str, float]:
        """Accuracy of words; of whole entities precision, recall and F1; macro F1 where labels are no entities.

        A word without a piece (cut off) counts as predicted outside of any entity: wrong, where it has a label.
        """
        labels = self.labels or ()
        ids_of = {name: i for i, name in enumerate(labels)}
        none = ids_of.get(OUTSIDE, -1)
        predicted = [
            [int(best[place]) if place >= 0 else none for place in words.pieces]
            for words, best in zip(examples.reference, outputs, strict=True)
        ]
        gold = [[ids_of[tag] for tag in words.tags] for words in examples.reference]
        flat, right = np.array([t for row in predicted for t in row]), np.array([t for row in gold for t in row])
        found = {"accuracy": metrics.accuracy(flat, right)}
        if not metrics.is_iob2(labels):
            return {**found, "f1": metrics.f1_macro(flat, right)}
        names = [[labels[t] for t in row] for row in predicted]
        return {**found, **metrics.entity_scores(names, [words.tags for words in examples.reference])}


def _lists(table: Table, column: str, option: str) -> list[list[str]]:
    rows = []
    for i, value in enumerate(table.column(column, option)):
        row = value.split() if isinstance(value, str) else value
        if not isinstance(row, Sequence) or not all(isinstance(one, str) for one in row):
            raise CorpusError(
                f"{table.where(i)}: column {column!r} holds {value!r:.80}: a list of strings is needed, one a word"
            )
        rows.append(list(row))
    return rows
