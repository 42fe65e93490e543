"""Trained models to 8-bit inference: swaps linear layers for int8 ones. It trains nothing and calibrates nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import nn

from fastbert.models.pretrained import PreTrainedModel
from fastbert.ops.int8_linear import int8_linear, quantize_rows

M = TypeVar("M", bound=PreTrainedModel)


class Int8Linear(nn.Module):
    """An `nn.Linear` whose weight is int8 with one fp32 scale per output channel; a quarter of the memory."""

    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantize_rows(linear.weight.detach())
        # Shape (N, K), memory (K, N): torch's int8 product on a CPU is 3x faster so (Zen 5, 2048x384x1536).
        self.register_buffer("weight", weight.mT.contiguous().mT)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, K) -> (T, N) in the dtype of `x`."""
        return int8_linear(x, self.weight, self.weight_scale, self.bias)


def quantize_int8(model: M, keep: Sequence[str] = ("qkv", "embedding_hidden_mapping_in")) -> M:
    """Swap, in place, the linear layers of the encoder for `Int8Linear`; the float weights are let go.

    Args:
        model: a trained model; embeddings, norms, pooler and heads stay as they are.
        keep: names of linear layers that stay in float. The projections to queries, keys and values are the ones
            that 8 bits hurt most: with them kept, MiniLM's cosine to fp32 is above 0.998.

    Raises:
        ValueError: the model's encoder has no linear layer that could be swapped (already quantised?).
    """
    swapped = 0
    for parent in list(model.get_submodule("encoder").modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name not in keep:
                setattr(parent, name, Int8Linear(child))
                swapped += 1
    if not swapped:
        raise ValueError(f"{type(model).__name__} has no float linear layer besides {tuple(keep)}: already in int8?")
    return model.eval()
