"""What fine-tuning minimises: the losses of the task heads (`fastbert.models.heads`) on packed logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastbert.models.heads import classification_loss, problem_type
from fastbert.ops import cross_entropy
from fastbert.train.batch import TrainBatch
from fastbert.train.draws import Places
from fastbert.train.objectives.loss import Loss, Objective, accuracy, encode, num_labelled, scalar, wide

Tensor = torch.Tensor


class HeadObjective(Objective):
    """The loss of a head's logits; whoever has logits already, as an evaluation has, asks `of_logits`."""

    def loss(self, model: Any, batch: TrainBatch) -> Loss:
        """Of a batch: encoder, head, loss."""
        return self.of_logits(model, model.logits(encode(model, batch)), batch)

    def of_logits(self, model: Any, logits: Tensor, batch: TrainBatch) -> Loss:
        """Of the logits that `model` gave for a batch."""
        raise NotImplementedError


class SequenceClassification(HeadObjective):
    """`labels` of items: (N) int64 classes, or float32 numbers, (N) or (N, K), for regression and multi-label.

    Which loss it is the model's configuration says; floats are averaged over all N * K of them, as Hugging Face does.
    """

    weights: Mapping[str, float] = {"classification": 1.0}

    def counts(self, batch: TrainBatch) -> dict[str, Tensor]:
        """Labels."""
        labels = self.label(batch, "labels")
        return {
            "classification": scalar(labels.numel(), labels) if labels.is_floating_point() else num_labelled(labels)
        }

    def of_logits(self, model: Any, logits: Tensor, batch: TrainBatch) -> Loss:
        """Sum of the losses; accuracy (multi-label: of single labels, at a probability of 1/2).

        Raises:
            ValueError: labels whose type or shape does not fit the model's `problem_type`.
        """
        labels = self.label(batch, "labels")
        kind = model.config.problem_type or problem_type(logits, labels)
        if (kind == "single_label_classification") == labels.is_floating_point():
            raise ValueError(
                f"the model's task is {kind} but the labels are {labels.dtype}: classes are ints, all else floats"
            )
        if kind == "single_label_classification":
            loss = classification_loss(logits, labels, kind, reduction="sum")
            return Loss({"classification": loss}, {"accuracy": accuracy(logits, labels)})
        scores = wide(logits)
        loss = classification_loss(scores, labels.to(scores.dtype), kind, reduction="sum")
        if kind == "regression":
            return Loss({"classification": loss})
        right = ((scores.detach() > 0) == (labels > 0.5)).sum()
        return Loss({"classification": loss}, {"accuracy": (right, scalar(labels.numel(), labels))})


class TokenClassification(HeadObjective):
    """`labels` of tokens (T): classes, -100 = none."""

    weights: Mapping[str, float] = {"classification": 1.0}
    token_fields = frozenset({"labels"})

    def counts(self, batch: TrainBatch) -> dict[str, Tensor]:
        """Labelled tokens."""
        return {"classification": num_labelled(self.label(batch, "labels"))}

    def of_logits(self, model: Any, logits: Tensor, batch: TrainBatch) -> Loss:
        """Sum of the cross-entropies; accuracy of tokens."""
        labels = self.label(batch, "labels")
        loss = cross_entropy(logits, labels, reduction="sum")
        return Loss({"classification": loss}, {"accuracy": accuracy(logits, labels)})


class QuestionAnswering(HeadObjective):
    """`start_positions` and `end_positions` of items (N): tokens from 0, in a softmax over the item's own tokens.

    Positions past the end do not count, negative ones mean 0: as in `fastbert.models.heads`.
    """

    weights: Mapping[str, float] = {"start": 0.5, "end": 0.5}

    def counts(self, batch: TrainBatch) -> dict[str, Tensor]:
        """Positions that lie in their sequences."""
        return {name: self._inside(batch, name).sum() for name in self.weights}

    def of_logits(self, model: Any, logits: Tensor, batch: TrainBatch) -> Loss:
        """Sums of the cross-entropies of starts and ends; accuracy of both."""
        sums, metrics = {}, {}
        for name, scores in zip(("start", "end"), wide(logits).unbind(-1), strict=True):
            inside, position = self._inside(batch, name), self._positions(batch, name)
            first = batch.packed.cu_seqlens[:-1].long()
            answer = (first + position.minimum((batch.packed.lengths - 1).clamp(min=0))).clamp(max=scores.shape[0] - 1)
            top, lse = _max_and_logsumexp(scores, batch)
            sums[name] = torch.where(inside, lse - scores[answer], 0.0).sum()
            metrics[f"{name}_accuracy"] = ((inside & (scores.detach()[answer] >= top)).sum(), inside.sum())
        return Loss(sums, metrics)

    def _positions(self, batch: TrainBatch, name: str) -> Tensor:
        return self.label(batch, f"{name}_positions").clamp(min=0)

    def _inside(self, batch: TrainBatch, name: str) -> Tensor:
        return self._positions(batch, name) < batch.packed.lengths


def _max_and_logsumexp(scores: Tensor, batch: TrainBatch) -> tuple[Tensor, Tensor]:
    """(S), (S) of (T) scores, over the tokens of each sequence; the first without graph."""
    sequence = Places.of(batch.packed).sequence
    blank = scores.new_zeros(batch.packed.num_sequences)
    top = blank.scatter_reduce(0, sequence, scores.detach(), "amax", include_self=False)
    total = blank.index_add(0, sequence, (scores - top[sequence]).exp())
    return top, top + total.log()


class MultipleChoice(HeadObjective):
    """`labels` of items (N): which of the item's sequences is the right one."""

    weights: Mapping[str, float] = {"choice": 1.0}

    def counts(self, batch: TrainBatch) -> dict[str, Tensor]:
        """Items."""
        return {"choice": num_labelled(self.label(batch, "labels"))}

    def of_logits(self, model: Any, logits: Tensor, batch: TrainBatch) -> Loss:
        """Sum of the cross-entropies over choices; accuracy."""
        labels, scores = self.label(batch, "labels"), logits.view(batch.num_items, batch.group)
        loss = cross_entropy(scores, labels, reduction="sum")
        return Loss({"choice": loss}, {"accuracy": accuracy(scores, labels)})
