"""From token states to one vector a sequence, as a sentence-transformers pooling configuration says.

It knows both spellings of that configuration; the arithmetic is `fastbert.ops.pool`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastbert.ops import pool
from fastbert.ops.pool import MODES
from fastbert.typed import field
from fastbert.weights import nearest

# The old spelling, one flag a mode; several modes are concatenated in this order.
FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class Pooling:
    """Modes of `fastbert.ops.pool`, concatenated.

    Attributes:
        modes: in the order of the output's parts.
        include_prompt: False leaves the tokens of a prompt out of the vector (as INSTRUCTOR models do).
    """

    modes: tuple[str, ...] = ("mean",)
    include_prompt: bool = True

    def __post_init__(self) -> None:
        for mode in self.modes:
            if mode not in MODES:
                raise ValueError(f"unknown pooling mode {mode!r}{nearest(mode, MODES)}; known: {', '.join(MODES)}")
        if not self.modes:
            raise ValueError(f"no pooling mode; known: {', '.join(MODES)}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Pooling:
        """From `1_Pooling/config.json`: `pooling_mode` (a name or a list), or the old flags; with neither, mean.

        Raises:
            ValueError: an unknown mode, or a value of the wrong type.
        """
        source = "the pooling configuration"
        flags = tuple(mode for flag, mode in FLAGS.items() if field(config, flag, bool, False, source))
        modes = field(config, "pooling_mode", str | list[str], flags, source)
        modes = (modes,) if isinstance(modes, str) else tuple(modes) or ("mean",)
        return cls(modes, field(config, "include_prompt", bool, True, source))

    def to_config(self, hidden_size: int) -> dict[str, Any]:
        """The content of `1_Pooling/config.json`, in both spellings where one mode lets them agree."""
        flags = {flag: mode in self.modes for flag, mode in FLAGS.items()}
        # Readers of the flags concatenate in the order of FLAGS: another order only the list can say.
        ordered = self.modes == tuple(mode for flag, mode in FLAGS.items() if flags[flag])
        single = {"pooling_mode": self.modes[0] if len(self.modes) == 1 else list(self.modes)}
        spelling = {**flags, **(single if len(self.modes) == 1 else {})} if ordered else single
        return {"word_embedding_dimension": hidden_size, **spelling, "include_prompt": self.include_prompt}

    def __call__(self, hidden_TD: torch.Tensor, cu_seqlens: torch.Tensor, prompt_length: int = 0) -> torch.Tensor:
        """(T, D), (S + 1) -> (S, len(modes) * D).

        `prompt_length` is the number of leading tokens that belong to the prompt; a sequence that is nothing but
        prompt gives zeros where the prompt is left out.
        """
        skip = 0 if self.include_prompt else prompt_length
        if not skip:
            return torch.cat([pool(hidden_TD, cu_seqlens, mode) for mode in self.modes], dim=-1)
        lengths = cu_seqlens.diff()
        first = torch.repeat_interleave(cu_seqlens[:-1], lengths)
        rest_TD = hidden_TD[torch.arange(hidden_TD.shape[0], device=hidden_TD.device) - first >= skip]
        rest = (lengths - skip).clamp(min=0)
        rest_cu_seqlens = torch.zeros_like(cu_seqlens)
        torch.cumsum(rest, 0, out=rest_cu_seqlens[1:])
        out = []
        for mode in self.modes:
            part = pool(rest_TD, rest_cu_seqlens, mode)
            if (
                mode == "weightedmean"
            ):  # a token keeps the weight of its place after the prompt: skip + 1, skip + 2, ...
                n = rest[:, None].float().clamp(min=1.0)
                own, offset = n * (n + 1) / 2, n * skip
                part = ((own * part + offset * pool(rest_TD, rest_cu_seqlens, "mean")) / (own + offset)).to(part.dtype)
            out.append(part)
        return torch.cat(out, dim=-1)
