"""What happened since the last line of the log: losses, metrics, tokens. Values stay on the device until it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastbert.train.distributed import World


@dataclass(frozen=True)
class Place:
    """A step of a run: how many were done before it, its epoch, how many of that were done; its learning rate."""

    step: int
    epoch: int
    epoch_step: int
    learning_rate: float


@dataclass
class Window:
    """Steps since the last line of the log."""

    places: list[Place] = field(default_factory=list)
    losses: list[dict[str, Tensor]] = field(default_factory=list)  # this rank's part of each term's mean
    norms: list[Tensor] = field(default_factory=list)
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    num_tokens: float = 0.0
    num_pairs: float = 0.0

    def add_metrics(self, metrics: Mapping[str, tuple[Tensor, Tensor]], share: float) -> None:
        """(sum, count) of one micro-batch; `share` 0 names its metrics without counting them."""
        for name, (total, count) in metrics.items():
            zero = torch.zeros((), dtype=torch.float64, device=total.device)
            old = self.metrics.get(name, (zero, zero))
            self.metrics[name] = (old[0] + share * _wide(total), old[1] + share * _wide(count))

    def add_step(self, place: Place, losses: dict[str, Tensor], norm: Tensor, counted: tuple[float, float]) -> None:
        """One step: this rank's part of each term, the gradient's norm, tokens and pairs of all ranks."""
        self.places.append(place)
        self.losses.append(losses)
        self.norms.append(norm)
        self.num_tokens += counted[0]
        self.num_pairs += counted[1]

    def read(
        self, world: World, weights: Mapping[str, float], judge_norms: bool
    ) -> tuple[dict[str, float], Place | None]:
        """Means over the window and all ranks; the one sync of the device.

        All ranks must call it.

        Args:
            weights: term -> weight in the total.
            judge_norms: whether a gradient that is not finite is an error; under a loss scale it is not.

        Returns:
            (values, bad): `loss`, each term where there are several, metrics, `grad_norm` of the last step; and the
            first step whose loss or gradient is not finite, or None.
        """
        terms = sorted(weights)
        steps = torch.stack([torch.stack([_wide(loss[t]) for t in terms]) for loss in self.losses])  # (steps, terms)
        names = sorted(self.metrics)
        flat = [steps.flatten(), *(torch.stack(self.metrics[name]) for name in names)]
        every = world.sum(torch.cat(flat)).cpu()
        steps, metrics = every[: steps.numel()].view(steps.shape), every[steps.numel() :].view(-1, 2).tolist()
        totals = steps @ steps.new_tensor([weights[t] for t in terms])
        norms = torch.stack([_wide(n) for n in self.norms]).cpu()
        wrong = ~(totals.isfinite() & norms.isfinite()) if judge_norms else ~totals.isfinite()
        values = {"loss": float(totals.mean())}
        if len(terms) > 1:
            values |= dict(zip(terms, steps.mean(0).tolist(), strict=True))
        values |= {name: total / count for name, (total, count) in zip(names, metrics, strict=True) if count}
        values["grad_norm"] = float(norms[-1])
        return values, self.places[int(wrong.nonzero()[0])] if wrong.any() else None


def _wide(x: Tensor) -> Tensor:
    return x.detach().double()
