"""What `transformers` itself computes, one sequence at a time and without padding: the judge of `fastbert verify`."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers


def hidden_states(folder: Path, sequences: list[list[int]], dtype: torch.dtype) -> list[torch.Tensor]:
    """Eager hidden states of a checkpoint's encoder.

    Args:
        folder: the checkpoint.
        sequences: S lists of token ids.
        dtype: of weights and arithmetic.

    Returns:
        num_layers + 1 tensors (T, D), sequences end to end.
    """
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=dtype).eval()
    with torch.no_grad():
        each = [model(torch.tensor([ids]), output_hidden_states=True).hidden_states for ids in sequences]
    return [torch.cat([layer[0] for layer in layers]) for layers in zip(*each, strict=True)]


def version() -> str:
    """Of `transformers`."""
    return transformers.__version__
