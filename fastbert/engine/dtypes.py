"""The names by which a device and a dtype are asked for, and what they mean here."""

from __future__ import annotations

import torch

from fastbert import machine, native

DTYPES = ("auto", "float32", "bfloat16", "float16", "int8", "float8")


def auto_on_cpu() -> tuple[str, str]:
    """What `auto` means on this CPU, and why: bfloat16 where one instruction multiplies it at a higher rate than fp32.

    AMX does; AVX-512's own instruction does on AMD's cores (Zen 4 and 5: twice fp32's rate; the rows of
    `benchmarks.encoder` have it ahead on lists and on single texts), not on Intel's, where it runs at half of fp32's.
    """
    if not native.available():
        return "float32", "the native extension was not built"
    isa = native.isa()
    if isa == "amx":
        return "bfloat16", "AMX multiplies it"
    if isa == "avx512bf16":
        vendor = machine.cpu().vendor
        if vendor == "AuthenticAMD":
            return "bfloat16", "AVX-512 multiplies it at twice the rate of float32 on AMD's cores"
        return "float32", f"avx512bf16 is known to be fast on AMD's cores only, and this is {vendor or 'another CPU'}"
    return "float32", f"{isa} does not multiply bfloat16"


def resolve_device(device: torch.device | str | None) -> torch.device:
    """The device that is asked for; None is a GPU where there is one.

    Raises:
        ValueError: no name of a device, or a GPU that is not here.
    """
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:  # lists thirty names of torch's
        raise ValueError(f"device {device!r} is no device: use 'cpu', 'cuda' or 'cuda:1'") from error
    if found.type != "cuda":
        return found
    wanted = f"device {str(found)!r} is wanted, but"
    if torch.version.cuda is None and torch.version.hip is None:
        raise ValueError(
            f"{wanted} torch {torch.__version__} is built for CPUs alone: use 'cpu', or install a torch built for CUDA"
        )
    if not torch.cuda.is_available():
        raise ValueError(
            f"{wanted} torch {torch.__version__} sees no GPU: use 'cpu', or see what nvidia-smi and "
            "CUDA_VISIBLE_DEVICES say"
        )
    if found.index is not None and found.index >= (count := torch.cuda.device_count()):
        raise ValueError(f"{wanted} torch sees {count} GPUs: use {' or '.join(f'cuda:{i}' for i in range(count))}")
    return found


def resolve_dtype(name: str | None, device: torch.device) -> str:
    """The dtype that a name of `DTYPES` means on a device.

    Args:
        name: None is `float32` on a CPU, and what `auto` is on a GPU.

    Raises:
        ValueError: an unknown name, or a dtype that the device has not got.
    """
    cuda = device.type == "cuda"
    if name == "auto" or (name is None and cuda):
        return auto_on_cpu()[0] if not cuda else "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    if name is None:
        return "float32"
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    if name == "float16" and not cuda:
        raise ValueError("dtype 'float16' is for GPUs: use 'float32' or 'bfloat16' on a CPU")
    if name == "int8" and cuda:
        raise ValueError("dtype 'int8' is for CPUs: use 'bfloat16' on a GPU")
    if name == "float8" and not (cuda and torch.cuda.get_device_capability(device) >= (8, 9)):
        raise ValueError("dtype 'float8' is for GPUs of compute capability 8.9 or newer: use 'bfloat16'")
    return name
