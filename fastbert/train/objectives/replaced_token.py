"""ELECTRA: a generator replaces masked tokens, the discriminator tells which ones are not the original."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastbert.ops.dropout import hash32
from fastbert.train.batch import TrainBatch
from fastbert.train.draws import SPAN, Places, draws
from fastbert.train.masking import IGNORED, Masking
from fastbert.train.objectives.loss import Loss, num_labelled, scalar, wide
from fastbert.train.objectives.masked_lm import MaskedLM, masked_loss, masked_rows
from fastbert.train.token_kinds import TokenKinds

Tensor = torch.Tensor
# Logits that get their noise at once. The hash makes int64 temporaries: on a CPU they had better stay in cache.
CHUNK = {"cpu": 1 << 18, "cuda": 1 << 26}


def gumbel_sample(logits_MV: Tensor, row_keys: Tensor) -> Tensor:
    """(M) int64 drawn from softmax(logits): argmax of logits - log(-log u), u a hash of (row's key, vocabulary id).

    Args:
        logits_MV: any float dtype; the noise is added in fp32 or wider.
        row_keys: (M) int64 in [0, 2^32).
    """
    V = logits_MV.shape[1]
    ids = hash32(torch.arange(V, device=logits_MV.device))
    rows = max(1, CHUNK.get(logits_MV.device.type, 1 << 20) // V)
    parts = [torch.empty(0, dtype=torch.int64, device=logits_MV.device)]
    for logits, keys in zip(logits_MV.split(rows), row_keys.split(rows), strict=True):
        # log u as log1p(v - 1) would lose the u near 1, which win: draw 1 - u instead, whose small values are exact.
        v = (hash32(keys[:, None] ^ ids) + 0.5) / SPAN
        parts.append((wide(logits) - (-torch.log1p(-v)).log()).argmax(-1))
    return torch.cat(parts)


class ReplacedTokenDetection(MaskedLM):
    """Masked LM of the generator + 50 * is-it-replaced of the discriminator (Clark et al. 2020, arXiv 2003.10555).

    The model is an `ElectraPair`. 15 % of the tokens are chosen, 85 % of them become [MASK] and none a random word; the
    generator's samples stand in for all chosen ones. A sample that is the original counts as original. The
    discriminator's loss is over all tokens, and no gradient passes through the samples.

    Args:
        disc_weight: of the discriminator's loss.
    """

    def __init__(self, kinds: TokenKinds, masking: Masking | None = None, disc_weight: float = 50.0) -> None:
        super().__init__(kinds, Masking(mask_replace=0.85, random_replace=0.0) if masking is None else masking)
        self.weights = {"mlm": 1.0, "disc": disc_weight}

    def counts(self, batch: TrainBatch) -> dict[str, Tensor]:
        """Masked tokens; all tokens."""
        labels = self.label(batch, "labels")
        return {"mlm": num_labelled(labels), "disc": scalar(labels.numel(), labels)}

    def loss(self, model: Any, batch: TrainBatch) -> Loss:
        """Both sums; accuracy of both, the share of replaced tokens that is found, and the share that is replaced."""
        labels = self.label(batch, "labels")
        rows = masked_rows(labels)
        hidden_TD = model.generator.base_model.encode_packed(batch.packed).hidden_TD
        logits_MV = model.generator.logits(hidden_TD[rows])
        masked = masked_loss(logits_MV, labels[rows])

        corrupted, replaced = self.corrupt(batch, rows, logits_MV.detach())
        encoded = model.discriminator.base_model.encode_packed(corrupted.packed)
        scores = wide(model.discriminator.logits(encoded))
        loss = F.binary_cross_entropy_with_logits(scores, replaced.to(scores.dtype), reduction="sum")

        found, total = scores.detach() > 0, scalar(labels.numel(), labels)
        metrics = {
            "disc_accuracy": ((found == replaced).sum(), total),
            "disc_recall": ((found & replaced).sum(), replaced.sum()),
            "replaced": (replaced.sum(), total),
        }
        return Loss({**masked.sums, "disc": loss}, {**masked.metrics, **metrics})

    @torch.no_grad()
    def corrupt(self, batch: TrainBatch, rows: Tensor, logits_MV: Tensor) -> tuple[TrainBatch, Tensor]:
        """The batch with samples in the places of chosen tokens, and (T) bool: the sample is another token."""
        labels, ids = self.label(batch, "labels"), batch.packed.input_ids
        keys = draws(batch, Places.of(batch.packed), "gumbel", self.masking.seed, batch.epoch)
        corrupted = ids.index_copy(0, rows, gumbel_sample(logits_MV, keys[rows]))
        original = torch.where(labels == IGNORED, ids, labels)
        return batch.with_inputs(corrupted), corrupted != original
