"""A checkpoint's tensors into a model: what is matched, what may be missing, what is an error."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastbert.weights import legacy_names, match_names, nearest

if TYPE_CHECKING:
    from fastbert.models.pretrained import PreTrainedModel


def take_over(
    model: PreTrainedModel, state: dict[str, torch.Tensor], ignored: tuple[str, ...], source: str
) -> dict[str, list[str]]:
    """Make a checkpoint's tensors the model's parameters, without a copy; parameters without one are initialised.

    Args:
        model: on the meta device.
        state: Hugging Face names to tensors; consumed.
        ignored: prefixes of names that may be in the file without the model knowing them.
        source: what error messages call the file.

    Returns:
        `missing_keys` and `unexpected_keys`.

    Raises:
        ValueError: the encoder lacks a weight, the file has one that no part of the model knows, or a shape differs.
    """
    legacy_names(state)
    expected = {k: v.shape for k, v in model.state_dict().items()}
    prefix = model.base_model_prefix + "."
    missing, unexpected = match_names(state, expected, prefix)
    for name, followed in model.active_tied_keys().items():
        present = [k for k in (name, followed) if k in state]
        if len(present) == 1:  # files hold either one of a tied pair, or both
            state.setdefault(name, state[present[0]])
            state.setdefault(followed, state[present[0]])
            missing = [k for k in missing if k not in (name, followed)]
    roots = tuple(f"{p}{root}." for root in model.head_roots for p in ("", prefix))
    kind = type(model).__name__
    if fatal := [k for k in unexpected if not k.startswith((*roots, *ignored))]:
        raise ValueError(
            f"{source} has the weight {fatal[0]}{_more(fatal)}, which {kind} does not know"
            f"{nearest(fatal[0], expected)}. Is config.json the right one? "
            f"To leave it out: from_pretrained(..., ignore_unexpected=[{fatal[0].split('.')[0] + '.'!r}])"
        )
    if fatal := [k for k in missing if not k.startswith(roots)]:
        raise ValueError(
            f"{source} lacks the weight {fatal[0]}{_more(fatal)} of {kind}{nearest(fatal[0], unexpected or state)}. "
            "Is config.json the right one?"
        )
    for key in unexpected:
        del state[key]
    for key, tensor in state.items():
        if tensor.shape != expected[key]:
            raise ValueError(
                f"{source}: {key} has shape {tuple(tensor.shape)} in the file but {tuple(expected[key])} by the "
                "configuration: config.json and the weights do not belong together"
            )
    if missing:
        warnings.warn(
            f"{source} has no weights for {', '.join(missing)}: they are initialised at random, train before use",
            stacklevel=3,
        )
    model.load_state_dict(state, strict=False, assign=True)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            fresh = nn.Parameter(torch.empty_like(parameter, device="cpu"))
            model.init_parameter(name, fresh)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, fresh)
    model.tie_weights()
    return {"missing_keys": missing, "unexpected_keys": unexpected}


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
