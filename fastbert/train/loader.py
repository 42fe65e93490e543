"""Loader: a dataset to optimiser steps of packed micro-batches, in an order that can be resumed anywhere."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastbert.train.batch import TrainBatch, collate
from fastbert.train.order import Plan, divide, plan_by_items, plan_by_tokens, shuffled

AHEAD = 3  # steps that are collated while one is computed


@dataclass(frozen=True)
class Fill:
    """How full the steps of an epoch are: tokens over `batch_tokens`, mean and least; the last step does not count."""

    mean: float
    least: float


class Loader:
    """Steps of a dataset.

    The order is a pure function of (seed, epoch), and a step has the same items on any number of ranks; they are shared
    so that ranks, and forward passes on a rank, have nearly the same number of tokens. A run is resumed with
    `steps(epoch, start)`, which reads no item of the steps before.

    Args:
        dataset: `len()`; `dataset[i]`, a mapping as `fastbert.train.batch.collate` takes it; `lengths`, tokens of each
            item (of all its sequences).
        batch_items, batch_tokens: size of an optimiser step over all ranks; exactly one of them.
        micro_tokens: most tokens of a forward pass on one device.
        position_offset: `model.position_offset`.
        token_fields: label fields that have one value a token.
        seed: of the order.
        shuffle: False keeps the dataset's order. Under `batch_tokens` items still move a little to fill the steps.
        drop_last: leave out an epoch's last step where it is smaller than the others.
        rank, world_size: which share of each step this process computes.

    Raises:
        ValueError: an empty dataset, lengths that do not fit it, sizes that are not positive or that the longest item
            exceeds, a rank outside of the world.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        batch_items: int | None = None,
        batch_tokens: int | None = None,
        micro_tokens: int,
        position_offset: int = 0,
        token_fields: Collection[str] = (),
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if (batch_items is None) == (batch_tokens is None):
            raise ValueError(f"give batch_items ({batch_items}) or batch_tokens ({batch_tokens}): exactly one")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} but there are {world_size} ranks, counted from 0")
        self.dataset, self.lengths = dataset, _lengths_of(dataset)
        self.batch_items, self.batch_tokens, self.micro_tokens = batch_items, batch_tokens, micro_tokens
        self.position_offset, self.token_fields = position_offset, frozenset(token_fields)
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        self.rank, self.world_size = rank, world_size
        self._check_sizes()
        self._plans: OrderedDict[int, Plan] = OrderedDict()
        self._counts: dict[int, int] = {}
        self._real_tokens = self._padded_tokens = 0

    def _check_sizes(self) -> None:
        longest = int(self.lengths.max())
        for name in ("batch_items", "batch_tokens", "micro_tokens"):
            value, least = getattr(self, name), 1 if name == "batch_items" else longest
            if value is not None and value < max(1, least):
                i = int(self.lengths.argmax())
                told = f"it must hold the longest item ({i}, {longest} tokens)" if least > 1 else "it must be 1 or more"
                raise ValueError(f"{name} is {value}: {told}")

    def num_steps(self, epoch: int) -> int:
        """Optimiser steps of an epoch.

        Raises:
            ValueError: `drop_last` leaves none.
        """
        if epoch not in self._counts:
            self._counts[epoch] = self._plan(epoch).num_steps
        return self._counts[epoch]

    def fill(self, epoch: int = 0) -> Fill | None:
        """How near the steps of an epoch come to `batch_tokens`; None where items are counted."""
        if self.batch_tokens is None:
            return None
        tokens = self._plan(epoch).tokens(self.lengths)
        full = tokens[:-1] if len(tokens) > 1 else tokens
        return Fill(float(full.mean()) / self.batch_tokens, float(full.min()) / self.batch_tokens)

    @property
    def padding_saved(self) -> float:
        """Share of tokens that would have been padding: 1 - real / padded, over all this loader has yielded.

        Padded is what a loader with as many forward passes computes that takes the items of a step in their order and
        pads each batch to its longest sequence.
        """
        return 1.0 - self._real_tokens / self._padded_tokens if self._padded_tokens else 0.0

    def steps(self, epoch: int, start: int = 0) -> Iterator[list[TrainBatch]]:
        """One list of this rank's micro-batches for each optimiser step of an epoch, from step `start` on.

        A list is empty where a step has fewer items than there are ranks. Items are read and collated by a thread,
        some steps ahead; what it raises is raised here, and it ends when the iterator does.
        """
        plan = self._plan(epoch)
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        waiting: deque[Future[tuple[list[TrainBatch], int]]] = deque()
        try:
            for k in range(start, plan.num_steps + AHEAD):
                if k < plan.num_steps:
                    waiting.append(pool.submit(self._collate, plan.step(k), epoch))
                if waiting and (k - start >= AHEAD or k >= plan.num_steps):
                    batches, padded = waiting.popleft().result()
                    self._real_tokens += sum(batch.packed.num_tokens for batch in batches)
                    self._padded_tokens += padded
                    yield batches
        finally:
            for future in waiting:
                future.cancel()
            pool.shutdown()

    def items(self, epoch: int, k: int) -> np.ndarray:
        """(n) int64: places in the dataset of the items of step `k`, on all ranks."""
        return self._plan(epoch).step(k)

    def _plan(self, epoch: int) -> Plan:
        if epoch not in self._plans:
            self._plans[epoch] = self._make_plan(epoch)
            if len(self._plans) > 2:
                self._plans.popitem(last=False)
        return self._plans[epoch]

    def _make_plan(self, epoch: int) -> Plan:
        N = len(self.lengths)
        order = shuffled(N, self.seed, epoch) if self.shuffle else np.arange(N, dtype=np.int64)
        if self.batch_items is not None:
            plan = plan_by_items(order, self.batch_items)
            whole = len(plan.step(plan.num_steps - 1)) == self.batch_items
        else:
            assert self.batch_tokens is not None
            plan = plan_by_tokens(order, self.lengths, self.batch_tokens)
            *others, last = plan.tokens(self.lengths).tolist()
            whole = last >= min(others, default=self.batch_tokens)
        if self.drop_last and not whole:
            plan = plan.without_last()
        if plan.num_steps == 0:
            size = f"batch_items {self.batch_items}" if self.batch_items else f"batch_tokens {self.batch_tokens}"
            raise ValueError(
                f"drop_last leaves no step: {N} items with {int(self.lengths.sum())} tokens do not fill {size}"
            )
        return plan

    def _collate(self, items: np.ndarray, epoch: int) -> tuple[list[TrainBatch], int]:
        shares = divide(self.lengths[items], self.micro_tokens, self.world_size)[self.rank]
        batches = [self._batch(items[places], epoch) for places in shares]
        return batches, _padded_tokens(batches, shares)

    def _batch(self, items: np.ndarray, epoch: int) -> TrainBatch:
        index = items.tolist()
        fields = [self.dataset[i] for i in index]
        batch = collate(fields, index, epoch, self.position_offset, self.token_fields)
        if batch.packed.num_tokens != int(self.lengths[items].sum()):
            raise ValueError(
                f"items {index[0]} ... {index[-1]} have {batch.packed.num_tokens} tokens, but the dataset's lengths "
                f"say {int(self.lengths[items].sum())}"
            )
        return batch


def _lengths_of(dataset: Any) -> np.ndarray:
    lengths = np.asarray(dataset.lengths, dtype=np.int64)
    if len(dataset) == 0:
        raise ValueError("the dataset is empty: there is nothing to train on")
    if lengths.shape != (len(dataset),):
        raise ValueError(f"the dataset has {len(dataset)} items, but lengths of shape {lengths.shape}")
    return lengths


def _padded_tokens(batches: Sequence[TrainBatch], shares: Sequence[Sequence[int]]) -> int:
    """What this rank's items of a step cost padded: in their order, over as many batches."""
    if not batches:
        return 0
    places = np.concatenate([np.asarray(share) for share in shares])
    longest = np.concatenate([b.packed.lengths.view(-1, b.group).amax(1).numpy() for b in batches])
    in_order = longest[np.argsort(places)]
    return batches[0].group * sum(len(part) * int(part.max()) for part in np.array_split(in_order, len(batches)))
