"""Whatever runs layers one after the other: what it records on request, what it computes again in backward."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastbert.packing import PackedBatch


@dataclass
class Trace:
    """What a forward pass records on request: hidden states (T, D) and probabilities, each a list over layers."""

    hidden_states: list[torch.Tensor] | None = None
    attentions: list[list[torch.Tensor]] | None = None

    def hidden(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Record and pass on."""
        if self.hidden_states is not None:
            self.hidden_states.append(hidden_TD)
        return hidden_TD


class LayerStack(nn.Module):
    """Runs layers, on request with gradient checkpointing (Chen et al. 2016, arXiv 1604.06174)."""

    def __init__(self) -> None:
        super().__init__()
        self.checkpoint_kwargs: dict[str, Any] | None = None
        self.checkpoint_every = 1

    def run(
        self, layers: Iterable[nn.Module], x: torch.Tensor, batch: PackedBatch, trace: Trace, *args: Any
    ) -> torch.Tensor:
        """(T, D) -> (T, D) through all layers; a checkpointed one keeps its input only and runs again in backward."""
        checkpointing = self.checkpoint_kwargs is not None and self.training and torch.is_grad_enabled()
        for i, layer in enumerate(layers):
            x = trace.hidden(x)
            if checkpointing and i % self.checkpoint_every == 0:
                x = checkpoint(layer, x, batch, trace, *args, **(self.checkpoint_kwargs or {}))
            else:
                x = layer(x, batch, trace, *args)
        return trace.hidden(x)
