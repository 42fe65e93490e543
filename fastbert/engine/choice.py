"""When an engine stands in for the chain of ops, and what is said about it.

`EncoderModel.forward_packed` asks `run` by itself. An engine never changes an answer beyond its stated error, and a
call that it cannot honour runs as ops.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from weakref import WeakKeyDictionary

import torch
from torch.nn.modules import module as global_hooks

from fastbert import native
from fastbert.engine import cpu, cuda
from fastbert.models.encoder import EncoderModel
from fastbert.models.pretrained import PreTrainedModel
from fastbert.ops.dispatch import forced_backend
from fastbert.packing import PackedBatch

MODES = ("auto", "off")

Engine = cpu.Engine | cuda.Engine
_ENGINES = {"cpu": cpu, "cuda": cuda}

_mode = "auto"
_compiled: WeakKeyDictionary[EncoderModel, Engine] = WeakKeyDictionary()
_compiling = threading.Lock()


@contextmanager
def use_engine(mode: str) -> Iterator[None]:
    """Choose in the `with` block, for the whole process, whether inference may run on an engine.

    Args:
        mode: `"auto"` (the default outside) or `"off"`, which runs the chain of ops.

    Raises:
        ValueError: another mode.
    """
    global _mode
    if mode not in MODES:
        raise ValueError(f"use_engine: unknown mode {mode!r}; the modes are {', '.join(MODES)}")
    before, _mode = _mode, mode
    try:
        yield
    finally:
        _mode = before


def _circumstances(model: EncoderModel, device: str) -> str | None:
    """Why a call made now on this type of device runs as ops, whatever the model is made of."""
    if _mode == "off":
        return 'use_engine("off") is in force'
    if torch.is_grad_enabled():
        return "autograd records: call under torch.no_grad() or torch.inference_mode() for the engine"
    if model.training:
        return "the model is in training mode: call model.eval() for the engine"
    if device not in _ENGINES:
        return f"there is no engine for {device}"
    if device == "cpu" and forced_backend() is not None:
        return f"backend {forced_backend()!r} is forced"
    if torch.is_autocast_enabled(device):
        return "autocast is on"
    if torch.compiler.is_compiling():
        return "torch.compile traces the call"
    if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
        return "a global forward hook is registered"
    if device == "cpu" and not native.available():
        return "the native extension was not built"
    return None


def _engine(model: EncoderModel) -> Engine | str:
    """The engine of the model as it is now, packed (again) if need be; or why there is none."""
    engine = _compiled.get(model)
    if engine is not None and engine.is_fresh(model):
        return engine
    with _compiling:
        engine = _compiled.get(model)  # another thread may have packed it meanwhile
        if engine is not None and engine.is_fresh(model):
            return engine
        if not (isinstance(engine, cpu.Engine) and engine.released):  # then the old panels are all there is
            _compiled.pop(model, None)  # else they go before the new ones come
        made = _ENGINES[model.device.type].compile(model)
        if not isinstance(made, str):
            _compiled[model] = made
        return made


def _replayed(model: EncoderModel, batch: PackedBatch, pooling: str | None, unit: bool) -> torch.Tensor | None:
    """What a graph gives that is there: the GPU computes while the host looks whether the model is still the one that
    was captured, and if it is not that counts for nothing. A graph's tensors live as long as it does."""
    engine, pooled = _compiled.get(model), None if pooling is None else (pooling, unit)
    if not isinstance(engine, cuda.Engine) or engine.device != model.device or not engine.has_captured(batch, pooled):
        return None
    try:
        found = engine.run(batch, pooling=pooling, unit=unit)
    except (IndexError, ValueError):
        if engine.is_fresh(model):
            raise
        return None
    return found if engine.is_fresh(model) else None


def run(model: EncoderModel, batch: PackedBatch, pooling: str | None = None, unit: bool = False) -> torch.Tensor | None:
    """Hidden states (T, D) of the last layer, or None where the call must run as ops. A mode of `ops.pool` asks for
    vectors (S, D) instead, of length 1 (and fp32) if `unit`, in the same call: None for more than a graph pools.

    Raises:
        IndexError: ids outside a table.

    Warns:
        UserWarning: once in a process for each reason why an engine cannot compute a model, unless it is in fp64.
    """
    device = model.device.type
    if _circumstances(model, device) or batch.input_ids.device.type not in ("cpu", device):
        return None
    if device == "cuda" and (found := _replayed(model, batch, pooling, unit)) is not None:
        return found
    engine = _engine(model)
    if isinstance(engine, str):
        if model.dtype != torch.float64:  # who asks for that wants digits
            _warn(engine)
        return None
    return engine.run(batch, pooling=pooling, unit=unit)


@cache
def _warn(reason: str) -> None:
    """Say once in a process why a model that could be faster is not."""
    warnings.warn(f"a model runs as a chain of ops, slower than on an engine: {reason}", stacklevel=2)


def pin(model: EncoderModel) -> cpu.Engine | None:
    """Compute a model on a CPU as it is now for as long as it lives, without a look at whether it has changed, which
    takes a text of twelve tokens a tenth of its time. For whoever owns the model and changes nothing.

    Returns:
        Its engine; None where none computes it, and nothing is pinned.
    """
    if model.device.type != "cpu":
        return None
    with torch.no_grad():
        engine = _circumstances(model, "cpu") or _engine(model)
    if not isinstance(engine, cpu.Engine):
        return None
    engine.pinned = True
    return engine


def release_weights(model: PreTrainedModel) -> None:
    """Pack an encoder for inference on a CPU, and let the weights go that it no longer needs: those of linear layers.

    What needs them afterwards (training, `state_dict()`, hidden states, another dtype) raises a RuntimeError.

    Args:
        model: in `eval()` mode: an encoder, or a model with a head, which stays as it is.

    Raises:
        ValueError: the engine cannot compute the model; nothing was let go.
    """
    base = model if isinstance(model, EncoderModel) else model.base_model
    assert isinstance(base, EncoderModel)
    with torch.no_grad(), _compiling:
        reason = _circumstances(base, base.device.type)
        if reason is None and base.device.type != "cpu":
            reason = f"an engine on {base.device.type} computes with the model's own weights"
        made = reason or cpu.compile_and_release(model, base)
        if isinstance(made, str):
            raise ValueError(f"the weights cannot be let go (keep_weights=False), since ops need them: {made}")
        _compiled[base] = made


def plan(model: EncoderModel) -> str:
    """One line: what a forward pass called now, in this thread, would run on, and why if that is not an engine.

    A call that asks for hidden states, attentions or gives `inputs_embeds` runs as ops whatever it says.
    """
    made = _circumstances(model, model.device.type) or _engine(model)
    if isinstance(made, str):
        return f"ops: {made}"
    asks = model.config.output_hidden_states or model.config.output_attentions
    return f"{made}{'; padded calls as ops: the configuration asks for more than the last layer' if asks else ''}"
