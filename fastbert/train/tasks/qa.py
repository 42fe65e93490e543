"""Extractive question answering (SQuAD): where in a context the answer stands, or that it does not.

A context that is too long is read in windows that overlap; each window is an item.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tokenizers
import torch

from fastbert.corpus import CorpusError
from fastbert.models.auto import AutoModelForQuestionAnswering
from fastbert.models.config import Config
from fastbert.tokenizer import Tokenizer
from fastbert.train import metrics
from fastbert.train.batch import TrainBatch
from fastbert.train.examples import Examples
from fastbert.train.objectives.heads import QuestionAnswering
from fastbert.train.tables import Table
from fastbert.train.tasks.task import WINDOW, Task, valid

N_BEST = 20  # starts and ends of a window that are combined, as in SQuAD's baseline


@dataclass(frozen=True)
class Question:
    """What metrics need of one question.

    Attributes:
        context: where the answer stands.
        answers: texts that count as right; none where there is no answer.
        windows: places of its items among the examples.
    """

    context: str
    answers: list[str]
    windows: list[int]


@dataclass(frozen=True)
class Answering(Task):
    """The span of a context that answers a question.

    Attributes:
        question_column, context_column: texts.
        answers_column: a mapping with lists `text` and `answer_start` (SQuAD), empty where there is no answer; or
            the answer as a text, whose first place in the context counts.
        doc_stride: tokens that windows of a long context share.
        max_query_length: tokens of a question; the rest is cut.
        max_answer_length: tokens of a predicted answer.
        unanswerable: whether "no answer" may be predicted: learnt from the training table.
    """

    name = "qa"
    pipeline_tag = "question-answering"
    classes = AutoModelForQuestionAnswering

    question_column: str = "question"
    context_column: str = "context"
    answers_column: str = "answers"
    doc_stride: int = 128
    max_query_length: int = 64
    max_answer_length: int = 30
    unanswerable: bool = False

    def learn(self, table: Table, config: Config) -> Answering:
        """Whether there are questions without an answer."""
        return replace(self, unanswerable=any(not texts for texts, _ in self._answers(table)))

    def examples(self, table: Table, tokenizer: Tokenizer) -> Examples:
        """One item a window: first and last token of the answer, 0 (the first token) where it is not in the window."""
        contexts = [valid(text) for text in table.texts(self.context_column, "context-column")]
        questions = self._questions(table, tokenizer)
        answers = self._answers(table)
        backend = self._windowed(tokenizer)
        ids: list[list[int]] = []
        type_ids: list[list[int]] = []
        positions: list[tuple[int, int]] = []
        offsets: list[np.ndarray] = []
        reference: list[Question] = []
        num_truncated = 0
        for start in range(0, len(contexts), WINDOW):
            rows = range(start, min(start + WINDOW, len(contexts)))
            for row, encoding in zip(
                rows, backend.encode_batch([(questions[i], contexts[i]) for i in rows]), strict=True
            ):
                texts, starts = answers[row]
                windows = [encoding, *encoding.overflowing]
                reference.append(Question(contexts[row], texts, list(range(len(ids), len(ids) + len(windows)))))
                num_truncated += len(windows) > 1
                for window in windows:
                    own = _context_offsets(window)
                    span = (starts[0], starts[0] + len(texts[0])) if texts else None
                    ids.append(window.ids)
                    type_ids.append(window.type_ids)
                    offsets.append(own)
                    positions.append(_tokens_of(own, span))
        first, last = np.array(positions, dtype=np.int64).T
        labels = {"start_positions": first, "end_positions": last}
        return Examples(ids, type_ids, labels, num_truncated=num_truncated, reference=(reference, offsets))

    def _questions(self, table: Table, tokenizer: Tokenizer) -> list[str]:
        """Questions cut to `max_query_length` tokens."""
        questions = [valid(text).strip() for text in table.texts(self.question_column, "question-column")]
        backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
        backend.no_truncation()
        encodings = backend.encode_batch(questions, add_special_tokens=False)
        limit = self.max_query_length
        return [
            q if len(e) <= limit else q[: e.offsets[limit - 1][1]] for q, e in zip(questions, encodings, strict=True)
        ]

    def _windowed(self, tokenizer: Tokenizer) -> tokenizers.Tokenizer:
        """The tokenizer that cuts only the context, into windows."""
        room = tokenizer.max_length - self.max_query_length - tokenizer.backend.num_special_tokens_to_add(True)
        if self.doc_stride >= room:
            raise ValueError(
                f"max_length {tokenizer.max_length} leaves {room} tokens for a window of the context beside "
                f"max_query_length {self.max_query_length}, but doc_stride is {self.doc_stride}: it must be smaller"
            )
        backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
        backend.enable_truncation(tokenizer.max_length, stride=self.doc_stride, strategy="only_second")
        return backend

    def _answers(self, table: Table) -> list[tuple[list[str], list[int]]]:
        """(texts, first characters) of each row, checked against the context."""
        contexts = table.texts(self.context_column, "context-column")
        values = table.column(self.answers_column, "answers-column")
        return [_answer(value, contexts[i], table.where(i), self.answers_column) for i, value in enumerate(values)]

    def objective(self) -> QuestionAnswering:
        """Cross-entropy of the first and last token over the tokens of a window."""
        return QuestionAnswering()

    def outputs(self, logits: torch.Tensor, batch: TrainBatch) -> Sequence[np.ndarray]:
        """(length, 2) scores of each window."""
        return [window.float().cpu().numpy() for window in batch.packed.split(logits)]

    def metrics(self, examples: Examples, outputs: Sequence[np.ndarray]) -> dict[str, float]:
        """Exact match and F1 of words over the questions, the best of each one's windows."""
        questions, offsets = examples.reference
        exact, f1 = [], []
        for question in questions:
            answer = self.answer(question, offsets, outputs)
            exact.append(metrics.exact_match(answer, question.answers))
            f1.append(metrics.word_f1(answer, question.answers))
        return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(f1))}

    def answer(self, question: Question, offsets: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> str:
        """The best span of a question's context; "" where the first token scores higher (Devlin et al., sec. 4.3)."""
        best, none, text = -np.inf, np.inf, ""
        for window in question.windows:
            scores, own = outputs[window], offsets[window]
            none = min(none, float(scores[0].sum()))
            score, first, last = self._best_span(scores, own)
            if score > best:
                best, text = score, question.context[own[first, 0] : own[last, 1]]
        return "" if self.unanswerable and none >= best else text

    def _best_span(self, scores: np.ndarray, offsets: np.ndarray) -> tuple[float, int, int]:
        """(score, first token, last token) of the best span that lies in the context."""
        tokens = np.flatnonzero(offsets[:, 0] >= 0)
        if not len(tokens):
            return -np.inf, 0, 0
        starts, ends = (tokens[np.argsort(-scores[tokens, k], kind="stable")[:N_BEST]] for k in (0, 1))
        lengths = ends[None] - starts[:, None] + 1
        total = scores[starts, 0][:, None] + scores[ends, 1][None]
        total = np.where((lengths >= 1) & (lengths <= self.max_answer_length), total, -np.inf)
        i, j = np.unravel_index(total.argmax(), total.shape)
        return float(total[i, j]), int(starts[i]), int(ends[j])


def _context_offsets(window: Any) -> np.ndarray:
    """(length, 2) first and past-last character in the context of each token; -1 where it is not of the context."""
    pairs = zip(window.offsets, window.sequence_ids, strict=True)
    return np.array([span if part == 1 else (-1, -1) for span, part in pairs], dtype=np.int64).reshape(-1, 2)


def _tokens_of(offsets: np.ndarray, span: tuple[int, int] | None) -> tuple[int, int]:
    """First and last token that touch a span of characters; (0, 0) where the window does not hold it whole."""
    context = np.flatnonzero(offsets[:, 0] >= 0)
    if span is None or not len(context):
        return 0, 0
    if offsets[context[0], 0] > span[0] or offsets[context[-1], 1] < span[1]:
        return 0, 0
    inside = context[(offsets[context, 1] > span[0]) & (offsets[context, 0] < span[1])]
    return (int(inside[0]), int(inside[-1])) if len(inside) else (0, 0)


def _answer(value: Any, context: str, where: str, column: str) -> tuple[list[str], list[int]]:
    """(texts, first characters) of one cell.

    Raises:
        CorpusError: a cell of another form, or an answer that does not stand where it is said to.
    """
    if value is None or value == "":
        return [], []
    if isinstance(value, str):
        start = context.find(value)
        if start < 0:
            raise CorpusError(f"{where}: the answer {value!r:.80} does not occur in its context")
        return [value], [start]
    if not isinstance(value, Mapping) or not {"text", "answer_start"} <= set(value):
        raise CorpusError(
            f"{where}: column {column!r} holds {value!r:.80}: a text, or a mapping with lists 'text' and "
            "'answer_start', is needed"
        )
    texts, starts = [str(text) for text in value["text"]], [int(start) for start in value["answer_start"]]
    for text, start in zip(texts, starts, strict=True):
        if context[start : start + len(text)] != text:
            found = context[start : start + len(text)]
            raise CorpusError(
                f"{where}: the answer {text!r:.80} should begin at character {start}, there is {found!r:.80}"
            )
    return texts, starts
