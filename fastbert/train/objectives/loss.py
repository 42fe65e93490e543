"""What every objective is: labels made on the device, losses as sums, and the number of units each is averaged over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastbert.train.batch import TrainBatch
from fastbert.train.masking import IGNORED

Tensor = torch.Tensor


@dataclass(frozen=True)
class Loss:
    """What an objective makes of a batch: sums, so that batches can be added before anything is divided.

    Attributes:
        sums: term -> scalar sum over its units, with graph; fp32 or wider.
        metrics: name -> (sum, count), scalars without graph; the metric is sum / count over everything seen.
    """

    sums: dict[str, Tensor]
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Objective:
    """(model, batch) -> loss, metrics.

    It keeps no state between calls: what it draws is a pure function of its seed and of the batch's epoch and index.

    Attributes:
        weights: term -> weight in the total.
        token_fields: label fields of a dataset that have one value a token.
    """

    weights: Mapping[str, float]
    token_fields: frozenset[str] = frozenset()

    def prepare(self, batch: TrainBatch) -> TrainBatch:
        """The batch with the labels that the objective makes itself, on the batch's device; no forward pass."""
        return batch

    def counts(self, batch: TrainBatch) -> dict[str, Tensor]:
        """Of a prepared batch: term -> units (scalar int64) that its sum is over."""
        raise NotImplementedError

    def loss(self, model: Any, batch: TrainBatch) -> Loss:
        """Of a prepared batch."""
        raise NotImplementedError

    def __call__(self, model: Any, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The averaged loss of one batch, with graph, and its metrics."""
        batch = self.prepare(batch)
        loss = self.loss(model, batch)
        metrics = {name: total / count.clamp(min=1) for name, (total, count) in loss.metrics.items()}
        return self.average(loss.sums, self.counts(batch)), metrics

    def average(self, sums: Mapping[str, Tensor], counts: Mapping[str, Tensor]) -> Tensor:
        """sum over terms of weight * sum / count; a term without a unit is 0."""
        terms = [self.weights[name] * total / counts[name].clamp(min=1) for name, total in sums.items()]
        return torch.stack(terms).sum()

    def label(self, batch: TrainBatch, name: str) -> Tensor:
        """A label field of the batch.

        Raises:
            ValueError: the dataset's items have no such field.
        """
        if name not in batch.labels:
            raise ValueError(
                f"{type(self).__name__} needs the label field {name!r}, but the items have "
                f"{', '.join(sorted(batch.labels)) or 'no label fields'}"
            )
        return batch.labels[name]


def encode(model: Any, batch: TrainBatch) -> Any:
    """What the heads' `logits` start from."""
    return model.base_model.encode_packed(batch.packed)


def num_labelled(labels: Tensor) -> Tensor:
    """How many labels count (scalar int64)."""
    return (labels != IGNORED).sum()


def scalar(number: int, like: Tensor) -> Tensor:
    """A scalar int64 on the device of another tensor."""
    return torch.full((), number, dtype=torch.int64, device=like.device)


def accuracy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(number right, number labelled) of (N, K) logits and (N) labels."""
    right = (logits.detach().argmax(-1) == labels).sum()
    return right, num_labelled(labels)


def wide(x: Tensor) -> Tensor:
    """In fp32, or fp64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
