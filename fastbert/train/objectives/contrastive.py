"""Losses on the vectors of texts (Reimers & Gurevych 2019, arXiv 1908.10084): what belongs together shall lie together.

The model has `base_model` and `logits(encoded)` -> (S, D) vectors. In-batch negatives and CoSENT compare the items of
one forward pass with each other: with them, micro-batches and ranks see fewer pairs than one big batch would.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from fastbert.ops import cross_entropy
from fastbert.train.batch import TrainBatch
from fastbert.train.objectives.heads import HeadObjective
from fastbert.train.objectives.loss import Loss, accuracy, scalar, wide

Tensor = torch.Tensor


def _vectors(logits: Tensor, batch: TrainBatch, name: str, least: int) -> Tensor:
    """(group, N, D) of length 1: the anchors, then what each is compared with."""
    if batch.group < least:
        raise ValueError(f"{name} needs {least} sequences an item, but the items have {batch.group}")
    return F.normalize(wide(logits), dim=-1).view(batch.num_items, batch.group, -1).transpose(0, 1)


class InBatchNegatives(HeadObjective):
    """-log softmax of scale * cosine(anchor, its positive) among all positives and negatives of the forward pass.

    Multiple negatives ranking (Henderson et al. 2017, arXiv 1705.00652, sec. 4.4). An item is (anchor, positive) and
    any number of hard negatives.

    Args:
        scale: of the cosines; 1 / temperature.
    """

    weights: Mapping[str, float] = {"ranking": 1.0}

    def __init__(self, scale: float = 20.0) -> None:
        self.scale = scale

    def counts(self, batch: TrainBatch) -> dict[str, Tensor]:
        """Items."""
        return {"ranking": scalar(batch.num_items, batch.index)}

    def of_logits(self, model: Any, logits: Tensor, batch: TrainBatch) -> Loss:
        """Sum of the cross-entropies; accuracy: how often the own positive is the nearest."""
        anchors, *others = _vectors(logits, batch, "in-batch negatives", 2)
        scores = self.scale * anchors @ torch.cat(others).T
        own = torch.arange(batch.num_items, device=scores.device)
        return Loss({"ranking": cross_entropy(scores, own, reduction="sum")}, {"accuracy": accuracy(scores, own)})


class CosineSimilarity(HeadObjective):
    """(cosine(a, b) - label)^2 of items (a, b) with `labels` (N) float32."""

    weights: Mapping[str, float] = {"cosine": 1.0}

    def counts(self, batch: TrainBatch) -> dict[str, Tensor]:
        """Items."""
        return {"cosine": scalar(batch.num_items, batch.index)}

    def of_logits(self, model: Any, logits: Tensor, batch: TrainBatch) -> Loss:
        """Sum of the squared errors."""
        a, b = _vectors(logits, batch, "cosine similarity", 2)[:2]
        cosines = (a * b).sum(-1)
        return Loss({"cosine": F.mse_loss(cosines, self.label(batch, "labels").to(cosines.dtype), reduction="sum")})


class CoSENT(HeadObjective):
    """log(1 + sum of exp(scale * (cosine_j - cosine_i)) over pairs of items with label_i > label_j).

    Cosines are put in the order of the labels (Su 2022, "CoSENT"). It is one number a forward pass, which is its unit.

    Args:
        scale: of the cosines.
    """

    weights: Mapping[str, float] = {"cosent": 1.0}

    def __init__(self, scale: float = 20.0) -> None:
        self.scale = scale

    def counts(self, batch: TrainBatch) -> dict[str, Tensor]:
        """1."""
        return {"cosent": scalar(1, batch.index)}

    def of_logits(self, model: Any, logits: Tensor, batch: TrainBatch) -> Loss:
        """The loss of the batch."""
        a, b = _vectors(logits, batch, "CoSENT", 2)[:2]
        cosines, labels = self.scale * (a * b).sum(-1), self.label(batch, "labels")
        difference = (cosines[None] - cosines[:, None]).masked_fill(labels[:, None] <= labels[None], float("-inf"))
        return Loss({"cosent": torch.cat([cosines.new_zeros(1), difference.flatten()]).logsumexp(0)})
