"""`accelerate`: a live `transformers` encoder computes on packed tokens from its encoder's door to its end.

Two things change, both on the instance, and `restore` undoes both: encoder and layers get a class of this file (a subclass
of Hugging Face's, of the same name, without state of its own), and the base model a pre-hook that hands the encoder the
2D mask as (B, 1, 1, L), a form that Hugging Face passes on untouched. No configuration is changed and no attention
function registered (a name known to one of the two registries only loses the mask). Embeddings, heads, losses stay HF's.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel, activations
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_bidirectional_mask
from transformers.models.albert import modeling_albert
from transformers.models.bert import modeling_bert
from transformers.models.camembert import modeling_camembert
from transformers.models.distilbert import modeling_distilbert
from transformers.models.electra import modeling_electra
from transformers.models.mpnet import modeling_mpnet
from transformers.models.roberta import modeling_roberta
from transformers.models.xlm_roberta import modeling_xlm_roberta
from transformers.utils import output_capturing

from fastbert.ops import add_layer_norm, attention, gelu, plan_mask
from fastbert.ops.dropout import draw_seed
from fastbert.packing import Padding, keep_mask

M = TypeVar("M", bound=nn.Module)

_GELUS = {activations.GELUActivation: "none", activations.NewGELUActivation: "tanh", activations.GELUTanh: "tanh"}
_MASK = 1  # attention_mask is the second parameter of every family's forward
_ADVICE = "fastbert.restore(model) gives Hugging Face's path back without this warning"


class FastbertFallbackWarning(UserWarning):
    """One call ran on Hugging Face's own padded path; the message says why."""


@dataclass(frozen=True)
class Rows:
    """What packed layers get in the place of a mask: sequence bounds, the way back to (B, L), a bias of offsets."""

    cu_seqlens: torch.Tensor
    max_seqlen: int
    padding: Padding
    rel_bias: torch.Tensor | None = None


def _plain(module: nn.Module, kind: type) -> bool:
    """Whether calling the module can only mean what its class says: PEFT, quantisation and patches make others."""
    return type(module) is kind and "forward" not in vars(module)


def _linears(x: torch.Tensor, *modules: nn.Module) -> torch.Tensor:
    """Outputs of several linears side by side; one GEMM where none of them is wrapped."""
    if all(_plain(m, nn.Linear) for m in modules):
        weight, bias = torch.cat([m.weight for m in modules]), torch.cat([m.bias for m in modules])
        return F.linear(x, weight, bias)
    return torch.cat([m(x) for m in modules], dim=-1)


def _attend(x: torch.Tensor, qkv: torch.Tensor, heads: int, dropout: nn.Dropout, rows: Rows) -> torch.Tensor:
    p = dropout.p if dropout.training else 0.0
    qkv = qkv.view(x.shape[0], 3, heads, qkv.shape[1] // (3 * heads))
    out = attention(qkv, rows.cu_seqlens, rows.max_seqlen, dropout_p=p, seed=draw_seed(p), rel_bias=rows.rel_bias)
    return out.flatten(1)


def _add_norm(norm: nn.Module, x: torch.Tensor, residual: torch.Tensor, dropout: nn.Dropout | None) -> torch.Tensor:
    p = dropout.p if dropout is not None and dropout.training else 0.0
    if _plain(norm, nn.LayerNorm):
        return add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps, p, draw_seed(p))  # type: ignore[arg-type]
    return norm(F.dropout(x, p) + residual)


def _activate(act: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    form = _GELUS.get(type(act))  # type: ignore[arg-type]
    return act(x) if form is None or "forward" in vars(act) else gelu(x, approximate=form)


class PackedLayer(nn.Module):
    """A layer that computes on tokens when it is given `Rows`, and is Hugging Face's own when it is given a mask."""

    parts: ClassVar[tuple[str, ...]]  # submodules whose forward is not called: they must be Hugging Face's own

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        """(T, D) -> (T, D); (B, L, D) -> (B, L, D) where hooks look at the layer."""
        rows = attention_mask
        if not isinstance(rows, Rows):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore[misc]
        if hidden_states.ndim == 2:
            return self.packed(hidden_states, rows)
        return rows.padding.unpack(self.packed(rows.padding.pack(hidden_states), rows))

    def packed(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        raise NotImplementedError


class _BertLike(PackedLayer):
    parts = ("attention", "attention.self", "attention.output", "intermediate", "output")

    def packed(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        inner, output = self.attention.self, self.attention.output
        qkv = _linears(x, inner.query, inner.key, inner.value)
        context = _attend(x, qkv, inner.num_attention_heads, inner.dropout, rows)
        x = _add_norm(output.LayerNorm, output.dense(context), x, output.dropout)
        return _feed_forward(self, x)


def _feed_forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    y = _activate(layer.intermediate.intermediate_act_fn, layer.intermediate.dense(x))
    return _add_norm(layer.output.LayerNorm, layer.output.dense(y), x, layer.output.dropout)


class PackedEncoder(nn.Module):
    """An encoder that packs at its door, runs Hugging Face's own loop over the layers, and unpacks at its end."""

    @torch.compiler.disable(reason="fastbert's kernels are opaque to dynamo: the encoder is one graph break")
    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        """(B, L, D) -> Hugging Face's output with (B, L, D), zeros at padding."""
        packed_by_caller = kwargs.get("cu_seq_lens_q") is not None
        reason, observed = self._survey()
        reason = self._unsupported(hidden_states, attention_mask, kwargs) or reason
        rows = None if reason else self._rows(hidden_states, attention_mask, kwargs)
        if rows is None:
            reason = reason or "relative positions are columns, and this mask has holes"
            if packed_by_caller:
                raise ValueError(f"cu_seq_lens_q was passed but {reason}: there sequences would see one another")
            warnings.warn(
                f"this call runs on padded tensors: {reason}. {_ADVICE}", FastbertFallbackWarning, stacklevel=2
            )
            return super().forward(hidden_states, self._stock_mask(hidden_states, attention_mask), **kwargs)  # type: ignore[misc]
        x = hidden_states if observed else rows.padding.pack(hidden_states)
        out = super().forward(x, rows, **kwargs)  # type: ignore[misc]
        return out if observed else tree_map_only(torch.Tensor, rows.padding.unpack, out)

    def _survey(self) -> tuple[str | None, bool]:
        """Why hooks forbid the packed path, if they do; whether layers are looked at and have to show (B, L, D)."""
        observed = False

        def walk(module: nn.Module) -> str | None:
            nonlocal observed
            for child in module._modules.values():
                if child is None:
                    continue
                if (
                    child._forward_hooks
                    or child._forward_pre_hooks
                    or child._backward_hooks
                    or child._backward_pre_hooks
                ):
                    if isinstance(child, PackedLayer):
                        observed = True
                    elif hook := _foreign_hook(child):
                        return f"{hook} is a hook inside a layer, on {type(child).__name__}"
                if "forward" in vars(child) and type(child).__module__.startswith("transformers.models."):
                    return f"{type(child).__name__} has a forward of its own on the instance"
                if child._modules and (reason := walk(child)):
                    return reason
            return None

        return walk(self), observed

    def _unsupported(self, hidden_states: torch.Tensor, mask: Any, kwargs: dict[str, Any]) -> str | None:
        name = self.config._attn_implementation
        if name not in ("eager", "sdpa", "flex_attention") and "flash" not in name:
            if name not in ALL_MASK_ATTENTION_FUNCTIONS:
                raise ValueError(
                    f"attn_implementation {name!r} is registered for attention but not for masks, so that transformers "
                    "drops the padding mask: register it in AttentionMaskInterface too, or set 'sdpa'"
                )
            return f"attn_implementation is {name!r}, whose mathematics fastbert cannot know"
        if kwargs.get("output_attentions", self.config.output_attentions):
            return "output_attentions asks for probabilities that a fused kernel never forms"
        for argument in ("past_key_values", "encoder_hidden_states", "is_causal"):
            if kwargs.get(argument) not in (None, False):
                return f"{argument} was passed"
        B, L = hidden_states.shape[:2]
        if mask is None or (isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and mask.shape == (B, 1, 1, L)):
            return None
        what = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        return f"attention_mask is {what}, not one (batch, length) mask of tokens to keep"

    def _rows(self, hidden_states: torch.Tensor, mask: torch.Tensor | None, kwargs: dict[str, Any]) -> Rows | None:
        shape, device = (hidden_states.shape[0], hidden_states.shape[1]), hidden_states.device
        cu_seqlens = kwargs.get("cu_seq_lens_q")
        if cu_seqlens is not None:
            if shape[0] != 1 or mask is not None:
                raise ValueError(
                    f"cu_seq_lens_q needs one row of packed tokens without attention_mask; the input has shape {shape}"
                    f"{'' if mask is None else ' and a mask'}"
                )
            longest = (
                int(cu_seqlens.diff().max()) if kwargs.get("max_length_q") is None else int(kwargs["max_length_q"])
            )
            return Rows(cu_seqlens.int(), longest, Padding(shape, torch.arange(shape[1], device=device)))
        keep = keep_mask(None if mask is None else mask[:, 0, 0], shape, device)
        indices, cu_seqlens, max_seqlen = plan_mask(keep)
        return Rows(cu_seqlens, max_seqlen, Padding(shape, indices))

    def _stock_mask(self, hidden_states: torch.Tensor, mask: Any) -> Any:
        """What Hugging Face would have built from the 2D mask, had the door not kept it."""
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.shape[1:3] != (1, 1):
            return mask
        return create_bidirectional_mask(config=self.config, inputs_embeds=hidden_states, attention_mask=mask[:, 0, 0])


def _foreign_hook(module: nn.Module) -> str | None:
    """Name of a hook that is not transformers' recorder of attentions, which is idle unless attentions are asked for."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    for hook in (h for kind in hooks for h in kind.values()):
        if getattr(hook, "__module__", None) != output_capturing.__name__:
            return getattr(hook, "__qualname__", type(hook).__name__)
    return None


class BertLayer(_BertLike, modeling_bert.BertLayer):
    """BERT's layer on tokens."""


class BertEncoder(PackedEncoder, modeling_bert.BertEncoder):
    """BERT's encoder on tokens."""


class RobertaLayer(_BertLike, modeling_roberta.RobertaLayer):
    """RoBERTa's layer on tokens."""


class RobertaEncoder(PackedEncoder, modeling_roberta.RobertaEncoder):
    """RoBERTa's encoder on tokens."""


class XLMRobertaLayer(_BertLike, modeling_xlm_roberta.XLMRobertaLayer):
    """XLM-RoBERTa's layer on tokens."""


class XLMRobertaEncoder(PackedEncoder, modeling_xlm_roberta.XLMRobertaEncoder):
    """XLM-RoBERTa's encoder on tokens."""


class CamembertLayer(_BertLike, modeling_camembert.CamembertLayer):
    """CamemBERT's layer on tokens."""


class CamembertEncoder(PackedEncoder, modeling_camembert.CamembertEncoder):
    """CamemBERT's encoder on tokens."""


class ElectraLayer(_BertLike, modeling_electra.ElectraLayer):
    """ELECTRA's layer on tokens."""


class ElectraEncoder(PackedEncoder, modeling_electra.ElectraEncoder):
    """ELECTRA's encoder on tokens."""


class AlbertLayer(PackedLayer, modeling_albert.AlbertLayer):
    """ALBERT's layer on tokens: no dropout after the feed-forward network."""

    parts = ("attention",)

    def packed(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        inner = self.attention
        qkv = _linears(x, inner.query, inner.key, inner.value)
        context = _attend(x, qkv, inner.num_attention_heads, inner.attention_dropout, rows)
        x = _add_norm(inner.LayerNorm, inner.dense(context), x, inner.output_dropout)
        return _add_norm(self.full_layer_layer_norm, self.ffn_output(_activate(self.activation, self.ffn(x))), x, None)


class AlbertTransformer(PackedEncoder, modeling_albert.AlbertTransformer):
    """ALBERT's encoder on tokens, with the mapping from the embeddings' size."""


class TransformerBlock(PackedLayer, modeling_distilbert.TransformerBlock):
    """DistilBERT's layer on tokens: no dropout after the attention's output."""

    parts = ("attention", "ffn")

    def packed(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        inner, ffn = self.attention, self.ffn
        qkv = _linears(x, inner.q_lin, inner.k_lin, inner.v_lin)
        x = _add_norm(self.sa_layer_norm, inner.out_lin(_attend(x, qkv, inner.n_heads, inner.dropout, rows)), x, None)
        return _add_norm(self.output_layer_norm, ffn.lin2(_activate(ffn.activation, ffn.lin1(x))), x, ffn.dropout)


class Transformer(PackedEncoder, modeling_distilbert.Transformer):
    """DistilBERT's encoder on tokens."""

    @property
    def config(self) -> Any:
        """The model's configuration, which this encoder does not hold itself."""
        return self.layer[0].attention.config


class MPNetLayer(PackedLayer, modeling_mpnet.MPNetLayer):
    """MPNet's layer on tokens: its bias of relative positions comes with the rows."""

    parts = ("attention", "attention.attn", "intermediate", "output")

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As `PackedLayer`, in a tuple of one, as MPNet's loop expects it."""
        out = super().forward(hidden_states, attention_mask, *args, **kwargs)
        return out if isinstance(out, tuple) else (out,)

    def packed(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        inner = self.attention.attn
        context = _attend(x, _linears(x, inner.q, inner.k, inner.v), inner.num_attention_heads, inner.dropout, rows)
        x = _add_norm(self.attention.LayerNorm, inner.o(context), x, self.attention.dropout)
        return _feed_forward(self, x)


class MPNetEncoder(PackedEncoder, modeling_mpnet.MPNetEncoder):
    """MPNet's encoder on tokens."""

    def _rows(self, hidden_states: torch.Tensor, mask: torch.Tensor | None, kwargs: dict[str, Any]) -> Rows | None:
        rows = super()._rows(hidden_states, mask, kwargs)
        indices, length = rows.padding.indices, max(rows.padding.shape[1], 1)
        same_row = indices[1:] // length == indices[:-1] // length
        if bool((same_row & (indices.diff() != 1)).any()):
            return None  # Hugging Face counts the columns between two tokens, padding included
        # Beyond 127 all offsets share their side's last bucket.
        buckets = self.relative_position_bucket(torch.arange(-127, 128, device=hidden_states.device))
        return replace(rows, rel_bias=self.relative_attention_bias(buckets).mT)

    def compute_position_bias(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """Nothing for packed tokens, (B, H, L, L) otherwise."""
        return None if x.ndim == 2 else super().compute_position_bias(x, *args, **kwargs)


_PACKED: tuple[type[nn.Module], ...] = (
    BertLayer, BertEncoder, RobertaLayer, RobertaEncoder, XLMRobertaLayer, XLMRobertaEncoder, CamembertLayer,
    CamembertEncoder, ElectraLayer, ElectraEncoder, AlbertLayer, AlbertTransformer, TransformerBlock, Transformer,
    MPNetLayer, MPNetEncoder,
)  # fmt: skip
_STOCK = {packed: packed.__bases__[1] for packed in _PACKED}
_TWIN = {stock: packed for packed, stock in _STOCK.items()}


@dataclass(frozen=True)
class Door:
    """Pre-hook of a base model whose forward has the parameters `names`: lets the 2D mask through to the encoder."""

    names: tuple[str, ...]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Arguments and keyword arguments with the mask as (B, 1, 1, L) bool.

        Raises:
            ValueError: sequences packed in one row without their bounds, where tokens would see other sequences.
        """
        given = dict(zip(self.names, args, strict=False)) | kwargs
        mask, tokens = given.get("attention_mask"), given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        bounds = given.get("cu_seq_lens_q")
        if bounds is not None and isinstance(module, modeling_mpnet.MPNetModel):
            raise ValueError("transformers' MPNet drops cu_seq_lens_q: pass padded sequences, fastbert packs them")
        if mask is None and bounds is None and tokens is not None:
            positions = given.get("position_ids")
            if positions is not None and tokens.shape[0] == 1 and bool((positions.diff() < 0).any()):
                raise ValueError(
                    "position_ids start again in a single row, which looks like packed sequences, but transformers' "
                    "encoders let them see one another: pass cu_seq_lens_q, or an attention_mask if it is one sequence"
                )
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
            return None
        if mask.dtype != torch.bool:
            compiling = torch.compiler.is_compiling()  # where looking at values would break the graph
            mask = mask != 0 if compiling else keep_mask(mask, (mask.shape[0], mask.shape[1]), mask.device)
        mask = mask[:, None, None]
        if len(args) > _MASK:
            return (*args[:_MASK], mask, *args[_MASK + 1 :]), kwargs
        return args, {**kwargs, "attention_mask": mask}


def accelerate(model: M) -> M:
    """Let a live model compute its encoder on packed tokens; it is changed in place and returned.

    Args:
        model: a `transformers` BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ALBERT, DistilBERT, ELECTRA or MPNet, base or
            with any head, or anything that holds one: SentenceTransformer, CrossEncoder, PEFT or DDP wrappers.

    Parameters and their names, hooks, dropout, gradient checkpointing and `save_pretrained` stay; what the model
    returns at padding is zero (Hugging Face's values there mean nothing). Calls that packing cannot honour (attention
    probabilities, masks per query, caches) run on Hugging Face's path with a `FastbertFallbackWarning`. Under
    `torch.compile` the encoder is one graph break.

    Raises:
        TypeError: no encoder of these families in the model, or one whose classes somebody else has replaced.
        ValueError: a decoder, or cross-attention.
    """
    bases = [m for m in model.modules() if any(isinstance(c, tuple(_TWIN)) for c in m.children())]
    bases = [m for m in bases if isinstance(m, PreTrainedModel)]
    if not bases:
        raise TypeError(
            f"{type(model).__name__} holds no encoder that fastbert knows; it knows those of BERT, RoBERTa, XLM-RoBERTa, "
            "CamemBERT, ALBERT, DistilBERT, ELECTRA and MPNet in transformers"
        )
    swapped = [m for base in bases for m in base.modules() if isinstance(m, tuple(_TWIN))]
    for module in swapped:
        _check(module)
    for module in swapped:
        module.__class__ = _TWIN.get(type(module), type(module))
    for base in bases:
        if not any(isinstance(hook, Door) for hook in base._forward_pre_hooks.values()):
            names = tuple(inspect.signature(type(base).forward).parameters)[1:]
            base.register_forward_pre_hook(Door(names), with_kwargs=True)
    return model


def _check(module: nn.Module) -> None:
    """Raise unless the module may get its twin's class (or has it)."""
    kind = type(module)
    packed = kind if kind in _STOCK else _TWIN.get(kind)
    if packed is None or "forward" in vars(module):
        raise TypeError(
            f"{kind.__module__}.{kind.__name__} is not transformers' own layer or encoder any more (a subclass, FSDP, or "
            "a device map changed it): call fastbert.accelerate before that"
        )
    if not issubclass(packed, PackedLayer):
        return
    for part in packed.parts:
        inner = type(module.get_submodule(part))
        if inner.__module__ != _STOCK[packed].__module__:
            raise TypeError(f"{kind.__name__}.{part} is a {inner.__module__}.{inner.__name__}, not transformers' own")
    if issubclass(packed, _BertLike) and (module.is_decoder or module.add_cross_attention):
        raise ValueError(
            f"this {kind.__name__} is a decoder (is_decoder, add_cross_attention): fastbert knows encoders"
        )


def restore(model: M) -> M:
    """Undo `accelerate`: the same classes and hooks as before, nothing left behind. Without effect on other models.

    Raises:
        TypeError: a wrapper such as FSDP changed the class of a layer after `accelerate`.
    """
    packed = [m for m in model.modules() if isinstance(m, _PACKED)]
    for module in packed:
        if type(module) not in _STOCK:
            raise TypeError(f"{type(module).__name__} was changed after fastbert.accelerate: undo that first")
    for module in packed:
        module.__class__ = _STOCK[type(module)]
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, Door)]:
            del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
    return model


@contextmanager
def accelerated(model: M) -> Iterator[M]:
    """`accelerate` for the length of a `with` block; a model that already was accelerated stays so."""
    before = any(isinstance(m, PackedEncoder) for m in model.modules())
    accelerate(model)
    try:
        yield model
    finally:
        if not before:
            restore(model)
