"""The families' encoders, which pack at their door and unpack at their end; and the calls that packing cannot honour.

Hugging Face's own loop over the layers runs in between: it passes tokens and `Rows` on as it would pass (B, L, D) and a
mask. Each class is a subclass of Hugging Face's encoder with its name and without state.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.models.albert import modeling_albert
from transformers.models.bert import modeling_bert
from transformers.models.camembert import modeling_camembert
from transformers.models.distilbert import modeling_distilbert
from transformers.models.electra import modeling_electra
from transformers.models.mpnet import modeling_mpnet
from transformers.models.roberta import modeling_roberta
from transformers.models.xlm_roberta import modeling_xlm_roberta
from transformers.utils import output_capturing

from fastbert.ops import plan_mask
from fastbert.packing import Padding, keep_mask
from fastbert.swap.layers import PackedLayer, Rows

_PLAIN = ("eager", "sdpa", "flex_attention")  # and all with "flash" in their name: one mathematics
_hooks = attrgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class FastbertFallbackWarning(UserWarning):
    """One call ran on Hugging Face's own padded path; the message says why."""


class PackedEncoder(nn.Module):
    """An encoder that packs at its door, runs Hugging Face's loop over the layers, and unpacks at its end."""

    config: Any

    @torch.compiler.disable(reason="what is packed depends on the mask's values: the encoder is one graph break")
    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        """(B, L, D) -> Hugging Face's output with (B, L, D), zeros at padding."""
        reason, observed = _survey(self)
        reason = reason or self._unsupported(kwargs)
        rows = reason or self._rows(hidden_states, attention_mask, kwargs)
        if isinstance(rows, str):
            if kwargs.get("cu_seq_lens_q") is not None:
                raise ValueError(f"cu_seq_lens_q was passed but {rows}: on padded tensors sequences see one another")
            message = f"this call runs on padded tensors: {rows} (fastbert.restore(model) ends this warning)"
            warnings.warn(message, FastbertFallbackWarning, stacklevel=2)
            return super().forward(hidden_states, attention_mask, **kwargs)
        x = hidden_states if observed else rows.padding.pack(hidden_states)
        out = super().forward(x, rows, **kwargs)
        return out if observed else tree_map_only(torch.Tensor, rows.padding.unpack, out)

    def _config(self) -> Any:
        return self.config

    def _unsupported(self, kwargs: dict[str, Any]) -> str | None:
        config = self._config()
        name = config._attn_implementation
        if name not in _PLAIN and "flash" not in name:
            if name not in ALL_MASK_ATTENTION_FUNCTIONS:
                raise ValueError(
                    f"attn_implementation {name!r} is registered for attention but not for masks, so that transformers "
                    "drops the padding mask: register it in AttentionMaskInterface too, or set 'sdpa'"
                )
            return f"attn_implementation is {name!r}, whose mathematics fastbert cannot know"
        if kwargs.get("output_attentions", config.output_attentions):
            return "output_attentions asks for probabilities that a fused kernel never forms"
        for argument in ("past_key_values", "encoder_hidden_states", "is_causal"):
            if kwargs.get(argument) not in (None, False):
                return f"{argument} was passed"
        return None

    def _rows(self, hidden_states: torch.Tensor, mask: Any, kwargs: dict[str, Any]) -> Rows | str:
        """Bounds of the sequences, or why there are none."""
        shape, device = (hidden_states.shape[0], hidden_states.shape[1]), hidden_states.device
        cu_seqlens = kwargs.get("cu_seq_lens_q")
        if cu_seqlens is not None:
            if shape[0] != 1 or mask is not None:
                raise ValueError(f"cu_seq_lens_q needs one row of tokens and no padding, the input has shape {shape}")
            longest = kwargs.get("max_length_q")
            longest = int(cu_seqlens.diff().max() if longest is None else longest)
            return Rows(cu_seqlens.int(), longest, Padding(shape, torch.arange(shape[1], device=device)))
        if mask is None and _starts_again(kwargs.get("position_ids"), shape):
            raise ValueError(
                "position_ids start again in a single row, which looks like packed sequences, but transformers' "
                "encoders let them see one another: pass cu_seq_lens_q too, or give each sequence a row of its own"
            )
        if mask is not None and not isinstance(mask, torch.Tensor):
            return f"attention_mask is a {type(mask).__name__}"
        try:
            keep = keep_mask(mask, shape, device)
        except ValueError as error:
            return str(error)
        indices, bounds, longest = plan_mask(keep)
        return Rows(bounds, longest, Padding(shape, indices))


def _starts_again(position_ids: torch.Tensor | None, shape: tuple[int, int]) -> bool:
    return position_ids is not None and shape[0] == 1 and bool((position_ids.diff() < 0).any())


def _survey(module: nn.Module) -> tuple[str | None, bool]:
    """What forbids the packed path, if anything does; whether hooks look at layers, which then must show (B, L, D)."""
    observed = False
    for child in filter(None, module._modules.values()):
        if any(_hooks(child)):
            if isinstance(child, PackedLayer):
                observed = True
            elif hook := _foreign_hook(child):
                return f"{hook} is a hook inside a layer, on {type(child).__name__}", observed
        if "forward" in vars(child) and type(child).__module__.startswith("transformers.models."):
            return f"{type(child).__name__} has a forward of its own on the instance", observed
        if child._modules:
            reason, inside = _survey(child)
            observed |= inside
            if reason:
                return reason, observed
    return None, observed


def _foreign_hook(module: nn.Module) -> str | None:
    """Name of a hook that is not transformers' recorder of attentions, which idles unless attentions are asked for."""
    for hook in chain.from_iterable(kind.values() for kind in _hooks(module)):
        if getattr(hook, "__module__", None) != output_capturing.__name__:
            return getattr(hook, "__qualname__", type(hook).__name__)
    return None


class BertEncoder(PackedEncoder, modeling_bert.BertEncoder):
    """BERT's encoder on tokens."""


class RobertaEncoder(PackedEncoder, modeling_roberta.RobertaEncoder):
    """RoBERTa's encoder on tokens."""


class XLMRobertaEncoder(PackedEncoder, modeling_xlm_roberta.XLMRobertaEncoder):
    """XLM-RoBERTa's encoder on tokens."""


class CamembertEncoder(PackedEncoder, modeling_camembert.CamembertEncoder):
    """CamemBERT's encoder on tokens."""


class ElectraEncoder(PackedEncoder, modeling_electra.ElectraEncoder):
    """ELECTRA's encoder on tokens."""


class AlbertTransformer(PackedEncoder, modeling_albert.AlbertTransformer):
    """ALBERT's encoder on tokens, with the mapping from the embeddings' size."""


class Transformer(PackedEncoder, modeling_distilbert.Transformer):
    """DistilBERT's encoder on tokens."""

    def _config(self) -> Any:
        first: Any = self.layer[0]  # the encoder does not hold one itself
        return first.attention.config


class MPNetEncoder(PackedEncoder, modeling_mpnet.MPNetEncoder):
    """MPNet's encoder on tokens, with its bias of relative positions."""

    def _rows(self, hidden_states: torch.Tensor, mask: Any, kwargs: dict[str, Any]) -> Rows | str:
        rows = super()._rows(hidden_states, mask, kwargs)
        if isinstance(rows, str):
            return rows
        indices, length = rows.padding.indices, max(rows.padding.shape[1], 1)
        same_row = indices[1:] // length == indices[:-1] // length
        if bool((same_row & (indices.diff() != 1)).any()):
            return "attention_mask has holes, and MPNet's relative positions count them"
        # Beyond 127 all offsets share their side's last bucket.
        buckets = self.relative_position_bucket(torch.arange(-127, 128, device=hidden_states.device))
        return replace(rows, rel_bias=self.relative_attention_bias(buckets).mT)

    def compute_position_bias(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """Nothing for packed tokens, (B, H, L, L) otherwise."""
        return None if x.ndim == 2 else super().compute_position_bias(x, *args, **kwargs)
