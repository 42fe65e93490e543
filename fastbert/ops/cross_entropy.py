"""loss = mean (or sum) over labelled rows of logsumexp(logits) - logits[label]: the vocabulary loss of masked rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastbert.ops.dispatch import backend_for, can_look, check_devices


def cross_entropy_ref(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> torch.Tensor:
    """The specification: softmax and sum in fp32 (fp64 for fp64)."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), labels, ignore_index=ignore_index, reduction=reduction)


class CrossEntropyFunction(torch.autograd.Function):
    """Saves the logits and each row's log-sum-exp; probabilities are computed again in backward."""

    @staticmethod
    def forward(
        ctx: Any, backend: Any, logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, reduction: str
    ) -> torch.Tensor:
        losses, lse = backend.cross_entropy_fwd(logits, labels, ignore_index)
        num_labelled = (labels != ignore_index).sum() if reduction == "mean" else None
        ctx.backend, ctx.ignore_index = backend, ignore_index
        ctx.save_for_backward(logits, labels, lse, num_labelled)
        return losses.sum() if num_labelled is None else losses.sum() / num_labelled

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[Any, ...]:
        logits, labels, lse, num_labelled = ctx.saved_tensors
        scale = dloss if num_labelled is None else dloss / num_labelled
        return None, ctx.backend.cross_entropy_bwd(scale, logits, labels, lse, ctx.ignore_index), None, None, None


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> torch.Tensor:
    """Cross-entropy over the rows whose label is not `ignore_index`.

    Args:
        logits: (M, V), any float dtype. Give it the masked rows only: (T, V) logits need never exist.
        labels: (M) int64 in [0, V), or `ignore_index`.
        reduction: `"mean"` over the labelled rows, or their `"sum"`.

    Returns:
        Scalar, fp32 (fp64 for fp64 logits); where no row is labelled the mean is NaN, as
        `torch.nn.CrossEntropyLoss` gives, and the sum 0. Saved for backward: the logits and the log-sum-exp (M).

    Raises:
        ValueError: shapes that do not match, or another reduction.
        IndexError: a label outside the vocabulary (checked on the CPU only).
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; it must be 'mean' or 'sum'")
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits must be (M, V) and labels (M), got {tuple(logits.shape)} and {tuple(labels.shape)}")
    if can_look(labels):
        wrong = ((labels < 0) | (labels >= logits.shape[1])) & (labels != ignore_index)
        if wrong.any():
            raise IndexError(
                f"label {int(labels[wrong][0])} is outside the {logits.shape[1]} classes "
                f"and is not ignore_index={ignore_index}"
            )
    check_devices(logits=logits, labels=labels)
    backend = backend_for("cross_entropy", logits)
    if backend is None:
        return cross_entropy_ref(logits, labels, ignore_index, reduction)
    return CrossEntropyFunction.apply(backend, logits.contiguous(), labels.contiguous(), ignore_index, reduction)
