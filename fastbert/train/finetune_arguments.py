"""FinetuneArguments: what a training run is told, and columns and settings of the tasks of fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from fastbert.train.arguments import TrainArguments
from fastbert.train.options import option

# As `fastbert.train.tasks.TASKS` has them; here because the command line says them without loading torch.
TASK_NAMES = ("classification", "regression", "multi-label", "pair", "ner", "qa", "multiple-choice", "embedding")


@dataclass(kw_only=True, frozen=True)
class FinetuneArguments(TrainArguments):
    """What a fine-tuning run is told. The defaults of the optimiser are those of BERT's paper (Devlin et al., A.3).

    A column or setting that is None has the default of the task: see `fastbert.train.tasks`.
    """

    learning_rate: float = option(2e-5, "Optimiser", "Peak learning rate.", "--lr")
    weight_decay: float = option(0.01, "Optimiser", "Decoupled; biases and layer norms are left out.")
    warmup_steps: float = option(0.1, "Optimiser", "Steps in which the rate rises; below 1, a share of the run.")

    max_length: int | None = option(None, "Data", "Tokens a sequence, special ones included; None = the tokenizer's.")
    column_names: tuple[str, ...] | None = option(
        None, "Data", "Names of the columns of CSV and TSV files without a header, as a,b,c."
    )

    text_column: str | None = option(None, "Columns", "Text (embedding: the anchor; multiple-choice: the context).")
    text_pair_column: str | None = option(None, "Columns", "Second text of a pair (embedding: the positive).")
    label_column: str | None = option(None, "Columns", "Class, number, classes, or place of the right choice.")
    label_columns: tuple[str, ...] | None = option(None, "Columns", "multi-label: columns of 0 and 1, as a,b,c.")
    words_column: str | None = option(None, "Columns", "ner: words of a sentence.")
    tags_column: str | None = option(None, "Columns", "ner: their tags.")
    question_column: str | None = option(None, "Columns", "qa: the question.")
    context_column: str | None = option(None, "Columns", "qa: where the answer stands.")
    answers_column: str | None = option(None, "Columns", "qa: the answer.")
    choices_columns: tuple[str, ...] | None = option(
        None, "Columns", "multiple-choice: one column a choice, as a,b,c, or one of lists."
    )
    negative_columns: tuple[str, ...] | None = option(None, "Columns", "embedding: hard negatives, as a,b.")

    labels: tuple[str, ...] | None = option(
        None, "Task", "Names of labels in order of their ids; None = as found in the training data."
    )
    label_separator: str | None = option(None, "Task", "multi-label: between the names in a cell (,).")
    label_all_pieces: bool | None = option(None, "Task", "ner: train on all pieces of a word, not on the first only.")
    doc_stride: int | None = option(None, "Task", "qa: tokens that windows of a long context share (128).")
    max_query_length: int | None = option(None, "Task", "qa: tokens of a question (64).")
    max_answer_length: int | None = option(None, "Task", "qa: tokens of a predicted answer (30).")
    loss: Literal["in-batch-negatives", "cosine", "cosent"] | None = option(None, "Task", "embedding: the loss.")
    score_range: tuple[float, ...] | None = option(None, "Task", "embedding, cosine: least and greatest score, as 0,5.")
    scale: float | None = option(None, "Task", "embedding: of cosines in the softmax (20).")

    @property
    def of_task(self) -> dict[str, Any]:
        """What was said of columns and settings of the task: name -> value."""
        names = [f.name for f in fields(self) if f.metadata["panel"] in ("Columns", "Task")]
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_length", "max_query_length", "max_answer_length"):
            self._require(name, lambda v: v >= 1, "1 or more")
        self._require("doc_stride", lambda v: v >= 0, "0 or more")
        self._require("scale", lambda v: v > 0, "above 0")
        self._require("score_range", lambda v: len(v) == 2 and v[0] < v[1], "two numbers, the smaller first")
