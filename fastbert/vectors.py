"""What is done with finished vectors: off the device, fewer bits, and similarities. It knows no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

Vectors = torch.Tensor | np.ndarray | Sequence[Any]

PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")

COPY = 16384  # vectors that wait on the device: a GPU is not waited for at each batch


def _to_host(x: torch.Tensor) -> tuple[torch.Tensor, Callable[[], object]]:
    """`x` in pinned memory, and what waits until it is there: the device goes on meanwhile."""
    pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    pinned.copy_(x, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    return pinned, done.synchronize


class Collector:
    """Puts vectors that come batch by batch into their rows of the caller's buffer.

    From a GPU they leave `COPY` at a time through pinned memory, and while one copy is under way the next batches are
    computed: the host waits for the device only as it writes the copy before.

    Args:
        out: (N, D) fp32 on the host.
    """

    def __init__(self, out: torch.Tensor) -> None:
        self._out = out
        self._rows: list[int] = []
        self._parts: list[torch.Tensor] = []
        self._pending: tuple[list[int], torch.Tensor, Callable[[], object]] | None = None

    def add(self, rows: Sequence[int], vectors: torch.Tensor) -> None:
        """vectors: (len(rows), D), on any device."""
        self._rows += rows
        self._parts.append(vectors)
        if len(self._rows) >= COPY:
            self._leave()

    def finish(self) -> torch.Tensor:
        """`out`, with every vector in it."""
        self._leave()
        self._write()
        return self._out

    def _leave(self) -> None:
        if not self._parts:
            return
        found = self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts)
        before, rows = self._pending, self._rows
        self._rows, self._parts = [], []
        if found.device.type == "cpu":
            self._put(rows, found)
            return
        leaving = (rows, *_to_host(found))
        self._pending = before
        self._write()
        self._pending = leaving

    def _put(self, rows: list[int], found: torch.Tensor) -> None:
        if len(rows) == len(self._out) == 1:
            self._out.copy_(found)
        else:
            self._out[rows] = found

    def _write(self) -> None:
        if self._pending is not None:
            rows, pinned, wait = self._pending
            wait()
            self._put(rows, pinned)
            self._pending = None


def quantize_vectors(vectors: np.ndarray, precision: str) -> np.ndarray:
    """Vectors in fewer bits, as `sentence_transformers.quantize_embeddings` makes them.

    Args:
        vectors: (N, D) float32.
        precision: `float32`; `int8`, `uint8`: 256 steps between each dimension's least and greatest value in
            `vectors`; `binary` (int8), `ubinary` (uint8): one bit a dimension, 8 dimensions a byte.

    Returns:
        (N, D), or (N, ceil(D / 8)) for the binary ones.

    Raises:
        ValueError: an unknown precision, or 8 bits of a single vector, which has no range.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    if precision == "float32":
        return vectors
    if precision.endswith("binary"):
        bits = np.packbits(vectors > 0, axis=-1)
        return bits if precision == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8)
    dtype = np.int8 if precision == "int8" else np.uint8
    if len(vectors) == 0:
        return vectors.astype(dtype)
    if len(vectors) == 1:
        raise ValueError(f"precision {precision!r} needs the range of several vectors, but there is one: encode more")
    low = vectors.min(axis=0)
    step = (vectors.max(axis=0) - low) / 255
    levels = np.clip(np.floor((vectors - low) / np.where(step == 0, 1, step)), 0, 255)
    return (levels - 128 if precision == "int8" else levels).astype(dtype)


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).mT


_MATRIX: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cosine": _cosine,
    "dot": lambda a, b: a @ b.mT,
    "euclidean": lambda a, b: -torch.cdist(a, b),
    "manhattan": lambda a, b: -torch.cdist(a, b, p=1.0),
}
_PAIRWISE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cosine": lambda a, b: (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(dim=-1),
    "dot": lambda a, b: (a * b).sum(dim=-1),
    "euclidean": lambda a, b: -torch.linalg.vector_norm(a - b, dim=-1),
    "manhattan": lambda a, b: -(a - b).abs().sum(dim=-1),
}


def similarity(name: str, a: Vectors, b: Vectors) -> torch.Tensor:
    """(N, D), (M, D) -> (N, M): `cosine`, `dot`, or the negative `euclidean` or `manhattan` distance."""
    return _MATRIX[name](_rows(a), _rows(b))


def similarity_pairwise(name: str, a: Vectors, b: Vectors) -> torch.Tensor:
    """(N, D), (N, D) -> (N): the similarity of each row of `a` to the same row of `b`."""
    return _PAIRWISE[name](_float(a), _float(b))


def _float(vectors: Vectors) -> torch.Tensor:
    if isinstance(vectors, Sequence):
        tensors = len(vectors) > 0 and isinstance(vectors[0], torch.Tensor)
        vectors = torch.stack(list(vectors)) if tensors else np.asarray(vectors, dtype=np.float32)
    tensor = torch.as_tensor(vectors)
    return tensor if tensor.is_floating_point() else tensor.float()


def _rows(vectors: Vectors) -> torch.Tensor:
    tensor = _float(vectors)
    return tensor[None] if tensor.ndim == 1 else tensor
