"""Which items of a dataset share an optimiser step, a device and a forward pass: integers only, no item is read.

Everything is a pure function of (lengths, seed, epoch, sizes), the same on every rank, machine and release of numpy.
"""

from __future__ import annotations

import hashlib
import heapq
from dataclasses import dataclass

import numpy as np

LOOK_AHEAD = 128  # items behind the first that no longer fits among which a fuller step is sought


def shuffled(num_items: int, seed: int, epoch: int) -> np.ndarray:
    """(num_items) int64: a permutation that is a pure function of seed and epoch (numpy's may change with a release).

    Items are sorted by a 64-bit hash of their place (the finaliser of splitmix64, Steele et al. 2014).
    """
    digest = hashlib.blake2b(f"order {seed} {epoch}".encode(), digest_size=8).digest()
    x = np.arange(num_items, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.frombuffer(digest, "<u8")
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(x ^ (x >> np.uint64(31)), kind="stable").astype(np.int64)


@dataclass(frozen=True)
class Plan:
    """The optimiser steps of an epoch: step k has the items `items[bounds[k]:bounds[k + 1]]`.

    Attributes:
        items: (N) int64 places of items in the dataset.
        bounds: (steps + 1) int64.
    """

    items: np.ndarray
    bounds: np.ndarray

    @property
    def num_steps(self) -> int:
        """Optimiser steps."""
        return len(self.bounds) - 1

    def step(self, k: int) -> np.ndarray:
        """Items of step `k`, in their order."""
        return self.items[self.bounds[k] : self.bounds[k + 1]]

    def tokens(self, lengths: np.ndarray) -> np.ndarray:
        """(steps) int64 tokens of each step."""
        totals = np.concatenate([[0], lengths[self.items].cumsum()])
        return np.diff(totals[self.bounds])

    def without_last(self) -> Plan:
        """The same steps but for the last one."""
        return Plan(self.items[: self.bounds[-2]], self.bounds[:-1])


def plan_by_items(order: np.ndarray, batch_items: int) -> Plan:
    """Steps of `batch_items` items in the given order; the last one has what is left."""
    bounds = np.append(np.arange(0, len(order), batch_items), len(order))
    return Plan(order, bounds.astype(np.int64))


def plan_by_tokens(order: np.ndarray, lengths: np.ndarray, batch_tokens: int) -> Plan:
    """Steps of at most, and nearly, `batch_tokens` tokens.

    Items are taken in the given order until one does not fit; what room is left is filled with the longest items that
    fit of the next `LOOK_AHEAD`. The item that did not fit begins the next step, so none waits longer than that.

    Args:
        order: (N) int64 items.
        lengths: tokens of the items of the dataset; none longer than `batch_tokens`.
    """
    sizes = lengths[order]
    totals = np.concatenate([[0], sizes.cumsum()])
    held = np.empty(0, dtype=np.int64)  # places in `order` that were passed over
    steps, head = [], 0
    while head < len(order) or len(held):
        enough = int(np.searchsorted(totals, totals[head] + batch_tokens))
        places = np.concatenate([held, np.arange(head, min(len(order), enough + LOOK_AHEAD))])
        taken = sizes[places].cumsum()
        count = int(np.searchsorted(taken, batch_tokens, side="right"))
        room = batch_tokens - int(taken[count - 1])
        rest = places[count:]
        chosen = _fill(sizes[rest[:LOOK_AHEAD]], room)
        steps.append(np.concatenate([places[:count], rest[chosen]]))
        # Items behind the last one taken were only looked at.
        head = max(head, int(steps[-1].max()) + 1)
        held = np.setdiff1d(rest[rest < head], rest[chosen], assume_unique=True)
    bounds = np.concatenate([[0], np.cumsum([len(step) for step in steps])]).astype(np.int64)
    return Plan(order[np.concatenate(steps)], bounds)


def _fill(sizes: np.ndarray, room: int) -> list[int]:
    """Places of items that fit into `room` together, always the longest that still fits."""
    chosen: list[int] = []
    for i in np.argsort(-sizes, kind="stable").tolist():
        if sizes[i] <= room:
            chosen.append(i)
            room -= int(sizes[i])
    return sorted(chosen)


def divide(lengths: np.ndarray, micro_tokens: int, world_size: int) -> list[list[list[int]]]:
    """Share the items of a step among ranks, and each rank's among forward passes of at most `micro_tokens` tokens.

    The longest item first, each to the forward pass that has the fewest tokens (Graham 1969's rule), over as few passes
    a rank as hold them.

    Args:
        lengths: (n) tokens of the step's items; none longer than `micro_tokens`.

    Returns:
        For each rank its forward passes, each a rising list of places in `lengths`. No pass is empty; a rank may have
        none.
    """
    num = max(1, -(-int(lengths.sum()) // (micro_tokens * world_size)))
    while True:
        bins = _spread(lengths, num * world_size)
        if max(int(lengths[places].sum()) for places in bins) <= micro_tokens:
            break
        num += 1
    return [[sorted(places) for places in bins[rank::world_size] if places] for rank in range(world_size)]


def _spread(lengths: np.ndarray, num_bins: int) -> list[list[int]]:
    if num_bins == 1:
        return [list(range(len(lengths)))]
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, b) for b in range(num_bins)]
    for i in np.argsort(-lengths, kind="stable").tolist():
        tokens, b = heap[0]
        bins[b].append(i)
        heapq.heapreplace(heap, (tokens + int(lengths[i]), b))
    return bins
