"""Modules whose call can only mean what their class says, so that it may be computed in another way."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module is of exactly this class, unpatched and without hooks: PEFT, quantisation, parametrisation and
    profilers make others."""
    state = module.__dict__
    hooked = any(state[f"_{way}_hooks"] or state[f"_{way}_pre_hooks"] for way in ("forward", "backward"))
    return type(module) is kind and "forward" not in state and not hooked


def split_linear(linear: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x W^T and the bias, for the op after it to add: that one's backward has the bias's gradient in registers. A
    module that is no plain linear layer adds its own, and there is None left."""
    if isinstance(linear, nn.Linear) and is_plain(linear, nn.Linear):
        return F.linear(x, linear.weight), linear.bias
    return linear(x), None
