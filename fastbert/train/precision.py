"""Dtypes of training: weights in fp32 or wider, matrix products in what the device multiplies fast."""

from __future__ import annotations

import torch
from torch import nn

from fastbert import native
from fastbert.train.arguments import TrainArguments


def choose_precision(arguments: TrainArguments, device: torch.device) -> torch.dtype:
    """Dtype of matrix products: bfloat16 or float16 under autocast, or float32. Weights stay as they are."""
    if arguments.fp16:
        return torch.float16
    if arguments.bf16 != "auto":
        return torch.bfloat16 if arguments.bf16 else torch.float32
    if device.type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = device.type == "cpu" and native.available() and native.isa() in ("avx512bf16", "amx")
    return torch.bfloat16 if has else torch.float32


def widen(model: nn.Module) -> None:
    """fp32 weights where they are narrower: updates are smaller than half precision resolves."""
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        model.float()
