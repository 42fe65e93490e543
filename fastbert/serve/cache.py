"""Exact repeats answered from memory: results by a hash of the model, the token ids and what was asked of them."""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Protocol

import numpy as np

from fastbert.serve.work import Done, Work

_OVERHEAD = 300  # bytes of Python objects an entry


class Cache:
    """The results used last, within `max_bytes`. Safe to share between threads and models.

    Attributes:
        hits, misses: inputs looked up.
        nbytes: memory taken.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, got {max_bytes}: without a cache, make none")
        self.max_bytes = max_bytes
        self.hits = self.misses = self.nbytes = 0
        self._values: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: bytes) -> np.ndarray | None:
        """The value of a key, which is then the one used last; None = there is none."""
        with self._lock:
            value = self._values.get(key)
            if value is None:
                self.misses += 1
            else:
                self.hits += 1
                self._values.move_to_end(key)
            return value

    def put(self, key: bytes, value: np.ndarray) -> None:
        """Keep a copy; what was used longest ago goes. A value larger than the whole cache is not kept."""
        size = value.nbytes + _OVERHEAD
        if size > self.max_bytes:
            return
        value = value.copy()  # the value may be a row of a large batch
        value.flags.writeable = False
        with self._lock:
            if (old := self._values.pop(key, None)) is not None:
                self.nbytes -= old.nbytes + _OVERHEAD
            self._values[key] = value
            self.nbytes += size
            while self.nbytes > self.max_bytes:
                _, oldest = self._values.popitem(last=False)
                self.nbytes -= oldest.nbytes + _OVERHEAD


class Submits(Protocol):
    """What computes; `fastbert.serve.batcher.Batcher` is one."""

    async def submit(self, work: Work) -> Done:
        """Compute work."""


class CachedBatcher:
    """A cache in front of a batcher: of each work only what is not known, and equal inputs once, is computed.

    Args:
        batcher: computes.
        fingerprint: of the model: `Served.fingerprint`.
        cache: may serve several models.
    """

    def __init__(self, batcher: Submits, fingerprint: bytes, cache: Cache) -> None:
        self.batcher = batcher
        self.fingerprint = fingerprint
        self.cache = cache

    async def submit(self, work: Work) -> Done:
        """As `Batcher.submit`; what comes from the cache took no time, and must not be written to."""
        keys = [self.key(work, row) for row in range(len(work.ids))]
        found = {key: self.cache.get(key) for key in dict.fromkeys(keys)}
        rows = {key: row for row, key in enumerate(keys) if found[key] is None}
        times = dict.fromkeys(keys, (0.0, 0.0))
        if rows:
            done = await self.batcher.submit(_part(work, list(rows.values())))
            for key, value, *spent in zip(rows, done.values, done.queue_s, done.compute_s, strict=True):
                self.cache.put(key, value)
                found[key], times[key] = value, (spent[0], spent[1])
        values = [value for value in map(found.__getitem__, keys) if value is not None]
        queue_s, compute_s = zip(*map(times.__getitem__, keys), strict=True)
        return Done(values, list(queue_s), list(compute_s), sum(map(len, work.ids)))

    def key(self, work: Work, row: int) -> bytes:
        """Hash of all that one input's result depends on."""
        digest = blake2b(self.fingerprint, digest_size=16)
        digest.update(f"{work.output} {work.prompt_length} {len(work.ids[row])} ".encode())
        digest.update(array("q", work.ids[row]).tobytes())
        if work.type_ids is not None and any(work.type_ids[row]):
            digest.update(array("q", work.type_ids[row]).tobytes())
        return digest.digest()


def _part(work: Work, rows: Sequence[int]) -> Work:
    types = None if work.type_ids is None else [work.type_ids[row] for row in rows]
    return replace(work, ids=[work.ids[row] for row in rows], type_ids=types)
