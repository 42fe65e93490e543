"""PackedBatch, and the way in and out of it: the only file that knows padding exists.

Shape letters: T packed tokens, S sequences, D features; B, L the padded batch and its length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from fastbert.ops import plan_batches, plan_concat, plan_mask
from fastbert.ops.dispatch import can_look


@dataclass(frozen=True)
class PackedBatch:
    """Tokens of S sequences laid end to end, without padding.

    Attributes:
        input_ids: (T) int64.
        position_ids: (T) int64, position of each token in its own sequence, as the embedding table counts it.
        type_ids: (T) int64 segment of each token, or None where all are 0.
        cu_seqlens: (S + 1) int32, first token of each sequence; the last entry is T.
        max_seqlen: length of the longest sequence, on the host.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    type_ids: torch.Tensor | None
    cu_seqlens: torch.Tensor
    max_seqlen: int

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.input_ids.shape[0]

    @property
    def num_sequences(self) -> int:
        """S."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def lengths(self) -> torch.Tensor:
        """(S) int32 tokens of each sequence."""
        return self.cu_seqlens.diff()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch on another device."""
        return PackedBatch(
            self.input_ids.to(device, non_blocking=non_blocking),
            self.position_ids.to(device, non_blocking=non_blocking),
            None if self.type_ids is None else self.type_ids.to(device, non_blocking=non_blocking),
            self.cu_seqlens.to(device, non_blocking=non_blocking),
            self.max_seqlen,
        )

    def split(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Cut (T, ...) values, such as hidden states, into one tensor per sequence: S views of (length, ...)."""
        if values.shape[0] != self.num_tokens:
            raise ValueError(f"values have {values.shape[0]} rows but the batch has {self.num_tokens} tokens")
        return list(values.split(self.lengths.tolist()))


@dataclass(frozen=True)
class Padding:
    """Where the tokens of a packed batch lay in the padded (B, L) batch it came from.

    Attributes:
        shape: (B, L).
        indices: (T) int64 into the flattened (B * L), ascending.
    """

    shape: tuple[int, int]
    indices: torch.Tensor

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """(B, L, ...) -> (T, ...): keep the real tokens."""
        if tuple(values.shape[:2]) != self.shape:
            raise ValueError(f"values have shape {tuple(values.shape)} but the mask has shape {self.shape}")
        return values.reshape(-1, *values.shape[2:]).index_select(0, self.indices)

    def unpack(self, values: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """(T, ...) -> (B, L, ...): put the tokens back; padding holds `fill`. Differentiable."""
        if values.shape[0] != self.indices.shape[0]:
            raise ValueError(f"values have {values.shape[0]} rows but {self.indices.shape[0]} tokens were packed")
        B, L = self.shape
        if not torch.compiler.is_compiling() and self.indices.shape[0] == B * L:
            return values.view(B, L, *values.shape[1:])
        flat = values.new_full((B * L, *values.shape[1:]), fill)
        return flat.index_copy(0, self.indices, values).view(B, L, *values.shape[1:])

    def unpack_square(self, squares: Sequence[torch.Tensor]) -> torch.Tensor:
        """B tensors (H, length, length), such as attention probabilities -> (B, H, L, L); padding holds 0."""
        B, L = self.shape
        out = squares[0].new_zeros(B, squares[0].shape[0], L, L)
        for padded, square, columns in zip(out, squares, self._columns(), strict=True):
            padded[:, columns[:, None], columns] = square
        return out

    def _columns(self) -> list[torch.Tensor]:
        B, L = self.shape
        rows = torch.bincount(self.indices // max(L, 1), minlength=B)
        return list((self.indices % max(L, 1)).split(rows.tolist()))


def pack(
    sequences: Sequence[Sequence[int]], type_ids: Sequence[Sequence[int]] | None = None, position_offset: int = 0
) -> PackedBatch:
    """Pack lists of token ids.

    Args:
        sequences: S lists of ids; empty lists are kept as sequences of length 0.
        type_ids: S lists of segment ids of the same lengths, or None for all 0.
        position_offset: position of each first token (RoBERTa's family counts from padding_idx + 1).

    Raises:
        ValueError: no sequence at all, or type ids whose lengths differ from the ids'.
        TypeError: an id that is not an int.
    """
    if len(sequences) == 0:
        raise ValueError("nothing to pack: the list of sequences is empty")
    ids, positions, cu_seqlens, max_seqlen = plan_concat(sequences)
    types = None
    if type_ids is not None:
        types, _, type_cu_seqlens, _ = plan_concat(type_ids)
        if not torch.equal(cu_seqlens, type_cu_seqlens):
            raise ValueError("type_ids must have the same lengths as the sequences, one id per token")
    return PackedBatch(
        ids, positions + position_offset if position_offset else positions, types, cu_seqlens, max_seqlen
    )


def keep_mask(attention_mask: torch.Tensor | None, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    """A Hugging Face attention mask as a (B, L) bool mask, True = keep.

    Args:
        attention_mask: (B, L) or (B, L, L), bool, integer or float, non-zero = keep; (B, 1, 1 or L, L) bool, or
            float and additive: 0 = keep, a huge negative number = drop. None = keep all.
        shape: (B, L) of the input it belongs to.

    Raises:
        ValueError: another shape or dtype; values that are neither keep nor drop; a mask that lets tokens of one
            sequence see different keys, such as a causal one: a packed encoder cannot honour it.
    """
    if attention_mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    B, L = shape
    allowed = [(B, L), (B, L, L), (B, 1, 1, L), (B, 1, L, L)]
    if tuple(attention_mask.shape) not in allowed:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)} but the input has shape {shape}: "
            "pass one (batch, length) mask with 1 for tokens and 0 for padding"
        )
    mask = attention_mask.to(device)
    if mask.ndim == 4:
        return _same_for_all_queries(_keep_4d(mask)[:, 0])
    if mask.is_complex():
        raise ValueError(f"attention_mask has dtype {mask.dtype}: pass bool, integer or float 1/0")
    if mask.dtype != torch.bool and can_look(mask) and bool((mask < 0).any()):
        raise ValueError(
            "attention_mask has negative values, so it looks additive (0 keep, -inf drop): "
            "pass 1 for tokens and 0 for padding"
        )
    return mask != 0 if mask.ndim == 2 else _same_for_all_queries(mask != 0)


def _keep_4d(mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise ValueError(f"a 4D attention_mask must be bool, or float and additive; it has dtype {mask.dtype}")
    keep = mask == 0
    if not bool((keep | (mask <= -1e4)).all()):
        raise ValueError(
            "a 4D float attention_mask is added to the scores: 0 keeps, finfo.min or -inf drops. "
            "It has other values, which a packed encoder cannot add"
        )
    return keep


def _same_for_all_queries(keep: torch.Tensor) -> torch.Tensor:
    """(B, Q, L) -> (B, L), if every kept token of a row sees the same keys."""
    if keep.shape[1] == 1:
        return keep[:, 0]
    keys = keep.any(dim=1)
    if not bool(((keep == keys[:, None]).all(dim=2) | ~keys).all()):
        raise ValueError(
            "attention_mask lets the tokens of a row see different keys (causal, or several sequences in a row): "
            "this encoder cannot honour it. Give each sequence a row of its own"
        )
    return keys


def pack_padded(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    token_type_ids: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> tuple[PackedBatch, Padding]:
    """Pack a padded batch; `Padding.unpack` is the way back.

    Args:
        input_ids: (B, L) integer.
        attention_mask: (B, L), non-zero = keep, any pattern (left, right, holes, rows without a token); None = all.
            3D and 4D masks as `keep_mask` takes them.
        token_type_ids: (B, L) or None.
        position_ids: (B, L), (1, L) or (L); None = the column, as Hugging Face counts under any mask.

    Raises:
        ValueError: shapes or dtypes that do not fit, naming both.
    """
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must have shape (batch, length), got {tuple(input_ids.shape)}")
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise ValueError(f"input_ids must be integers, got {input_ids.dtype}")
    shape, device = (input_ids.shape[0], input_ids.shape[1]), input_ids.device
    indices, cu_seqlens, max_seqlen = plan_mask(keep_mask(attention_mask, shape, device))
    padding = Padding(shape, indices)
    if position_ids is None:
        positions = indices % shape[1] if shape[1] else indices
    else:
        positions = padding.pack(_expand("position_ids", position_ids, shape))
    types = None if token_type_ids is None else padding.pack(_expand("token_type_ids", token_type_ids, shape))
    return PackedBatch(padding.pack(input_ids).long(), positions, types, cu_seqlens, max_seqlen), padding


def _expand(name: str, ids: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    if ids.ndim not in (1, 2) or ids.shape[-1] != shape[1] or (ids.ndim == 2 and ids.shape[0] not in (1, shape[0])):
        raise ValueError(f"{name} has shape {tuple(ids.shape)} but input_ids has shape {shape}")
    return ids.long().expand(shape)


def token_batches(lengths: Sequence[int], budget_tokens: int, max_sequences: int | None = None) -> list[list[int]]:
    """Group sequences into batches of at most `budget_tokens` tokens, longest first.

    Returns:
        Lists of indices into `lengths`; each index occurs once. A sequence over the budget has a batch of its own.
    """
    if len(lengths) == 1 and budget_tokens > 0 and max_sequences is None:
        return [[0]]
    order, bounds = plan_batches(torch.as_tensor(lengths, dtype=torch.int64), budget_tokens, max_sequences)
    indices = order.tolist()
    return [indices[lo:hi] for lo, hi in pairwise(bounds)]
