"""What training will cost, before it begins: memory that is counted, speed that is measured in one short pass."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from fastbert.train.batch import TrainBatch
from fastbert.train.objectives.loss import Objective

PROBE_SECONDS = 1.0


@dataclass(frozen=True)
class Probe:
    """Forward and backward passes of one batch.

    Attributes:
        num_tokens: of the batch.
        seconds: the fastest pass took.
        saved_bytes: what forward keeps for backward, beside the parameters.
    """

    num_tokens: int
    seconds: float
    saved_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Of training without the optimiser's step."""
        return self.num_tokens / self.seconds

    @property
    def saved_bytes_per_token(self) -> float:
        """Memory that a token of a forward pass takes."""
        return self.saved_bytes / self.num_tokens


def probe(model: Any, objective: Objective, batch: TrainBatch, device: torch.device, precision: torch.dtype) -> Probe:
    """Measure forward and backward passes on `device` for some seconds, after one that warms up; nothing is updated.

    Args:
        model: moved to the device, left in `train()` without gradients.
        precision: dtype of matrix products, as `fastbert.train.precision.choose_precision` gives it.
    """
    model, batch = model.to(device).train(), batch.to(device)
    saved = _saved_bytes(model, objective, batch, precision)
    passes = [_timed_pass(model, objective, batch, precision)]
    while len(passes) < 2 or (sum(passes) < PROBE_SECONDS and len(passes) < 20):
        passes.append(_timed_pass(model, objective, batch, precision))
    return Probe(batch.packed.num_tokens, min(passes), saved)


def _timed_pass(model: Any, objective: Objective, batch: TrainBatch, precision: torch.dtype) -> float:
    _synchronize(batch)
    start = time.perf_counter()
    _loss(model, objective, batch, precision).backward()
    _synchronize(batch)
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return seconds


def _saved_bytes(model: nn.Module, objective: Objective, batch: TrainBatch, precision: torch.dtype) -> int:
    """Storage, each once, that autograd holds after a forward pass."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(count, lambda tensor: tensor):
        loss = _loss(model, objective, batch, precision)
    loss.backward()
    model.zero_grad(set_to_none=True)
    return sum(held.values())


def _loss(model: Any, objective: Objective, batch: TrainBatch, precision: torch.dtype) -> torch.Tensor:
    device = batch.index.device.type
    with nullcontext() if precision == torch.float32 else torch.autocast(device, precision):
        return objective(model, batch)[0]


def _synchronize(batch: TrainBatch) -> None:
    if batch.index.device.type == "cuda":
        torch.cuda.synchronize(batch.index.device)


def state_bytes(model: nn.Module) -> int:
    """Weights, gradients and the two moments of Adam or LAMB, in fp32; parameters that are not trained count once."""
    return sum(p.numel() * (16 if p.requires_grad else 4) for p in model.parameters())
