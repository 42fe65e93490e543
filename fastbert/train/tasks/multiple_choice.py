"""Multiple choice (SWAG): which of several continuations or answers is the right one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastbert.corpus import CorpusError
from fastbert.models.auto import AutoModelForMultipleChoice
from fastbert.tokenizer import Tokenizer
from fastbert.train import metrics
from fastbert.train.batch import TrainBatch
from fastbert.train.examples import Examples
from fastbert.train.objectives.heads import MultipleChoice
from fastbert.train.tables import Table
from fastbert.train.tasks.labels import label_name
from fastbert.train.tasks.task import Task, tokenize


@dataclass(frozen=True)
class Choosing(Task):
    """The right one of the choices of a row; each is read as a pair with the text.

    Attributes:
        text_column: context or question.
        choices_columns: one column a choice; or one column of lists.
        label_column: place of the right choice, from 0.
    """

    name = "multiple-choice"
    pipeline_tag = "multiple-choice"
    classes = AutoModelForMultipleChoice

    text_column: str = "text"
    choices_columns: tuple[str, ...] = ("choices",)
    label_column: str = "label"

    def examples(self, table: Table, tokenizer: Tokenizer) -> Examples:
        """An item a row, a sequence a choice."""
        texts, choices = table.texts(self.text_column, "text-column"), self._choices(table)
        labels = [self._label(table, i, len(choices[0])) for i in range(len(table))]
        pairs = [(text, choice) for text, row in zip(texts, choices, strict=True) for choice in row]
        ids, type_ids, num_truncated = tokenize(tokenizer, pairs)
        return Examples(ids, type_ids, {"labels": np.array(labels)}, group=len(choices[0]), num_truncated=num_truncated)

    def _choices(self, table: Table) -> list[list[str]]:
        if len(self.choices_columns) > 1:
            columns = [table.texts(column, "choices-columns") for column in self.choices_columns]
            return [list(row) for row in zip(*columns, strict=True)]
        (column,) = self.choices_columns
        rows = table.column(column, "choices-columns")
        for i, row in enumerate(rows):
            if isinstance(row, str) or not isinstance(row, Sequence) or not all(isinstance(one, str) for one in row):
                raise CorpusError(
                    f"{table.where(i)}: column {column!r} holds {row!r:.80}: a list of texts is needed, or name one "
                    "column a choice with --choices-columns a,b,c"
                )
            if len(row) != len(rows[0]) or len(row) < 2:
                raise CorpusError(
                    f"{table.where(i)}: {len(row)} choices but row 1 has {len(rows[0])}: all rows need the same "
                    "number, 2 or more"
                )
        return [list(row) for row in rows]

    def _label(self, table: Table, row: int, num_choices: int) -> int:
        value = table.column(self.label_column, "label-column")[row]
        name = label_name(value, table.where(row), self.label_column)
        if not name.isdecimal() or int(name) >= num_choices:
            raise CorpusError(
                f"{table.where(row)}: column {self.label_column!r} holds {value!r}, but the right choice is a number "
                f"from 0 to {num_choices - 1}"
            )
        return int(name)

    def objective(self) -> MultipleChoice:
        """Cross-entropy over the choices of a row."""
        return MultipleChoice()

    def outputs(self, logits: torch.Tensor, batch: TrainBatch) -> Sequence[np.ndarray]:
        """(choices) scores of each row."""
        return list(logits.view(-1, batch.group).float().cpu().numpy())

    def metrics(self, examples: Examples, outputs: Sequence[np.ndarray]) -> dict[str, float]:
        """Accuracy."""
        return {"accuracy": metrics.accuracy(np.stack(outputs).argmax(1), examples.labels["labels"])}
