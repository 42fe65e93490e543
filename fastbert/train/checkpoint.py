"""Checkpoints: folders of safetensors and JSON, written whole or not at all, found again, rotated.

`checkpoint-<step>/` holds the model as a folder that loads by itself, `optimizer.safetensors` (moments by parameter
name, unsharded, so that another number of ranks can read them), perhaps `ema.safetensors`, and `state.json`. It is
written under another name, synced to the disk and renamed: a kill at any moment leaves the last good one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastbert.models.pretrained import PreTrainedModel
from fastbert.train.distributed import fill, full, sharded_like
from fastbert.weights import legacy_names, load_weights, nearest, read_json

STATE, OPTIMIZER, AVERAGES, PARAMETERS = (
    "state.json",
    "optimizer.safetensors",
    "ema.safetensors",
    "parameters.safetensors",
)
_NAME = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = ".unfinished-"


class CheckpointError(OSError):
    """A checkpoint that could not be written."""


class Checkpoints:
    """The checkpoints of one output folder."""

    def __init__(self, root: Path, limit: int | None = None) -> None:
        """
        Args:
            root: the output folder; it is made.
            limit: how many are kept, besides the best; None = all.
        """
        self.root, self.limit = root, limit
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(left)

    def all(self) -> list[Path]:
        """Complete ones, oldest first."""
        found = [p for p in self.root.glob("checkpoint-*") if p.is_dir() and _NAME.fullmatch(p.name)]
        return sorted((p for p in found if _is_complete(p)), key=step_of)

    def newest(self) -> Path | None:
        """The newest complete one."""
        return next(reversed(self.all()), None)

    def save(self, step: int, write: Callable[[Path], None], state: Mapping[str, Any], best: int | None) -> Path:
        """Write `checkpoint-<step>`, then delete what the limit leaves no place for.

        Args:
            step: optimiser steps done.
            write: puts the files into the folder it is given.
            state: what `state.json` holds, besides the names and sizes of the files.
            best: step of the checkpoint that is kept whatever its age.

        Raises:
            CheckpointError: the files could not be written; the earlier checkpoints are as they were.
        """
        target, scratch = self.root / f"checkpoint-{step}", self.root / f"{_UNFINISHED}checkpoint-{step}"
        try:
            scratch.mkdir()
            write(scratch)
            sizes = {p.relative_to(scratch).as_posix(): p.stat().st_size for p in scratch.rglob("*") if p.is_file()}
            document = json.dumps({**state, "step": step, "files": sizes}, indent=1)
            (scratch / STATE).write_text(document + "\n", encoding="utf-8")
            sync_tree(scratch)
            if target.exists():  # of a run that this one repeats
                self._delete(target)
            scratch.rename(target)
            _sync(self.root)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(scratch, ignore_errors=True)
            raise CheckpointError(self._explain(target, error)) from error
        self._rotate(best)
        return target

    def _explain(self, target: Path, error: Exception) -> str:
        last = self.newest()
        kept = f"{last.name} is whole and can be resumed" if last else "there is no earlier checkpoint"
        free = shutil.disk_usage(self.root).free / 1e6
        return f"cannot write {target}: {error} ({free:,.0f} MB are free there); {kept}"

    def _rotate(self, best: int | None) -> None:
        kept = [p for p in self.all() if step_of(p) != best]
        for path in kept[: -self.limit] if self.limit else ():
            self._delete(path)

    def _delete(self, path: Path) -> None:
        """Under another name first, so that a kill leaves no half of a checkpoint under its own."""
        doomed = self.root / f"{_UNFINISHED}deleted-{path.name}"
        path.rename(doomed)
        shutil.rmtree(doomed)

    def discard(self) -> None:
        """Delete all of them."""
        for path in self.root.glob("checkpoint-*"):
            if _NAME.fullmatch(path.name):
                self._delete(path)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} is not named checkpoint-<step>")
    return int(match[1])


def _is_complete(path: Path) -> bool:
    """Whether every file is there with the size it was written with; a damaged one is passed over, aloud."""
    try:
        sizes = read_json(path / STATE)["files"]
        wrong = [name for name, size in sizes.items() if (path / name).stat().st_size != size]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        warnings.warn(f"{path} is damaged and passed over: {error}", stacklevel=2)
        return False
    if wrong:
        warnings.warn(
            f"{path} is damaged and passed over: {wrong[0]} has not its {sizes[wrong[0]]} bytes", stacklevel=2
        )
    return not wrong


def sync_tree(folder: Path) -> None:
    """Wait until every file and folder below is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_model(model: nn.Module, folder: Path, save: Callable[[nn.Module, Path], None]) -> None:
    """The model as `save` writes it; one that is no `PreTrainedModel` also by its own parameter names."""
    save(model, folder)
    if not isinstance(model, PreTrainedModel):
        save_file({n: p.detach().cpu().contiguous() for n, p in model.named_parameters()}, folder / PARAMETERS)


def read_model(model: nn.Module, folder: Path) -> None:
    """Put a checkpoint's weights into a model, in place.

    Raises:
        ValueError: the checkpoint is of another architecture; the message names what differs.
    """
    if not isinstance(model, PreTrainedModel):
        state = load_file(folder / PARAMETERS)
        _same_weights(folder, state, dict(model.named_parameters()))
        fill(model, state)
        return
    saved, own = model.config_class.from_dict(_config(model, folder)), model.config
    for name in (f.name for f in fields(own) if f.name != "extra"):
        if getattr(saved, name) != getattr(own, name):
            raise ValueError(
                f"{folder} is of another architecture: its {name} is {getattr(saved, name)!r}, "
                f"the model's {getattr(own, name)!r}"
            )
    state = load_weights(folder)
    legacy_names(state)
    for name, source in model.active_tied_keys().items():
        if source in state:
            state.setdefault(name, state[source])
    _same_weights(folder, state, model.state_dict())
    model.load_state_dict(state)


def _config(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    config, kind = read_json(folder / "config.json"), type(model).__name__
    saved = (config.get("architectures") or [kind])[0]
    if saved != kind:
        raise ValueError(f"{folder} is of another architecture: it holds a {saved}, the model is a {kind}")
    return config


def _same_weights(folder: Path, saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    for name in sorted(set(saved) ^ set(own)):
        here, there = ("lacks", own) if name in own else ("has", saved)
        other = saved if there is own else own
        raise ValueError(f"{folder} is of another architecture: it {here} the weight {name}{nearest(name, other)}")
    for name, tensor in own.items():
        if tensor.shape != saved[name].shape:
            raise ValueError(
                f"{folder} is of another architecture: its {name} has shape {tuple(saved[name].shape)}, "
                f"the model's {tuple(tensor.shape)}"
            )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimiser whose groups have `names`: `<parameter>.<key>` -> whole tensor on the CPU.

    All ranks must call it.
    """
    return {
        f"{name}.{key}": full(value).cpu()
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def read_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Put a checkpoint's moments into an optimiser.

    Raises:
        ValueError: moments of a parameter that the optimiser has not, or of another shape.
    """
    path = folder / OPTIMIZER
    saved: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path).items():
        name, _, kind = key.rpartition(".")
        saved.setdefault(name, {})[kind] = tensor
    document = optimizer.state_dict()
    members = [m for g in optimizer.param_groups for m in zip(g["names"], g["params"], strict=True)]
    places = {name: (i, parameter) for i, (name, parameter) in enumerate(members)}
    for name, tensors in saved.items():
        if name not in places:
            raise ValueError(f"{path} has moments of {name}, which is not trained now{nearest(name, places)}")
        place, parameter = places[name]
        for kind, tensor in tensors.items():
            if tensor.ndim and tensor.shape != parameter.shape:
                raise ValueError(
                    f"{path}: {kind} of {name} has shape {tuple(tensor.shape)}, the parameter {tuple(parameter.shape)}"
                )
        document["state"][place] = {k: sharded_like(t, parameter) if t.ndim else t for k, t in tensors.items()}
    optimizer.load_state_dict(document)


def read_averages(folder: Path) -> dict[str, Tensor]:
    """The moving averages that a checkpoint holds, by parameter name; empty if it holds none."""
    path = folder / AVERAGES
    return load_file(path) if path.is_file() else {}
