"""Which backend computes an op: the only file that knows the backends' names.

A backend is a module with `require()` (ImportError where it cannot run at all), `supports(op, device_type, dtype)` and
for each op it has `<op>_fwd` and `<op>_bwd`: it allocates and launches, it never touches autograd and never falls back.
Backends are imported on first use.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch

REFERENCE = "reference"
BACKENDS = {"triton": "fastbert.kernels", "native": "fastbert.native"}
_OF_DEVICE = {("native", "cuda"): "fastbert.native_cuda"}  # where one device's code is a module of its own
# A kernel is a default where it was measured to be the fastest.
DEFAULT: dict[str, tuple[str, ...]] = {"cuda": ("triton",), "cpu": ("native",)}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_forced: str | None = None


def _check_name(name: str, source: str) -> str:
    if name != REFERENCE and name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}; the backends are {', '.join((REFERENCE, *BACKENDS))}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for every op in the `with` block, for the whole process.

    Args:
        name: `"reference"`, `"native"` or `"triton"`.

    Raises:
        ValueError: the name is not a backend.
        NotImplementedError: (inside the block) the forced backend lacks an op that is called.
    """
    global _forced
    before, _forced = _forced, _check_name(name, "use_backend")
    try:
        yield
    finally:
        _forced = before


def forced_backend() -> str | None:
    """The backend that `use_backend` or the environment variable `FASTBERT_BACKEND` forces, or None."""
    if _forced is not None:
        return _forced
    name = os.environ.get("FASTBERT_BACKEND")
    return _check_name(name, "FASTBERT_BACKEND") if name else None


@cache
def _module(name: str, device_type: str) -> ModuleType:
    return importlib.import_module(_OF_DEVICE.get((name, device_type), BACKENDS[name]))


@cache
def _choose(op: str, device_type: str, dtype: torch.dtype, forced: str | None) -> ModuleType | None:
    if forced == REFERENCE:
        return None
    if forced is not None:
        _module(forced, device_type).require()
        if not _module(forced, device_type).supports(op, device_type, dtype):
            raise NotImplementedError(
                f"backend {forced!r} has no {op} for {dtype} on {device_type}; "
                f"leave the choice to fastbert or force 'reference' (`python -m fastbert.ops` lists what exists)"
            )
        return _module(forced, device_type)
    for name in DEFAULT.get(device_type, ()):
        if _module(name, device_type).supports(op, device_type, dtype):
            return _module(name, device_type)
    return None


def backend_for(op: str, x: torch.Tensor) -> ModuleType | None:
    """The backend module that computes `op` on a tensor like `x`, or None for the reference in plain PyTorch.

    While torch.compile traces a call, `registered` stands for whichever module has the kernel.

    Warns:
        UserWarning: once in a process, where nothing is forced and the CPU's backend was not built.
    """
    if torch.compiler.is_compiling():
        from fastbert.ops import registered

        return registered if _has_kernel(op, x.device.type, x.dtype) else None
    module = _choose(op, x.device.type, x.dtype, forced_backend())
    if module is None and x.device.type == "cpu" and forced_backend() is None:
        _warn_if_missing()
    return module


@cache
def _warn_if_missing() -> None:
    try:
        for name in DEFAULT["cpu"]:
            _module(name, "cpu").require()
    except ImportError as error:
        warnings.warn(f"plain PyTorch computes, slower than it could be: {error}", stacklevel=3)


@torch.compiler.assume_constant_result
def _has_kernel(op: str, device_type: str, dtype: torch.dtype) -> bool:
    return _choose(op, device_type, dtype, forced_backend()) is not None


def can_look(x: torch.Tensor) -> bool:
    """Whether a check may read values: not on a GPU, which it would wait for, nor while torch.compile traces."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def check_devices(**tensors: torch.Tensor | None) -> None:
    """Raise ValueError, naming both, unless all tensors are on one device: a kernel would read another one's memory."""
    there = {name: t.device for name, t in tensors.items() if t is not None}
    first = next(iter(there))
    for name, device in there.items():
        if device != there[first]:
            raise ValueError(f"{first} is on {there[first]} but {name} is on {device}: move one of them")


def has(backend: str, op: str, device_type: str, dtype: torch.dtype) -> bool:
    """Whether a backend computes `op` on this device and dtype; the reference computes everything."""
    return backend == REFERENCE or _module(backend, device_type).supports(op, device_type, dtype)


def why(op: str, device_type: str, dtype: torch.dtype) -> str:
    """Why `op` takes the backend it takes on this device and dtype, as nothing is forced."""
    name, defaults = chosen(op, device_type, dtype), DEFAULT.get(device_type, ())
    if name != REFERENCE:
        return f"{name} is the default on {device_type} and has it"
    if not defaults:
        return f"no backend is a default on {device_type} yet"
    return f"{', '.join(defaults)} has no {op} of {str(dtype).removeprefix('torch.')} here"


def chosen(op: str, device_type: str, dtype: torch.dtype) -> str:
    """Name of the backend that `op` takes on this device and dtype, as nothing is forced."""
    module = _choose(op, device_type, dtype, None)
    return REFERENCE if module is None else next(n for n in BACKENDS if _module(n, device_type) is module)


def fused(op: str, x: torch.Tensor, weight: torch.Tensor | None = None) -> ModuleType | None:
    """The backend in force if it computes `op`, a composition of other ops, in one kernel, and that pays for so many
    rows (of `x`, times a weight (N, K)), else None: the parts are then computed one by one, whatever is forced."""
    names = DEFAULT.get(x.device.type, ()) if forced_backend() is None else (forced_backend(),)
    for name in names:
        if name is not None and has(name, op, x.device.type, x.dtype) and name != REFERENCE:
            module = _module(name, x.device.type)
            return module if weight is None or module.pays(op, x.shape[0], weight.shape) else None
    return None


def capturable(device_type: str, dtype: torch.dtype) -> bool:
    """Whether kernels compute all of an encoder's ops: the reference of attention looks at lengths, on the host, which
    a CUDA graph cannot."""
    return all(_choose(op, device_type, dtype, forced_backend()) for op in ("embed", "attention", "add_layer_norm"))
