"""The processes of a job: who takes part, what they tell each other, and how a model is spread over them."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fastbert.engine.dtypes import resolve_device
from fastbert.models.layer_stack import LayerStack
from fastbert.train.layers import layers_of


class RankLost(RuntimeError):
    """Another process of the job ended or does not answer."""


@dataclass(frozen=True)
class World:
    """This process among those of the job.

    Attributes:
        rank, size: which of how many.
        device: where this one computes.
        timeout_s: after so many seconds a process that does not answer counts as lost.
        owned: whether `close` ends the process group: it was not there before.
    """

    rank: int
    size: int
    device: torch.device
    timeout_s: float
    owned: bool = False

    @classmethod
    def connect(cls, device: str | None = None, timeout_s: float = 1800.0) -> World:
        """Join the job that torchrun's variables describe, or a process group that exists; else be alone.

        Raises:
            ValueError: a device that this machine has not, or a process group without gloo.
        """
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        place = _device(device, local_rank)
        if place.type == "cuda":
            torch.cuda.set_device(place)
        owned = False
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
            owned = True
        if not dist.is_initialized():
            return cls(0, 1, place, timeout_s)
        if "gloo" not in str(dist.get_backend_config()):
            raise ValueError(
                f"the process group's backend is {dist.get_backend()}, but numbers of the host travel by gloo: "
                "initialise it with 'cpu:gloo,cuda:nccl', or leave that to train()"
            )
        return cls(dist.get_rank(), dist.get_world_size(), place, timeout_s, owned)

    @property
    def is_first(self) -> bool:
        """Rank 0: the one that evaluates, writes files and speaks."""
        return self.rank == 0

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """The numbers of every rank, as (size) lists in fp64; on the host, without a device's sync."""
        if self.size == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.float64)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(every, mine)
        return [row.tolist() for row in every]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, in place; on the device of `values`."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """A Python object of rank `source`."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, source, device=torch.device("cpu"))
        return box[0]

    def close(self) -> None:
        """Leave the job, if `connect` joined it."""
        if self.owned and dist.is_initialized():
            dist.destroy_process_group()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turn a broken connection into a `RankLost` that says what to do."""
        try:
            yield
        except RuntimeError as error:
            told = str(error)
            broken = isinstance(error, dist.DistError) or "gloo" in told or "NCCL" in told
            if self.size == 1 or not broken:
                raise
            raise RankLost(
                f"rank {self.rank} lost contact with the other {self.size - 1} of this job: one was killed, ran out of "
                f"memory, stopped with an error of its own (see its output), or did not answer within "
                f"{self.timeout_s:g} s. Start the job again with resume to continue from the last checkpoint. "
                f"({told.splitlines()[0][:200]})"
            ) from error


def _device(name: str | None, local_rank: int) -> torch.device:
    device = resolve_device(name)
    if device.type == "cuda" and device.index is None:
        return resolve_device(f"cuda:{local_rank}")
    return device


class Step(nn.Module):
    """What is wrapped for many devices: the objective's loss of a batch, as a module around the model."""

    def __init__(self, model: nn.Module, objective: Any) -> None:
        super().__init__()
        self.model = model
        self._objective = (objective,)  # in a tuple: a teacher in it is not a part of what is trained

    def forward(self, batch: Any) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
        """Sums and metrics of a prepared batch."""
        loss = self._objective[0].loss(self.model, batch)
        return dict(loss.sums), dict(loss.metrics)


class Spread:
    """A model on the ranks of a job: whole on each (DDP) or in shards (FSDP2).

    Attributes:
        model: what is trained; its parameters are DTensors under FSDP.
        step: `Step`, wrapped: by DDP in `begin`.
    """

    def __init__(self, model: nn.Module, objective: Any, world: World, strategy: str) -> None:
        self.model, self.world = model, world
        self.sharded = world.size > 1 and strategy == "fsdp"
        self.step: nn.Module = Step(model, objective)
        if world.size > 1:  # fresh weights are rank 0's
            for tensor in [*model.parameters(), *model.buffers()]:
                dist.broadcast(tensor.detach(), 0)
        self._copy = copy.deepcopy(model).cpu() if self.sharded else None
        if self.sharded:
            mesh = dist.init_device_mesh(world.device.type, (world.size,))
            for stack in [m for m in model.modules() if isinstance(m, LayerStack)]:
                layers = layers_of(stack)
                if len(set(layers)) == len(layers):  # a layer that runs many times stays with the root
                    for layer in layers:
                        fully_shard(layer, mesh=mesh)
            fully_shard(self.step, mesh=mesh)

    def begin(self, batch: Any) -> None:
        """Before the first step: one backward pass shows whether any parameter stays without a gradient.

        An unused head must keep none, as on one device, so that it does not decay: DDP looks for such parameters in
        every step, if it is told to, and warns where there are none.

        Args:
            batch: a prepared one. All ranks must call it.
        """
        if self.world.size == 1 or self.sharded or isinstance(self.step, DistributedDataParallel):
            return
        trained = [p for p in self.model.parameters() if p.requires_grad]
        with torch.random.fork_rng([self.world.device] if self.world.device.type == "cuda" else []):
            sums, _ = self.step(batch)
            gradients = torch.autograd.grad(torch.stack(list(sums.values())).sum(), trained, allow_unused=True)
        idle = self.world.gather([float(any(g is None for g in gradients))])
        self.step = DistributedDataParallel(self.step, find_unused_parameters=[1.0] in idle)

    def sync(self, last: bool) -> Any:
        """Context of one micro-batch: gradients travel with the last one only."""
        if isinstance(self.step, FSDPModule):
            self.step.set_requires_gradient_sync(last)
            self.step.set_is_last_backward(last)
        elif isinstance(self.step, DistributedDataParallel) and not last:
            return self.step.no_sync()
        return nullcontext()

    def settle(self, values: Mapping[str, Tensor] | None = None) -> nn.Module:
        """The model to hand back when training is over: unsharded, with `values` by parameter name if they are given.

        All ranks must call it.
        """
        if self._copy is None:
            fill(self.model, values or {})
            return self.model
        with self.whole(values) as model:
            pass
        return model.to(self.world.device)

    @contextmanager
    def whole(self, instead: Mapping[str, Tensor] | None = None) -> Iterator[nn.Module]:
        """The model unsharded, on every rank; with the values of `instead`, by parameter name, for so long.

        All ranks must enter. Under FSDP it is a copy, on the rank's device while it is used.
        """
        own = dict(self.model.named_parameters())
        values = own if instead is None else instead
        if self._copy is not None:
            fill(self._copy, {name: full(value) for name, value in values.items()})
            yield self._copy.to(self.world.device)
            self._copy.cpu()
        elif instead is None:
            yield self.model
        else:
            before = {name: parameter.detach().clone() for name, parameter in own.items()}
            fill(self.model, values)
            try:
                yield self.model
            finally:
                fill(self.model, before)


@torch.no_grad()
def fill(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into parameters of the same names."""
    own = dict(model.named_parameters())
    for name, value in values.items():
        own[name].copy_(value)


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; all ranks must call it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    """This rank's share of a whole tensor, spread as `parameter` is."""
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
