"""Floating-point operations of training, and the roof of a device: what model-FLOP utilisation is made of.

Model FLOPs are what the equations need (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): layers computed again
under gradient checkpointing do not count, nor do a frozen teacher, normalisations and activations.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

from fastbert.train.layers import encoders, layers_of


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of forward and backward: `per_token` * tokens + `per_pair` * sum of squared lengths."""

    per_token: float
    per_pair: float

    def __call__(self, num_tokens: float, num_pairs: float) -> float:
        """FLOPs of `num_tokens` tokens whose sequences have `num_pairs` (query, key) pairs in all."""
        return self.per_token * num_tokens + self.per_pair * num_pairs


def model_flops(model: nn.Module) -> ModelFlops:
    """6 FLOPs a parameter and token for what is not a table of embeddings, 12 D a pair of tokens and layer.

    A layer that runs several times counts each time. Heads count for every token, although a masked-LM head sees
    masked rows only; its decoder is left out where it is tied to a table.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    parameters = sum(p.numel() for p in model.parameters() if id(p) not in tables)
    per_pair = 0.0
    for base in encoders(model):
        layers = layers_of(base.encoder)
        again = len(layers) - len(set(layers))
        if again:
            parameters += again * sum(p.numel() for p in layers[0].parameters())
        per_pair += 12.0 * base.config.hidden_size * len(layers)
    return ModelFlops(6.0 * parameters, per_pair)


def matmul_roof(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on `device`, measured in a fraction of a second, however slow the dtype is."""
    best = 0.0
    for n in (256, 512, 1024) if device.type == "cpu" else (1024, 4096, 8192):
        x = torch.ones(n, n, device=device, dtype=dtype)
        seconds = min(_product_seconds(x) for _ in range(4))  # the first warms up
        best = max(best, 2.0 * n**3 / seconds)
        if seconds > 0.05:
            break
    return best


def _product_seconds(x: torch.Tensor) -> float:
    _wait(x.device)
    start = time.perf_counter()
    torch.mm(x, x)
    _wait(x.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
