"""What a checkpoint of a run holds, and how a run is put together again from one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastbert.train.arguments import TrainArguments
from fastbert.train.checkpoint import (
    AVERAGES,
    OPTIMIZER,
    STATE,
    CheckpointError,
    Checkpoints,
    optimizer_tensors,
    read_averages,
    read_optimizer,
    write_model,
)
from fastbert.train.distributed import World, full, sharded_like
from fastbert.train.stepper import Stepper
from fastbert.weights import read_json

# A run that continues must agree in these: the order of the data and the kind of moments hang on them.
_BINDING = ("seed", "batch_size", "batch_tokens", "drop_last", "optim")
# These never change what is computed.
_FREE = (
    "output_dir", "resume", "overwrite", "quiet", "report_to", "device", "ddp_timeout", "peak_tflops", "logging_steps",
    "save_strategy", "save_steps", "save_total_limit",
)  # fmt: skip


@dataclass
class Position:
    """How far a run is.

    Attributes:
        step: optimiser steps done.
        epoch, epoch_step: the epoch, and its steps done.
        elapsed_s: seconds of training; evaluations and checkpoints do not count.
        num_tokens: tokens seen, on all ranks.
        best, best_step: the best evaluation and its step.
        without_gain: evaluations since.
    """

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    elapsed_s: float = 0.0
    num_tokens: float = 0.0
    best: float | None = None
    best_step: int | None = None
    without_gain: int = 0

    def judge(self, value: float, more_is_better: bool, threshold: float) -> bool:
        """Take an evaluation of the present step in; whether it is the best so far. NaN never is."""
        gain = math.inf if self.best is None else (value - self.best) * (1.0 if more_is_better else -1.0)
        if math.isnan(value) or not gain > threshold:
            self.without_gain += 1
            return False
        self.best, self.best_step, self.without_gain = value, self.step, 0
        return True


@dataclass(frozen=True)
class Start:
    """Where a run begins: at the beginning, or at a checkpoint.

    Attributes:
        folder: the checkpoint, or None.
        history: records of the log until there.
        scaler: state of the loss scale.
        changed: settings that differ from the run that wrote it, as text.
        epoch_steps: steps of the first epoch then.
    """

    position: Position
    folder: Path | None = None
    history: tuple[dict[str, Any], ...] = ()
    scaler: Mapping[str, Any] | None = None
    changed: tuple[str, ...] = ()
    epoch_steps: int | None = None

    def check_data(self, loader: Any) -> None:
        """Raise ValueError where the data is not what the run began with."""
        if self.epoch_steps is not None and loader.num_steps(0) != self.epoch_steps:
            raise ValueError(
                f"the data is not what {self.folder} was trained on: its first epoch had {self.epoch_steps} steps, now "
                f"it has {loader.num_steps(0)}. Give the old data, or start anew in another output_dir"
            )

    @classmethod
    def find(cls, checkpoints: Checkpoints | None, arguments: TrainArguments, world: World) -> Start:
        """What the output folder offers, as `resume` and `overwrite` say; rank 0 looks, all ranks must call it.

        Raises:
            FileExistsError: there are checkpoints, and neither is set.
            ValueError: the checkpoint is of a run whose steps were other ones.
        """
        folder = None
        if checkpoints is not None:
            if arguments.overwrite:
                checkpoints.discard()
            folder = checkpoints.newest()
        folder = world.broadcast(folder)
        if folder is None:
            return cls(Position())
        if not arguments.resume:
            raise FileExistsError(
                f"{folder.parent} already has {folder.name}: resume continues that run, overwrite discards it"
            )
        state = read_json(folder / STATE)
        changed = _compare(state["arguments"], _plain(arguments), folder)
        history, steps = tuple(state["log_history"]), state["epoch_steps"]
        return cls(Position(**state["position"]), folder, history, state["scaler"], changed, steps)


def _compare(then: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    changed = {name: (then[name], now[name]) for name in now if name in then and now[name] != then[name]}
    for name in _BINDING:
        if name in changed:
            raise ValueError(
                f"{folder} was written with {name}={changed[name][0]!r}, now it is {changed[name][1]!r}: a run cannot "
                "change that half way. Give the old value, or start anew in another output_dir"
            )
    return tuple(f"{name} was {a!r}, now {b!r}" for name, (a, b) in changed.items() if name not in _FREE)


def _plain(arguments: TrainArguments) -> dict[str, Any]:
    """Arguments as JSON gives them back."""
    return json.loads(json.dumps(asdict(arguments), default=str))


class Saver:
    """Writes checkpoints of a run; on all ranks, of which the first writes."""

    def __init__(
        self,
        checkpoints: Checkpoints | None,
        stepper: Stepper,
        save: Callable[[nn.Module, Path], None],
        arguments: TrainArguments,
        world: World,
    ) -> None:
        """
        Args:
            checkpoints: None on other ranks than the first.
            save: writes the model's own files into a folder.
        """
        self.checkpoints, self.stepper, self.world, self.arguments = checkpoints, stepper, world, arguments
        self._save = save
        self.last: int | None = None

    def __call__(self, position: Position, history: list[dict[str, Any]], epoch_steps: int) -> None:
        """Write `checkpoint-<step>`, unless this step has one already. All ranks must call it.

        Args:
            epoch_steps: steps of the first epoch, by which other data is told when the run continues.

        Raises:
            CheckpointError: it could not be written.
            RuntimeError: a weight is not finite; nothing is written.
        """
        if self.last == position.step:
            return
        self._require_finite(position.step)
        tensors = self._tensors()
        error = None
        with self.stepper.spread.whole() as model:
            if self.checkpoints is not None:
                state = {
                    "position": asdict(position),
                    "arguments": _plain(self.arguments),
                    "scaler": self.stepper.scaler.state_dict(),
                    "ranks": self.world.size,
                    "epoch_steps": epoch_steps,
                    "log_history": history,
                }
                write = partial(self._write, model=model, tensors=tensors)
                try:
                    self.checkpoints.save(position.step, write, state, position.best_step)
                except CheckpointError as caught:
                    error = caught
        if told := self.world.broadcast(None if error is None else str(error)):
            raise CheckpointError(told) from error
        self.last = position.step

    def _write(self, folder: Path, model: nn.Module, tensors: Mapping[str, dict[str, Tensor]]) -> None:
        write_model(model, folder, self._save)
        for name, content in tensors.items():
            save_file(content, folder / name)

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """File -> tensors, unsharded on the CPU; empty where nothing is written and no rank needs a share."""
        if self.checkpoints is None and not self.stepper.spread.sharded:
            return {}
        files = {OPTIMIZER: optimizer_tensors(self.stepper.optimizer)}
        if self.stepper.averages is not None:
            files[AVERAGES] = {name: full(value).cpu().contiguous() for name, value in self.stepper.averages.items()}
        return files

    def _require_finite(self, step: int) -> None:
        parts = [_local(p.detach()) for p in self.stepper.parameters]
        greatest = torch.stack([part.abs().amax() for part in parts if part.numel()])
        flags = self.world.gather([float(greatest.isfinite().all())])
        if not all(flag for (flag,) in flags):
            raise RuntimeError(f"a weight is not finite at step {step}: no checkpoint of it is written")


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def restore(start: Start, stepper: Stepper) -> None:
    """Put optimiser, averages and loss scale of a checkpoint back; the weights were read before they were sharded."""
    if start.folder is None:
        return
    read_optimizer(stepper.optimizer, start.folder)
    if stepper.scaler.is_enabled() and start.scaler:
        stepper.scaler.load_state_dict(dict(start.scaler))
    if stepper.averages is not None:  # averages that begin now begin with the weights
        own = dict(stepper.spread.model.named_parameters())
        for name, value in read_averages(start.folder).items():
            stepper.averages[name].copy_(sharded_like(value, own[name]))
