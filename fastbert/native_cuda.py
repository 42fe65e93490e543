"""The native backend on CUDA tensors: checks, allocates and launches `csrc/cuda`; nothing here waits for the device.

Inference only: there is no backward. It knows nothing of autograd or of the reference. Kernels run on the current
stream of their tensors' device. `cu_seqlens` is not read back, so not checked: it must ascend from 0 to T.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from types import ModuleType
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

LONGEST = 128
_TYPES = (torch.float32, torch.float16, torch.bfloat16)  # this and the next two in the order of csrc/cuda/kernels.h
_MODES = ("cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean")
_OUTPUTS = {"same": None, "float32": torch.float32, "int8": torch.int8, "uint8": torch.uint8}
_OUTPUTS |= {"binary": torch.int8, "ubinary": torch.uint8}
_DTYPES = {"attention": _TYPES[1:], "pool": _TYPES, "plan_mask": (torch.bool,)}
_OLDEST = (8, 0)  # Ampere: bf16 tensor cores and asynchronous copies
_DEVICE = "cuda"


class Plan(NamedTuple):
    """Where the tokens of a packed batch belong; all on the device, tokens past the last one are 0."""

    cu_seqlens: Tensor  # (S + 1) int32
    position_ids: Tensor  # (capacity) int64, a token's place in its sequence
    low: Tensor  # (capacity) int32, the first token of its sequence
    high: Tensor  # (capacity) int32, one past the last


@cache
def available() -> bool:
    """Whether the extension was built, and with its CUDA part."""
    return importlib.util.find_spec("fastbert._C") is not None and hasattr(_extension(), "cuda_attention")


@cache
def _extension() -> ModuleType:
    return importlib.import_module("fastbert._C")


def require() -> ModuleType:
    """The extension module.

    Raises:
        ImportError: it was not built, or without CUDA; or the GPU is older than sm_80.
    """
    if not available():
        raise ImportError(
            "fastbert was installed without its CUDA kernels: with nvcc and a C++17 compiler at hand, run "
            "`pip install .` in the source tree, without FASTBERT_CUDA=0 and FASTBERT_NATIVE=0"
        )
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < _OLDEST:
        found = "sm_{}{}".format(*torch.cuda.get_device_capability())
        raise ImportError(f"the CUDA kernels need sm_80 or newer, this GPU is {found}: use the 'reference' backend")
    return _extension()


def supports(op: str, device_type: str, dtype: torch.dtype) -> bool:
    """Whether this backend computes `op` on that device and dtype."""
    return device_type == "cuda" and dtype in _DTYPES.get(op, ()) and available()


def _check(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...], like: Tensor) -> None:
    if x.device.type != _DEVICE or x.device != like.device:
        wanted = like.device if like.device.type == _DEVICE else _DEVICE
        raise ValueError(f"{name} must be on {wanted}, got {x.device}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {x.dtype}")
    if x.ndim != len(shape) or any(n is not None and n != m for n, m in zip(shape, x.shape, strict=True)):
        wanted_shape = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} must have shape ({wanted_shape}), got {tuple(x.shape)}")
    if not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous (call .contiguous()), got strides {x.stride()}")


def _check_count(name: str, count: int) -> None:
    if count >= 2**31:
        raise ValueError(f"{name} is {count}, the kernels count to 2^31 - 1: split the batch")


def _where(x: Tensor) -> tuple[int, int]:
    """Device and stream, as integers."""
    if x.device.type == "cpu":  # the emulator of tests/cuda_on_cpu
        return 0, 0
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def plan(lengths: Tensor, capacity: int) -> Plan:
    """The packing plan of S sequences.

    Args:
        lengths: (S) int32; a negative one counts as 0.
        capacity: tokens to plan for, at least the sum of `lengths` (a CUDA graph's bucket: what is past the sum is 0).

    Raises:
        ValueError, TypeError: a wrong device, dtype or shape, or more than 2^31 - 1 tokens.
    """
    _check("lengths", lengths, (torch.int32,), (None,), lengths)
    _check_count("capacity", capacity)
    S = lengths.numel()
    cu_seqlens = lengths.new_empty(S + 1)
    position_ids = lengths.new_empty(capacity, dtype=torch.int64)
    low, high = lengths.new_empty(2, capacity)
    made = Plan(cu_seqlens, position_ids, low, high)
    where = _where(lengths)
    require().cuda_plan_lengths(*where, lengths.data_ptr(), cu_seqlens.data_ptr(), S)
    require().cuda_plan_tokens(*where, *(t.data_ptr() for t in made), S, capacity)
    return made


def plan_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where the kept tokens of a padded batch lie.

    Args:
        mask: (B, L) bool, any pattern.

    Returns:
        indices (B * L) int64 into the flattened mask, ascending, and -1 past the last kept token;
        cu_seqlens (B + 1) int32.
    """
    _check("mask", mask, (torch.bool,), (None, None), mask)
    B, L = mask.shape
    _check_count("the size of mask", B * L)
    cu_seqlens = mask.new_empty(B + 1, dtype=torch.int32)
    indices = mask.new_empty(B * L, dtype=torch.int64)
    require().cuda_plan_mask(*_where(mask), mask.data_ptr(), cu_seqlens.data_ptr(), indices.data_ptr(), B, L)
    return indices, cu_seqlens


def plan_mask_fwd(mask: Tensor) -> tuple[Tensor, Tensor, int]:
    """See `fastbert.ops.plan_mask`. Its two host numbers are the one wait for the device in this file."""
    indices, cu_seqlens = plan_mask(mask)
    if mask.shape[0] == 0:
        return indices, cu_seqlens, 0
    num_tokens, max_seqlen = torch.stack([cu_seqlens[-1], cu_seqlens.diff().max()]).tolist()
    return indices[:num_tokens], cu_seqlens, max_seqlen


def _word(*rows: Tensor) -> int:
    """Bytes that a thread moves at a time: what every address and row size is a multiple of."""
    sizes = [n for x in rows for n in (x.data_ptr(), x[0].nbytes if len(x) else 0)]
    return next(word for word in (16, 4, 1) if all(n % word == 0 for n in sizes))


def gather(x: Tensor, indices: Tensor) -> Tensor:
    """x[indices], zeros where an index is outside x: rows of a padded (B * L, ...) become packed ones, of any dtype."""
    _check("x", x, (x.dtype,), (None,) * max(x.ndim, 1), x)
    _check("indices", indices, (torch.int64,), (None,), x)
    out = x.new_empty(indices.numel(), *x.shape[1:])
    sizes = (indices.numel(), len(x), out[:1].nbytes)
    require().cuda_gather(*_where(x), x.data_ptr(), indices.data_ptr(), out.data_ptr(), *sizes, _word(x, out))
    return out


def scatter(x: Tensor, indices: Tensor, num_rows: int) -> Tensor:
    """(num_rows, ...) of zeros, and x[i] at row indices[i], which no two share; an index outside writes nothing."""
    _check("x", x, (x.dtype,), (None,) * max(x.ndim, 1), x)
    _check("indices", indices, (torch.int64,), (len(x),), x)
    out = x.new_zeros(num_rows, *x.shape[1:])
    sizes = (len(x), num_rows, x[:1].nbytes)
    require().cuda_scatter(*_where(x), x.data_ptr(), indices.data_ptr(), out.data_ptr(), *sizes, _word(x, out))
    return out


def pool(
    hidden: Tensor,
    cu_seqlens: Tensor,
    mode: str = "mean",
    normalize: bool = False,
    output: str = "same",
    low: Tensor | None = None,
    step: Tensor | None = None,
) -> Tensor:
    """Pooled, optionally normalised and quantised vectors in one pass over the tokens; all arithmetic in fp32.

    Args:
        hidden: (T, D) float32, float16 or bfloat16.
        cu_seqlens: (S + 1) int32; an empty sequence gives zeros.
        mode: see `fastbert.ops.pool`.
        normalize: x / max(|x|, 1e-12).
        output: `same` dtype as hidden, `float32`, or what `fastbert.vectors.quantize_vectors` makes: `int8`, `uint8`,
            `binary`, `ubinary`.
        low, step: (D) float32, for 8 bits: least value of each dimension, and its range / 255.

    Returns:
        (S, D), or (S, ceil(D / 8)) for the binary ones.

    Raises:
        ValueError, TypeError: a wrong device, dtype or shape, an unknown name, 8 bits without `low` and `step`.
    """
    _check("hidden", hidden, _TYPES, (None, None), hidden)
    _check("cu_seqlens", cu_seqlens, (torch.int32,), (None,), hidden)
    for name, value, known in (("mode", mode, _MODES), ("output", output, tuple(_OUTPUTS))):
        if value not in known:
            raise ValueError(f"{name} {value!r} is not one of {', '.join(known)}")
    S, D = cu_seqlens.numel() - 1, hidden.shape[1]
    _check_count("the number of tokens", hidden.shape[0])
    if D > 8192:
        raise ValueError(f"hidden has {D} features, the kernel takes up to 8192")
    ranges = (0, 0)
    if output.endswith("int8"):
        if low is None or step is None:
            raise ValueError(f"output {output!r} needs low and step, the range of each dimension, got None")
        for name, numbers in (("low", low), ("step", step)):
            _check(name, numbers, (torch.float32,), (D,), hidden)
        ranges = (low.data_ptr(), step.data_ptr())
    columns = -(-D // 8) if output.endswith("binary") else D
    out = hidden.new_empty(S, columns, dtype=_OUTPUTS[output] or hidden.dtype)
    addresses = (hidden.data_ptr(), _TYPES.index(hidden.dtype), cu_seqlens.data_ptr(), out.data_ptr(), *ranges)
    names = (_MODES.index(mode), normalize, list(_OUTPUTS).index(output))
    require().cuda_pool(*_where(hidden), *addresses, S, D, *names)
    return out


def pool_fwd(hidden: Tensor, cu_seqlens: Tensor, mode: str) -> tuple[Tensor, None]:
    """See `fastbert.ops.pool`; nothing is kept for a backward, which there is not."""
    return pool(hidden, cu_seqlens.contiguous(), mode), None


def attention_fwd(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, dropout_p: float = 0.0, seed: int | Tensor = 0
) -> tuple[Tensor, Tensor]:
    """Attention of sequences of at most 128 tokens, each whole in shared memory; softmax in fp32.

    Args:
        qkv: (T, 3, H, K) float16 or bfloat16, K a multiple of 16 from 16 to 128.
        cu_seqlens: (S + 1) int32.
        max_seqlen: at most 128; a sequence longer than it comes out as NaN.
        scale: factor of the scores.
        dropout_p: must be 0.

    Returns:
        out (T, H, K), and the log-sum-exp (T, H) fp32 of the scaled scores.

    Raises:
        ValueError, TypeError, NotImplementedError: what this kernel does not take, printed beside what it does.
    """
    _check("qkv", qkv, _TYPES[1:], (None, 3, None, None), qkv)
    _check("cu_seqlens", cu_seqlens, (torch.int32,), (None,), qkv)
    T, _, H, K = qkv.shape
    S = cu_seqlens.numel() - 1
    if K % 16 or not 16 <= K <= 128:
        raise ValueError(f"the head size must be a multiple of 16 from 16 to 128, got {K}")
    if dropout_p > 0.0 or max_seqlen > LONGEST:
        raise NotImplementedError(
            f"the native CUDA attention takes max_seqlen <= {LONGEST} and dropout_p = 0, got {max_seqlen} and "
            f"{dropout_p}; leave the choice to fastbert or force another backend"
        )
    _check_count("the number of tokens", T)
    _check_count("sequences x heads", S * H)
    if qkv.data_ptr() % 16:
        raise ValueError(f"qkv must start at a multiple of 16 bytes, got address % 16 = {qkv.data_ptr() % 16}")
    out, lse = qkv.new_empty(T, H, K), qkv.new_empty(T, H, dtype=torch.float32)
    addresses = (qkv.data_ptr(), _TYPES.index(qkv.dtype), cu_seqlens.data_ptr(), out.data_ptr(), lse.data_ptr())
    require().cuda_attention(*_where(qkv), *addresses, S, H, K, max_seqlen, scale)
    return out, lse


def _no_backward(*_: object) -> NoReturn:
    raise NotImplementedError(
        "the native CUDA kernels are for inference, they have no backward: force 'reference' to train"
    )


attention_bwd = pool_bwd = _no_backward
