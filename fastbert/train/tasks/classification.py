"""Tasks with one answer a text, or a pair of texts: a class, several classes, a number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import numpy as np

from fastbert.corpus import CorpusError
from fastbert.models.auto import AutoModelForSequenceClassification
from fastbert.models.config import Config
from fastbert.tokenizer import Text, Tokenizer
from fastbert.train import metrics
from fastbert.train.examples import Examples
from fastbert.train.objectives.heads import SequenceClassification
from fastbert.train.tables import Table
from fastbert.train.tasks.labels import at_least_two, choose_names, label_ids, label_names, number, unknown_label
from fastbert.train.tasks.task import Task, tokenize

C = TypeVar("C", bound="TextTask")


@dataclass(frozen=True)
class TextTask(Task):
    """What these tasks share: the columns of texts, the head, the objective.

    Attributes:
        text_column, text_pair_column: the text, and the second one where texts come in pairs.
        label_column: the answer.
        labels: names in order of their ids; None = learnt from the training table.
    """

    classes = AutoModelForSequenceClassification
    pipeline_tag = "text-classification"
    problem_type: ClassVar[str]

    text_column: str = "text"
    text_pair_column: str | None = None
    label_column: str = "label"
    labels: tuple[str, ...] | None = None

    def texts(self, table: Table) -> list[Text]:
        """Texts, or pairs of them."""
        first = table.texts(self.text_column, "text-column")
        if self.text_pair_column is None:
            return list(first)
        return list(zip(first, table.texts(self.text_pair_column, "text-pair-column"), strict=True))

    def targets(self, table: Table) -> np.ndarray:
        """Labels of the rows as the objective wants them."""
        raise NotImplementedError

    def configure(self, config: Config) -> Config:
        """Names of labels and the kind of problem."""
        names = dict(enumerate(self.labels or ()))
        return config.replace(id2label=names, label2id={n: i for i, n in names.items()}, problem_type=self.problem_type)

    def examples(self, table: Table, tokenizer: Tokenizer) -> Examples:
        """One sequence a row."""
        targets = self.targets(table)
        ids, type_ids, num_truncated = tokenize(tokenizer, self.texts(table))
        return Examples(ids, type_ids, {"labels": targets}, num_truncated=num_truncated)

    def objective(self) -> SequenceClassification:
        """Cross-entropy, or what the kind of problem asks for."""
        return SequenceClassification()


@dataclass(frozen=True)
class Classification(TextTask):
    """One class a text or pair."""

    name = "classification"
    problem_type = "single_label_classification"

    def learn(self: C, table: Table, config: Config) -> C:
        """Names of the classes."""
        found = label_names(table, self.label_column)
        names = choose_names(found, self.labels, table, self.label_column, config)
        at_least_two(names, table, self.label_column)
        return replace(self, labels=names)

    def targets(self, table: Table) -> np.ndarray:
        """(N) int64."""
        return label_ids(label_names(table, self.label_column), self.labels or (), table, self.label_column)

    def metrics(self, examples: Examples, outputs: Sequence[np.ndarray]) -> dict[str, float]:
        """Accuracy, F1 (of class 1 where there are two, macro), Matthews correlation."""
        predicted, gold = np.stack(outputs).argmax(1), examples.labels["labels"]
        found = {"accuracy": metrics.accuracy(predicted, gold), "f1_macro": metrics.f1_macro(predicted, gold)}
        if len(self.labels or ()) == 2:
            found["f1"] = metrics.f1_binary(predicted, gold)
        return {**found, "matthews": metrics.matthews(predicted, gold)}


@dataclass(frozen=True)
class Pair(Classification):
    """One class a pair of texts: paraphrase, entailment."""

    name = "pair"

    text_pair_column: str | None = "text_pair"


@dataclass(frozen=True)
class Regression(TextTask):
    """One number a text or pair."""

    name = "regression"
    problem_type = "regression"

    def configure(self, config: Config) -> Config:
        """One output, which the label column names."""
        name = self.label_column
        return config.replace(id2label={0: name}, label2id={name: 0}, problem_type=self.problem_type)

    def targets(self, table: Table) -> np.ndarray:
        """(N) float32."""
        values = table.column(self.label_column, "label-column")
        numbers = [number(value, table.where(i), self.label_column) for i, value in enumerate(values)]
        return np.array(numbers, dtype=np.float32)

    def metrics(self, examples: Examples, outputs: Sequence[np.ndarray]) -> dict[str, float]:
        """Mean squared error, Pearson and Spearman correlation."""
        predicted, gold = np.stack(outputs)[:, 0], examples.labels["labels"]
        return {
            "mse": float(np.square(predicted.astype(np.float64) - gold).mean()),
            "pearson": metrics.pearson(predicted, gold),
            "spearman": metrics.spearman(predicted, gold),
        }


@dataclass(frozen=True)
class MultiLabel(TextTask):
    """Any number of classes a text or pair: a list of names a row, or one column of 0 and 1 a class.

    Attributes:
        label_columns: the columns of 0 and 1; None = `label_column` holds lists, or names with a separator.
        label_separator: between the names of a cell of text.
    """

    name = "multi-label"
    problem_type = "multi_label_classification"

    label_columns: tuple[str, ...] | None = None
    label_separator: str = ","

    def learn(self: C, table: Table, config: Config) -> C:
        """Names of the classes."""
        assert isinstance(self, MultiLabel)
        if self.label_columns is not None:
            for column in self.label_columns:
                table.column(column, "label-columns")
            return replace(self, labels=self.label_columns)
        found = {name for row in self._lists(table) for name in row}
        names = choose_names(found, self.labels, table, self.label_column, config)
        if not names:
            raise CorpusError(f"{table.name}: no row has a label in column {self.label_column!r}")
        return replace(self, labels=names)

    def targets(self, table: Table) -> np.ndarray:
        """(N, K) float32 of 0 and 1."""
        labels = self.labels or ()
        if self.label_columns is not None:
            return np.stack([self._flags(table, column) for column in self.label_columns], axis=1)
        ids = {name: i for i, name in enumerate(labels)}
        out = np.zeros((len(table), len(labels)), dtype=np.float32)
        for i, names in enumerate(self._lists(table)):
            for name in names:
                if name not in ids:
                    raise unknown_label(name, labels, table.where(i), self.label_column)
                out[i, ids[name]] = 1.0
        return out

    def _lists(self, table: Table) -> list[list[str]]:
        rows = []
        for i, value in enumerate(table.column(self.label_column, "label-column")):
            if isinstance(value, str):
                value = [name.strip() for name in value.split(self.label_separator) if name.strip()]
            elif not isinstance(value, Sequence):
                raise CorpusError(
                    f"{table.where(i)}: column {self.label_column!r} holds {value!r}: a list of labels is needed, or "
                    f"their names with {self.label_separator!r} between; for columns of 0 and 1 use --label-columns"
                )
            rows.append([str(name) for name in value])
        return rows

    def _flags(self, table: Table, column: str) -> np.ndarray:
        values = table.column(column, "label-columns")
        flags = np.array([number(value, table.where(i), column) for i, value in enumerate(values)], dtype=np.float32)
        if wrong := [i for i, flag in enumerate(flags) if flag not in (0.0, 1.0)]:
            raise CorpusError(f"{table.where(wrong[0])}: column {column!r} holds {values[wrong[0]]!r}, not 0 or 1")
        return flags

    def metrics(self, examples: Examples, outputs: Sequence[np.ndarray]) -> dict[str, float]:
        """F1 micro and macro, and accuracy (all labels of a row right), at a probability of 0.5."""
        predicted, gold = np.stack(outputs) > 0, examples.labels["labels"] > 0.5
        micro, macro = metrics.f1_columns(predicted, gold)
        return {"f1_micro": micro, "f1_macro": macro, "accuracy": metrics.accuracy(predicted, gold)}
