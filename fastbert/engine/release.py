"""What stands in a model for weights that an engine has packed and that were let go."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastbert.models.pretrained import PreTrainedModel
from fastbert.models.quantize import Int8Linear

_GONE = (
    "the weights of this model were let go when its engine had packed them (keep_weights=False): training, "
    "state_dict(), copies, other dtypes or devices, hidden states and attentions need them. Load the model again "
    "and keep them"
)
# What may still be asked of such a weight: what it was, not what it held.
_ASKED = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_meta", "nbytes")
} | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.element_size}


class Released(torch.Tensor):
    """A weight without values: whatever would read or write them raises a RuntimeError that says why."""

    def __new__(cls, weight: torch.Tensor) -> Released:
        """With the shape and dtype of `weight`, on the meta device."""
        made = torch.empty_like(weight, device="meta", requires_grad=False).as_subclass(cls)
        made._is_param = isinstance(weight, nn.Parameter)
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _ASKED:
            raise RuntimeError(_GONE)
        return super().__torch_function__(func, types, args, kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Released({tuple(self.shape)}, {self.dtype})"


def own_memory(model: PreTrainedModel, parts: tuple[nn.Module, ...]) -> None:
    """Copy what stays, all but the weights of linear layers in `parts`: it may lie in the checkpoint's mapped file,
    which stays resident as long as one tensor does."""
    leaving = {id(weight) for part in parts for _, weight in _linears(part)}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in leaving:
            tensor.data = tensor.data.clone()


def let_go(parts: tuple[nn.Module, ...]) -> None:
    """Put a `Released` in the place of each linear layer's weight."""
    for part in parts:
        for linear, weight in _linears(part):
            held = linear._buffers if isinstance(linear, Int8Linear) else linear._parameters
            held["weight"] = Released(weight)  # type: ignore[assignment]


def trim() -> None:
    """Return free memory to the system, where its C library would rather keep it (glibc)."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def _linears(part: nn.Module) -> list[tuple[nn.Module, torch.Tensor]]:
    return [(m, m.weight) for m in part.modules() if isinstance(m, (nn.Linear, Int8Linear))]
