"""What is read out of hidden states for each output that a request can ask for. It starts no forward pass.

On a CPU heads are computed one sequence at a time: a BLAS rounds differently with the number of rows, and an answer
must not depend on what it was batched with. It costs about a hundredth of the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from fastbert.embedder import Embedder
from fastbert.models.encoder import Encoded
from fastbert.packing import PackedBatch
from fastbert.serve.kinds import Splade

Tensor = torch.Tensor
# (encoded batch, which of its sequences, prompt lengths of all of them) -> one tensor for each of these sequences
Readout = Callable[[Encoded, Sequence[int], Sequence[int]], list[Tensor]]


def tokens(encoded: Encoded, rows: Sequence[int], prompt_lengths: Sequence[int]) -> list[Tensor]:
    """Hidden states, (length, D) each."""
    states = encoded.batch.split(encoded.hidden_TD)
    return [states[row] for row in rows]


def vectors(embedder: Embedder) -> Readout:
    """Pooled vectors, (D) each: pooling, modules and `truncate_dim` as the embedder has them, not normalised."""

    def read(encoded: Encoded, rows: Sequence[int], prompt_lengths: Sequence[int]) -> list[Tensor]:
        pooling, modules = embedder.pooling, embedder.modules
        skips = [0 if pooling.include_prompt else prompt_lengths[row] for row in rows]
        found: dict[int, Tensor] = {}
        for skip in sorted(set(skips)):
            here = [row for row, length in zip(rows, skips, strict=True) if length == skip]
            pooled_SD = pooling(encoded.hidden_TD, encoded.batch.cu_seqlens, skip)
            vectors_SD = modules((pooled_SD if len(here) == len(pooled_SD) else pooled_SD[here]).float())
            found.update(zip(here, vectors_SD[:, : embedder.truncate_dim].cpu(), strict=True))
        return [found[row] for row in rows]

    return read


def sequence_logits(model: Any) -> Readout:
    """(labels) each."""

    def read(encoded: Encoded, rows: Sequence[int], prompt_lengths: Sequence[int]) -> list[Tensor]:
        if encoded.hidden_TD.device.type == "cpu":
            return [model.logits(one)[0] for one in _singles(encoded, rows)]
        logits_SC = model.logits(encoded).cpu()
        return [logits_SC[row] for row in rows]

    return read


def token_logits(model: Any) -> Readout:
    """(length, labels) each."""

    def read(encoded: Encoded, rows: Sequence[int], prompt_lengths: Sequence[int]) -> list[Tensor]:
        if encoded.hidden_TD.device.type == "cpu":
            return [model.logits(one) for one in _singles(encoded, rows)]
        logits = encoded.batch.split(model.logits(encoded))
        return [logits[row] for row in rows]

    return read


def mask_logits(model: Any, mask_id: int) -> Readout:
    """(masks, V) each: vocabulary logits at the mask tokens."""

    def read(encoded: Encoded, rows: Sequence[int], prompt_lengths: Sequence[int]) -> list[Tensor]:
        return [model.logits(one.hidden_TD[one.batch.input_ids == mask_id]) for one in _singles(encoded, rows)]

    return read


def sparse(model: Any, splade: Splade) -> Readout:
    """(V) each: SPLADE's weights. One sequence at a time: logits of a whole batch would be gigabytes."""

    def read(encoded: Encoded, rows: Sequence[int], prompt_lengths: Sequence[int]) -> list[Tensor]:
        return [_weights(model.logits(one.hidden_TD).float()) for one in _singles(encoded, rows)]

    def _weights(logits_LV: Tensor) -> Tensor:
        if splade.strategy == "max":  # log1p and relu grow with their argument: the maximum may come first
            logits_LV = logits_LV.amax(dim=0, keepdim=True)
        weights = logits_LV.relu().log1p()
        return (weights.log1p() if splade.activation == "log1p_relu" else weights).sum(dim=0)

    return read


def _singles(encoded: Encoded, rows: Sequence[int]) -> Iterator[Encoded]:
    """Each of these sequences as a batch of its own."""
    batch = encoded.batch
    bounds = batch.cu_seqlens.tolist()
    for row in rows:
        here = slice(bounds[row], bounds[row + 1])
        cu_seqlens = batch.cu_seqlens.new_tensor([0, here.stop - here.start])
        types = None if batch.type_ids is None else batch.type_ids[here]
        one = PackedBatch(batch.input_ids[here], batch.position_ids[here], types, cu_seqlens, here.stop - here.start)
        yield Encoded(encoded.hidden_TD[here], one)
