"""What is read out of hidden states for each output that a request can ask for. It starts no forward pass.

On a CPU heads are computed one sequence at a time: a BLAS rounds differently with the number of rows, and an answer
must not depend on what it was batched with. It costs about a hundredth of the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fastbert.embedder import Embedder
from fastbert.models.encoder import Encoded
from fastbert.packing import PackedBatch
from fastbert.sentence_folder import finished
from fastbert.serve.kinds import Kind, Splade

Tensor = torch.Tensor
# (encoded batch, which of its sequences, prompt lengths of all of them) -> float32, one for each of these sequences
Readout = Callable[[Encoded, Sequence[int], Sequence[int]], list[np.ndarray]]


def _arrays(values: Iterable[Tensor]) -> list[np.ndarray]:
    return [value.float().cpu().numpy() for value in values]


def tokens(encoded: Encoded, rows: Sequence[int], prompt_lengths: Sequence[int]) -> list[np.ndarray]:
    """Hidden states, (length, D) each."""
    states = encoded.batch.split(encoded.hidden_TD)
    return _arrays(states[row] for row in rows)


def vectors(embedder: Embedder, unit: bool) -> Readout:
    """Vectors, (D) each, as the embedder makes them of pooled states; of length 1 if `unit`."""

    def read(encoded: Encoded, rows: Sequence[int], prompt_lengths: Sequence[int]) -> list[np.ndarray]:
        skips = [0 if embedder.pooling.include_prompt else prompt_lengths[row] for row in rows]
        found: dict[int, np.ndarray] = {}
        for skip in sorted(set(skips)):
            here = [row for row, length in zip(rows, skips, strict=True) if length == skip]
            pooled_SD = embedder.pool(encoded.hidden_TD, encoded.batch.cu_seqlens, skip)
            found.update(zip(here, vectors_of(embedder, pooled_SD, here, unit), strict=True))
        return [found[row] for row in rows]

    return read


def vectors_of(embedder: Embedder, pooled_SD: Tensor, rows: Sequence[int], unit: bool) -> np.ndarray:
    """(len(rows), D): vectors of some rows of what was pooled."""
    chosen_SD = pooled_SD if len(rows) == len(pooled_SD) else pooled_SD[rows]
    return finished(embedder.modules, chosen_SD, embedder.truncate_dim, unit).cpu().numpy()


def sequence_logits(model: Any) -> Readout:
    """(labels) each."""

    def read(encoded: Encoded, rows: Sequence[int], prompt_lengths: Sequence[int]) -> list[np.ndarray]:
        if encoded.hidden_TD.device.type == "cpu":
            return _arrays(model.logits(one)[0] for one in _singles(encoded, rows))
        logits_SC = model.logits(encoded).cpu()
        return _arrays(logits_SC[row] for row in rows)

    return read


def token_logits(model: Any) -> Readout:
    """(length, labels) each."""

    def read(encoded: Encoded, rows: Sequence[int], prompt_lengths: Sequence[int]) -> list[np.ndarray]:
        if encoded.hidden_TD.device.type == "cpu":
            return _arrays(model.logits(one) for one in _singles(encoded, rows))
        logits = encoded.batch.split(model.logits(encoded))
        return _arrays(logits[row] for row in rows)

    return read


def mask_logits(model: Any, mask_id: int) -> Readout:
    """(masks, V) each: vocabulary logits at the mask tokens."""

    def read(encoded: Encoded, rows: Sequence[int], prompt_lengths: Sequence[int]) -> list[np.ndarray]:
        return _arrays(model.logits(one.hidden_TD[one.batch.input_ids == mask_id]) for one in _singles(encoded, rows))

    return read


def sparse(model: Any, splade: Splade) -> Readout:
    """(V) each: SPLADE's weights. One sequence at a time: logits of a whole batch would be gigabytes."""

    def read(encoded: Encoded, rows: Sequence[int], prompt_lengths: Sequence[int]) -> list[np.ndarray]:
        return _arrays(_weights(model.logits(one.hidden_TD).float()) for one in _singles(encoded, rows))

    def _weights(logits_LV: Tensor) -> Tensor:
        if splade.strategy == "max":  # log1p and relu grow with their argument: the maximum may come first
            logits_LV = logits_LV.amax(dim=0, keepdim=True)
        weights = logits_LV.relu().log1p()
        return (weights.log1p() if splade.activation == "log1p_relu" else weights).sum(dim=0)

    return read


def of_kind(kind: Kind, model: Any, embedder: Embedder | None, mask_id: int | None) -> dict[str, Readout]:
    """The readout for each output that a kind of model has."""
    found: dict[str, Readout] = {"tokens": tokens}
    if embedder is not None:
        found["vectors"], found["unit"] = vectors(embedder, False), vectors(embedder, True)
    elif kind.name in ("classifier", "reranker"):
        found["logits"] = sequence_logits(model)
    elif kind.name == "token-classification":
        found["logits"] = token_logits(model)
    elif kind.name == "splade":
        assert kind.splade is not None
        found["sparse"] = sparse(model, kind.splade)
    if kind.name in ("fill-mask", "splade") and mask_id is not None:
        found["mask"] = mask_logits(model, mask_id)
    return found


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
