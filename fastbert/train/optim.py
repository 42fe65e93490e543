"""Which parameter learns how fast and is decayed: the groups, and the optimiser over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastbert.train.arguments import TrainArguments
from fastbert.train.lamb import Lamb
from fastbert.train.layers import depths


def undecayed(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay leaves out: layer norms, and whatever is called a bias."""
    norms = {
        f"{name}.{leaf}".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for leaf, _ in module.named_parameters(recurse=False)
    }
    return norms | {name for name, _ in model.named_parameters() if "bias" in name}


def parameter_groups(model: nn.Module, arguments: TrainArguments) -> list[dict[str, Any]]:
    """Trainable parameters grouped by rate and decay.

    Returns:
        torch's groups: `params`, `lr`, `weight_decay`, and for the caller `names`, `adapt` (LAMB's) and `lr_scale`,
        the share of the learning rate, which is 1 for heads and `layer_wise_lr_decay` times less at each depth below.
    """
    bare = undecayed(model)
    depth, top = depths(model)
    groups: dict[tuple[float, bool], list[tuple[str, Tensor]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = arguments.layer_wise_lr_decay ** (top - depth[name])
            groups.setdefault((scale, name not in bare), []).append((name, parameter))
    if not groups:
        raise ValueError(f"{type(model).__name__} has no trainable parameter: every requires_grad is False")
    return [
        {
            "params": [p for _, p in members],
            "names": [name for name, _ in members],
            "lr": arguments.learning_rate * scale,
            "lr_scale": scale,
            "weight_decay": arguments.weight_decay if decayed else 0.0,
            "adapt": decayed,
        }
        for (scale, decayed), members in groups.items()
    ]


def build_optimizer(model: nn.Module, arguments: TrainArguments) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), fused, or LAMB, over `parameter_groups`."""
    groups = parameter_groups(model, arguments)
    betas, eps = (arguments.adam_beta1, arguments.adam_beta2), arguments.adam_epsilon
    if arguments.optim == "lamb":
        return Lamb(groups, arguments.learning_rate, betas, eps)
    devices = {p.device.type for group in groups for p in group["params"]}
    fused = devices <= {"cpu", "cuda"}
    return torch.optim.AdamW(groups, arguments.learning_rate, betas, eps, fused=fused)
