"""What is done with finished vectors: fewer bits, and similarities. It knows no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

Vectors = torch.Tensor | np.ndarray | Sequence[Any]

PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")


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
