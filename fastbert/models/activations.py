"""`hidden_act` by Hugging Face's names. The two GELU forms are ops of ours; the others are torch's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from fastbert.ops import gelu
from fastbert.weights import nearest

Activation = Callable[..., torch.Tensor]

_tanh_gelu = partial(gelu, approximate="tanh")

ACTIVATIONS: dict[str, Activation] = {
    "gelu": gelu,
    "gelu_python": gelu,
    "gelu_new": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "gelu_python_tanh": _tanh_gelu,
    "gelu_accurate": _tanh_gelu,
    "gelu_10": lambda x: gelu(x).clamp(-10, 10),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


WITH_BIAS = (gelu, _tanh_gelu)  # they take a bias, and their backward has its gradient in registers


def activation(name: str | Activation) -> Activation:
    """The function that `hidden_act` names; a callable is taken as it is.

    Raises:
        ValueError: an unknown name, with the nearest ones.
    """
    if callable(name):
        return name
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act {name!r} is unknown{nearest(name, ACTIVATIONS)}; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
