"""One optimiser step: micro-batches to gradients that equal those of the whole batch, then the update."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.train.arguments import TrainArguments
from fastbert.train.batch import TrainBatch
from fastbert.train.distributed import Spread, World, full
from fastbert.train.objectives.loss import Objective
from fastbert.train.optim import build_optimizer
from fastbert.train.precision import choose_precision
from fastbert.train.window import Place, Window


class NonFinite(RuntimeError):
    """A loss or a gradient that is NaN or infinite.

    Attributes:
        place: the step it happened in.
    """

    def __init__(self, place: Place, message: str) -> None:
        super().__init__(message)
        self.place = place


@dataclass(frozen=True)
class Agreed:
    """What the ranks know of each other before a step.

    Attributes:
        signal: number of a signal that one of them got, or 0.
        elapsed_s: rank 0's clock, so that all take the same learning rate and stop together.
        num_micro: most micro-batches on any rank.
        lender: a rank that has so many, if another has none.
        num_tokens, num_pairs: of all ranks; a pair is a query and a key of one sequence.
    """

    signal: int
    elapsed_s: float
    num_micro: int
    lender: int | None
    num_tokens: float
    num_pairs: float


def agree(world: World, batches: Sequence[TrainBatch], signal: int | None, elapsed_s: float) -> Agreed:
    """Exchange what `Agreed` holds; all ranks must call it."""
    tokens = sum(batch.packed.num_tokens for batch in batches)
    pairs = sum(float(batch.packed.lengths.double().square().sum()) for batch in batches)
    rows = world.gather([signal or 0, elapsed_s, len(batches), tokens, pairs])
    signals, clocks, counts, all_tokens, all_pairs = zip(*rows, strict=True)
    most = int(max(counts))
    lender = counts.index(most) if min(counts) == 0 else None
    return Agreed(int(max(signals)), clocks[0], most, lender, sum(all_tokens), sum(all_pairs))


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of what a rank draws in a step: no state of a generator need be saved."""
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Stepper:
    """Makes optimiser steps.

    The loss of a step is sum over terms of weight * (sum of the term) / (its units), where both are over all
    micro-batches and ranks: the units are counted before the first forward pass, so that every part is divided by the
    right number at once, and accumulation and ranks do not change what is minimised.

    Attributes:
        averages: name -> moving average of a parameter, or None.
        precision: dtype of matrix products.
    """

    def __init__(self, spread: Spread, objective: Objective, arguments: TrainArguments, world: World) -> None:
        self.spread, self.objective, self.arguments, self.world = spread, objective, arguments, world
        self.optimizer = build_optimizer(spread.model, arguments)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.precision = choose_precision(arguments, world.device)
        scaled = self.precision == torch.float16
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=scaled)
        self.averages: dict[str, Tensor] | None = None
        if arguments.ema_decay:
            self.averages = {n: p.detach().clone() for n, p in spread.model.named_parameters() if p.requires_grad}

    def __call__(
        self, place: Place, batches: Sequence[TrainBatch], agreed: Agreed, factor: float, window: Window
    ) -> None:
        """One step; what it lost goes into `window`.

        Args:
            factor: share of the peak learning rate.

        Raises:
            NonFinite: a loss or gradient is not finite, where looking costs no sync of the device (on the CPU); the
                weights are as they were.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.arguments.learning_rate * group["lr_scale"] * factor
        torch.manual_seed(step_seed(self.arguments.seed, place.step, self.world.rank))
        prepared = [self.objective.prepare(batch.to(self.world.device)) for batch in batches]
        units = self._units(prepared)
        losses = self._backward(self._evened(prepared, agreed), len(prepared), units, window)
        norm = self._clip()
        window.add_step(place, losses, norm, (agreed.num_tokens, agreed.num_pairs))
        if self.world.device.type == "cpu":
            self._look(place, losses, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._average()

    def _units(self, prepared: Sequence[TrainBatch]) -> dict[str, Tensor]:
        """Term -> units of the step on all ranks."""
        names = sorted(self.objective.weights)
        counts = torch.zeros(len(names), dtype=torch.int64, device=self.world.device)
        for batch in prepared:
            of_batch = self.objective.counts(batch)
            counts += torch.stack([of_batch[name] for name in names])
        return dict(zip(names, self.world.sum(counts).clamp(min=1).unbind(), strict=True))

    def _evened(self, prepared: list[TrainBatch], agreed: Agreed) -> list[TrainBatch]:
        """As many micro-batches as any rank has: the last one comes again, or another rank's is borrowed."""
        if agreed.lender is not None:
            mine = prepared[0].to("cpu") if self.world.rank == agreed.lender else None
            lent = self.world.broadcast(mine, agreed.lender)
            prepared = prepared or [lent.to(self.world.device)]
        return [*prepared, *[prepared[-1]] * (agreed.num_micro - len(prepared))]

    def _backward(
        self, evened: Sequence[TrainBatch], num_own: int, units: Mapping[str, Tensor], window: Window
    ) -> dict[str, Tensor]:
        """Gradients; returns this rank's part of each term. Batches past `num_own` count nothing."""
        zero = torch.zeros((), dtype=torch.float64, device=self.world.device)
        losses = dict.fromkeys(units, zero)
        with self._autocast():
            self.spread.begin(evened[0])
        for i, batch in enumerate(evened):
            share = 1.0 if i < num_own else 0.0
            with self.spread.sync(last=i == len(evened) - 1):
                with self._autocast():
                    sums, metrics = self.spread.step(batch)
                means = {name: share * total / units[name] for name, total in sums.items()}
                loss = torch.stack([self.objective.weights[name] * mean for name, mean in means.items()]).sum()
                # Ranks average their gradients; the units are of all ranks already.
                self.scaler.scale(loss * self.world.size).backward()
            window.add_metrics(metrics, share)
            losses = {name: part + means[name].detach() if name in means else part for name, part in losses.items()}
        return losses

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.world.device.type, self.precision)

    def _clip(self) -> Tensor:
        """The gradient's norm before it is scaled down to `max_grad_norm`."""
        self.scaler.unscale_(self.optimizer)
        norm = full(nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))
        if self.arguments.max_grad_norm:
            nn.utils.clip_grads_with_norm_(self.parameters, self.arguments.max_grad_norm, norm)
        return norm

    def _look(self, place: Place, losses: Mapping[str, Tensor], norm: Tensor) -> None:
        told = {name: float(value) for name, value in losses.items()} | {"gradient norm": float(norm)}
        if self.scaler.is_enabled():  # a gradient that overflows is skipped and the scale lowered
            told.pop("gradient norm")
        if not all(map(math.isfinite, told.values())):
            raise NonFinite(place, ", ".join(f"{name} is {value}" for name, value in told.items()))

    @torch.no_grad()
    def _average(self) -> None:
        if self.averages is not None:
            own = dict(self.spread.model.named_parameters())
            for name, average in self.averages.items():
                average.lerp_(own[name].detach(), 1.0 - self.arguments.ema_decay)
