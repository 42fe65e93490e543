"""DistilBERT's triple loss: the teacher's distribution, the masked tokens, the direction of the hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastbert.models.heads import MaskedLM as MaskedLMModel
from fastbert.ops import cross_entropy
from fastbert.train.batch import TrainBatch
from fastbert.train.masking import Masking
from fastbert.train.objectives.loss import Loss, encode, num_labelled, scalar, wide
from fastbert.train.objectives.masked_lm import MaskedLM, masked_rows
from fastbert.train.token_kinds import TokenKinds

Tensor = torch.Tensor
WEIGHTS = {"kl": 5.0, "mlm": 2.0, "cos": 1.0}


class Distillation(MaskedLM):
    """5 KL(teacher || student) T^2 + 2 masked LM + 1 (1 - cosine of the last hidden states).

    Sanh et al. 2019, arXiv 1910.01108, sec. 3, with the weights and the temperature of the authors' code. The KL
    divergence is averaged over all tokens, as there, or over the masked ones. Logits are made for some rows at a time,
    and again in backward: logits of shape (T, V) never exist.

    Args:
        teacher: a `...ForMaskedLM` with the student's vocabulary. It is frozen and follows the batches to their device.
        weights: of the terms `kl`, `mlm` and `cos`; a `cos` of 0 lets the teacher be wider than the student.
        temperature: T, of both distributions.
        masked_only: average the KL divergence over the masked tokens.
        chunk_rows: tokens whose logits exist at once.

    Raises:
        ValueError: weights that are not those of the three terms, a temperature or chunk that is not positive.
    """

    def __init__(
        self,
        kinds: TokenKinds,
        teacher: MaskedLMModel,
        masking: Masking | None = None,
        weights: Mapping[str, float] = WEIGHTS,
        temperature: float = 2.0,
        masked_only: bool = False,
        chunk_rows: int = 256,
    ) -> None:
        super().__init__(kinds, masking)
        if set(weights) != set(WEIGHTS):
            raise ValueError(f"weights are of {', '.join(weights)}; they must be of {', '.join(WEIGHTS)}")
        if temperature <= 0 or chunk_rows < 1:
            raise ValueError(f"temperature is {temperature} (above 0), chunk_rows is {chunk_rows} (1 or more)")
        self.weights = {name: weight for name, weight in weights.items() if name != "cos" or weight}
        self.teacher = teacher.eval().requires_grad_(False)
        self.temperature, self.masked_only, self.chunk_rows = temperature, masked_only, chunk_rows

    def prepare(self, batch: TrainBatch) -> TrainBatch:
        """As `MaskedLM.prepare`."""
        self.teacher.to(batch.index.device)
        return super().prepare(batch)

    def counts(self, batch: TrainBatch) -> dict[str, Tensor]:
        """Tokens that the divergence is over; masked tokens; all tokens."""
        labels = self.label(batch, "labels")
        masked, every = num_labelled(labels), scalar(labels.numel(), labels)
        units = {"kl": masked if self.masked_only else every, "mlm": masked, "cos": every}
        return {name: units[name] for name in self.weights}

    def loss(self, model: Any, batch: TrainBatch) -> Loss:
        """The sums of the three terms; `mlm_accuracy`.

        Raises:
            ValueError: a teacher with another vocabulary, or with other hidden states where their cosine counts.
        """
        self._fits(model)
        labels, hidden_TD = self.label(batch, "labels"), encode(model, batch).hidden_TD
        with torch.no_grad():
            taught_TD = encode(self.teacher, batch).hidden_TD
        sums = {}
        if "cos" in self.weights:
            sums["cos"] = (1.0 - F.cosine_similarity(wide(hidden_TD), wide(taught_TD), dim=-1)).sum()
        student, taught = hidden_TD, taught_TD
        if self.masked_only:
            rows = masked_rows(labels)
            student, taught, labels = student[rows], taught[rows], labels[rows]
        chunks = zip(*(x.split(self.chunk_rows) for x in (student, taught, labels)), strict=True)
        parts = [
            checkpoint(self._chunk, model, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks
        ]
        sums["kl"], sums["mlm"], right = (torch.stack(part).sum() for part in zip(*parts, strict=True))
        return Loss(sums, {"mlm_accuracy": (right, num_labelled(labels))})

    def _chunk(self, model: Any, hidden: Tensor, taught: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(KL divergence times T^2, cross-entropy, number right) of some rows, summed."""
        logits = model.logits(hidden)
        with torch.no_grad():
            targets = (wide(self.teacher.logits(taught)) / self.temperature).softmax(-1)
        log_probs = (wide(logits) / self.temperature).log_softmax(-1)
        kl = F.kl_div(log_probs, targets, reduction="sum") * self.temperature**2
        right = (logits.detach().argmax(-1) == labels).sum()
        return kl, cross_entropy(logits, labels, reduction="sum"), right

    def _fits(self, model: Any) -> None:
        sizes = {"vocab_size": True, "hidden_size": "cos" in self.weights}
        for name, matters in sizes.items():
            ours, theirs = getattr(model.config, name), getattr(self.teacher.config, name)
            if matters and ours != theirs:
                way_out = "" if name == "vocab_size" else "; give the term cos the weight 0"
                raise ValueError(f"the student's {name} is {ours} but the teacher's {theirs}{way_out}")
