"""Masked language modelling, alone or with a question about two segments. Only masked rows meet the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastbert.models.encoder import Encoded
from fastbert.ops import cross_entropy
from fastbert.train.batch import TrainBatch
from fastbert.train.masking import IGNORED, Masking, mask_tokens
from fastbert.train.objectives.loss import Loss, Objective, accuracy, encode, num_labelled
from fastbert.train.token_kinds import TokenKinds

Tensor = torch.Tensor


def masked_rows(labels: Tensor) -> Tensor:
    """(M) the labelled of (T) tokens."""
    return (labels != IGNORED).nonzero().flatten()


def masked_loss(logits_MV: Tensor, labels: Tensor) -> Loss:
    """Sum of the cross-entropies of (M, V) logits; `mlm_accuracy`."""
    loss = cross_entropy(logits_MV, labels, reduction="sum")
    return Loss({"mlm": loss}, {"mlm_accuracy": accuracy(logits_MV, labels)})


class MaskedLM(Objective):
    """Predict the masked tokens (Devlin et al. 2018, arXiv 1810.04805, sec. 3.1; RoBERTa and MPNet's head as well).

    The model is one `...ForMaskedLM`.
    """

    weights: Mapping[str, float] = {"mlm": 1.0}

    def __init__(self, kinds: TokenKinds, masking: Masking | None = None) -> None:
        self.kinds = kinds
        self.masking = Masking() if masking is None else masking

    def prepare(self, batch: TrainBatch) -> TrainBatch:
        """Masked ids, and `labels` (T): the tokens that were there."""
        device = batch.packed.input_ids.device
        if self.kinds.special.device != device:
            self.kinds = self.kinds.to(device)
        return mask_tokens(batch, self.kinds, self.masking)

    def counts(self, batch: TrainBatch) -> dict[str, Tensor]:
        """Masked tokens."""
        return {"mlm": num_labelled(self.label(batch, "labels"))}

    def loss(self, model: Any, batch: TrainBatch) -> Loss:
        """Sum of the cross-entropies of masked tokens; `mlm_accuracy`."""
        return self.of_encoded(model, encode(model, batch), batch)

    def of_encoded(self, model: Any, encoded: Encoded, batch: TrainBatch) -> Loss:
        """Of the encoder's hidden states."""
        labels = self.label(batch, "labels")
        rows = masked_rows(labels)
        return masked_loss(model.logits(encoded.hidden_TD[rows]), labels[rows])


class PairedMaskedLM(MaskedLM):
    """Masked language modelling, and a question about each item's two segments, which the dataset answers.

    The model is a `...ForPreTraining` with `pair_logits(encoded)` (S, 2).
    """

    term: str
    field: str

    def counts(self, batch: TrainBatch) -> dict[str, Tensor]:
        """Masked tokens; items."""
        return {**super().counts(batch), self.term: num_labelled(self.label(batch, self.field))}

    def of_encoded(self, model: Any, encoded: Encoded, batch: TrainBatch) -> Loss:
        """Adds the sum of the cross-entropies of pairs, and their accuracy."""
        masked, answers = super().of_encoded(model, encoded, batch), self.label(batch, self.field)
        logits = model.pair_logits(encoded)
        loss = cross_entropy(logits, answers, reduction="sum")
        return Loss(
            {**masked.sums, self.term: loss}, {**masked.metrics, f"{self.term}_accuracy": accuracy(logits, answers)}
        )


class MaskedLMWithNextSentence(PairedMaskedLM):
    """BERT's two tasks: `next_sentence_label` (N) is 1 where the second segment is a random one."""

    term, field = "nsp", "next_sentence_label"
    weights: Mapping[str, float] = {"mlm": 1.0, "nsp": 1.0}


class MaskedLMWithSentenceOrder(PairedMaskedLM):
    """ALBERT's two tasks (Lan et al. 2019, arXiv 1909.11942): `sentence_order_label` (N) is 1 for swapped segments."""

    term, field = "sop", "sentence_order_label"
    weights: Mapping[str, float] = {"mlm": 1.0, "sop": 1.0}
