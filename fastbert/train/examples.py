"""Tokenised examples in flat arrays, four bytes a token: what the loader of a fine-tuning run reads from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np


class Examples:
    """A dataset for `Loader`: `len()`, `lengths`, and items with `input_ids`, `type_ids` and label fields.

    Attributes:
        lengths: (N) int64 tokens of each item, all its sequences together.
        group: sequences an item.
        labels: name -> (N) or (N, K) labels of items.
        num_truncated: sequences that were longer than the tokenizer's `max_length`.
        reference: what the metrics of the task need beyond the labels (tags of words, answers in words).
    """

    def __init__(
        self,
        ids: Sequence[Sequence[int]],
        type_ids: Sequence[Sequence[int]] | None = None,
        labels: Mapping[str, np.ndarray] | None = None,
        token_labels: Mapping[str, Sequence[Sequence[int]]] | None = None,
        group: int = 1,
        num_truncated: int = 0,
        reference: Any = None,
    ) -> None:
        """Copy lists of N * `group` sequences, item by item, into arrays.

        Args:
            ids: token ids of each sequence.
            type_ids: segments, of the same lengths.
            labels: name -> (N) or (N, K) int64 or float32.
            token_labels: name -> one number a token, of the same lengths as `ids`.

        Raises:
            ValueError: nothing to copy, or labels whose number differs from N.
        """
        if not ids or len(ids) % group:
            raise ValueError(f"{len(ids)} sequences cannot be items of {group} sequences each")
        self.group, self.num_truncated, self.reference = group, num_truncated, reference
        sizes = np.fromiter(map(len, ids), np.int64, len(ids))
        self._starts = np.concatenate([[0], sizes.cumsum()])
        self.lengths: np.ndarray = sizes.reshape(-1, group).sum(1)
        self._ids = _flat(ids)
        self._type_ids = None if type_ids is None else _flat(type_ids)
        self.labels = dict(labels or {})
        self._token_labels = {name: _flat(values) for name, values in (token_labels or {}).items()}
        for name, values in self.labels.items():
            if len(values) != len(self):
                raise ValueError(f"{len(self)} items but {len(values)} values of {name!r}")
        for name, flat in self._token_labels.items():
            if len(flat) != len(self._ids):
                raise ValueError(f"{len(self._ids)} tokens but {len(flat)} values of {name!r}")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """The fields of item `i`, as `fastbert.train.batch.collate` takes them."""
        first, last = i * self.group, (i + 1) * self.group
        item: dict[str, Any] = {"input_ids": self._sequences(self._ids, first, last)}
        if self._type_ids is not None:
            item["type_ids"] = self._sequences(self._type_ids, first, last)
        for name, values in self.labels.items():
            item[name] = values[i].tolist()
        for name, flat in self._token_labels.items():
            item[name] = flat[self._starts[first] : self._starts[last]].tolist()
        return item

    def _sequences(self, flat: np.ndarray, first: int, last: int) -> list[Any]:
        parts = [flat[self._starts[s] : self._starts[s + 1]].tolist() for s in range(first, last)]
        return parts if self.group > 1 else parts[0]

    @property
    def sequence_lengths(self) -> np.ndarray:
        """(N * group) int64 tokens of each sequence."""
        return np.diff(self._starts)


def _flat(sequences: Sequence[Sequence[int]]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(sequences), np.int32)
