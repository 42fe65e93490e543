"""TrainBatch: packed sequences with their labels, and the collator that makes one from items of a dataset."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastbert.packing import PackedBatch, pack

Tensor = torch.Tensor


@dataclass(frozen=True)
class TrainBatch:
    """What an objective sees.

    An item of a dataset has `group` sequences (1; as many as choices in multiple choice; anchor, positive, negatives
    in contrastive learning), laid end to end item by item: S = N * group.

    Attributes:
        packed: the S sequences.
        index: (N) int64 places of the items in the dataset: with seed and epoch they make masking reproducible.
        epoch: how often the dataset was seen before.
        labels: fields by name. What is counted by tokens has T rows, by items N.
        group: sequences an item.
    """

    packed: PackedBatch
    index: Tensor
    epoch: int
    labels: Mapping[str, Tensor]
    group: int = 1

    @property
    def num_items(self) -> int:
        """N."""
        return self.index.shape[0]

    def to(self, device: torch.device | str) -> TrainBatch:
        """The same batch on another device."""
        labels = {name: value.to(device, non_blocking=True) for name, value in self.labels.items()}
        packed, index = self.packed.to(device, non_blocking=True), self.index.to(device, non_blocking=True)
        return TrainBatch(packed, index, self.epoch, labels, self.group)

    def with_inputs(self, input_ids: Tensor, **labels: Tensor) -> TrainBatch:
        """The same batch with other token ids (T), and with more or other labels."""
        return replace(self, packed=replace(self.packed, input_ids=input_ids), labels={**self.labels, **labels})


def collate(
    items: Sequence[Mapping[str, Any]],
    index: Sequence[int],
    epoch: int = 0,
    position_offset: int = 0,
    token_fields: Collection[str] = (),
) -> TrainBatch:
    """Pack items of a dataset.

    Args:
        items: N mappings. `input_ids`: ids of one sequence, or a list of `group` such lists. `type_ids`: segments,
            of the same form, or absent. Every other field is a label: a number, or a list of a fixed width; ints
            become int64, floats float32.
        index: (N) places of the items in the dataset.
        epoch: how often the dataset was seen before.
        position_offset: `model.position_offset`.
        token_fields: labels that are lists with one number a token.

    Raises:
        ValueError: no items, items whose fields or groups differ, a list of another length than it should have.
    """
    if not items:
        raise ValueError("nothing to collate: the list of items is empty")
    names = set(items[0])
    for i, item in enumerate(items):
        if set(item) != names:
            raise ValueError(f"item {index[i]} has fields {sorted(item)} but item {index[0]} has {sorted(names)}")
    groups = [_sequences(item["input_ids"]) for item in items]
    group = len(groups[0])
    if any(len(sequences) != group for sequences in groups):
        raise ValueError(f"items must have the same number of sequences, got {sorted({len(g) for g in groups})}")
    types = None
    if "type_ids" in names:
        types = [ids for item in items for ids in _sequences(item["type_ids"])]
    packed = pack([ids for sequences in groups for ids in sequences], types, position_offset)
    lengths = [sum(map(len, sequences)) for sequences in groups]
    labels = {
        name: _by_token(name, items, index, lengths) if name in token_fields else _by_item(name, items, index)
        for name in sorted(names - {"input_ids", "type_ids"})
    }
    return TrainBatch(packed, torch.tensor(index, dtype=torch.int64), epoch, labels, group)


def _sequences(ids: Sequence[Any]) -> Sequence[Sequence[int]]:
    return ids if len(ids) and isinstance(ids[0], Sequence) else [ids]


def _by_token(name: str, items: Sequence[Mapping[str, Any]], index: Sequence[int], lengths: list[int]) -> Tensor:
    for item, i, length in zip(items, index, lengths, strict=True):
        if len(item[name]) != length:
            raise ValueError(f"item {i} has {length} tokens but {len(item[name])} values of {name!r}")
    return _tensor([value for item in items for value in item[name]])


def _by_item(name: str, items: Sequence[Mapping[str, Any]], index: Sequence[int]) -> Tensor:
    widths = [len(item[name]) if isinstance(item[name], Sequence) else None for item in items]
    for i, width in zip(index, widths, strict=True):
        if width != widths[0]:
            raise ValueError(f"item {i} has {width} values of {name!r} but item {index[0]} has {widths[0]}")
    return _tensor([item[name] for item in items])


def _tensor(values: list[Any]) -> Tensor:
    tensor = torch.tensor(values)
    return tensor.float() if tensor.is_floating_point() else tensor.long()
