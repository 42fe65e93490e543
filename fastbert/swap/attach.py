"""`accelerate` and `restore`: encoder and layers of a live model get their twins' classes, and their own back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from fastbert.swap import encoders, layers
from fastbert.swap.encoders import PackedEncoder
from fastbert.swap.layers import BertLike, PackedLayer

M = TypeVar("M", bound=nn.Module)

_PACKED: tuple[type[nn.Module], ...] = (
    layers.BertLayer, encoders.BertEncoder, layers.RobertaLayer, encoders.RobertaEncoder, layers.XLMRobertaLayer,
    encoders.XLMRobertaEncoder, layers.CamembertLayer, encoders.CamembertEncoder, layers.ElectraLayer,
    encoders.ElectraEncoder, layers.AlbertLayer, encoders.AlbertTransformer, layers.TransformerBlock,
    encoders.Transformer, layers.MPNetLayer, encoders.MPNetEncoder,
)  # fmt: skip
_STOCK = {packed: packed.__bases__[1] for packed in _PACKED}
_TWIN = {stock: packed for packed, stock in _STOCK.items()}


class FastbertPaddingWarning(UserWarning):
    """Hugging Face's own head reads padded positions, which are zero now; the message says what that changes."""


def accelerate(model: M) -> M:
    """Let a live model compute its encoder on packed tokens; it is changed in place and returned.

    Args:
        model: a `transformers` BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ALBERT, DistilBERT, ELECTRA or MPNet, base or
            with any head, or anything that holds one: SentenceTransformer, CrossEncoder, PEFT or DDP wrappers.

    Parameters and their names, hooks on layers and above, dropout, gradient checkpointing and `save_pretrained` stay.
    Calls that packing cannot honour (attention probabilities, a mask per query, caches, hooks inside layers) run on
    Hugging Face's path with a `FastbertFallbackWarning`. Under `torch.compile` the encoder is one graph break.
    Rows packed by the caller are honoured with `cu_seq_lens_q` (not by MPNet, which does not pass it on).

    Hidden states at padding are zero, where Hugging Face's mean nothing. A head that reads them anyway sees that:
    question answering's loss takes its softmax over padding too.

    Warns:
        FastbertPaddingWarning: question answering, whose loss in transformers depends on the values at padding.

    Raises:
        TypeError: no encoder of these families in the model, or one whose classes somebody else has replaced.
        ValueError: a decoder, or cross-attention.
    """
    swapped = [m for m in model.modules() if isinstance(m, tuple(_TWIN))]
    if not swapped:
        raise TypeError(
            f"{type(model).__name__} holds no encoder that fastbert knows; it knows transformers' BERT, RoBERTa, "
            "XLM-RoBERTa, CamemBERT, ALBERT, DistilBERT, ELECTRA and MPNet"
        )
    for module in swapped:
        _check(module)
    for module in swapped:
        module.__class__ = _TWIN.get(type(module), type(module))
    if any(name.rpartition(".")[2] == "qa_outputs" for name, _ in model.named_modules()):
        warnings.warn(
            "transformers' question answering takes its softmax over padding too: on ragged batches its loss differs "
            "from before, as padded positions are zero now. fastbert's own ...ForQuestionAnswering leaves them out",
            FastbertPaddingWarning,
            stacklevel=2,
        )
    return model


def _check(module: nn.Module) -> None:
    """Raise unless the module may get its twin's class (or has it)."""
    kind = type(module)
    packed = kind if kind in _STOCK else _TWIN.get(kind)
    if packed is None or "forward" in vars(module):
        raise TypeError(
            f"{kind.__module__}.{kind.__name__} is not transformers' own layer or encoder any more (a subclass, FSDP "
            "or a device map changed it): call fastbert.accelerate before that"
        )
    if not issubclass(packed, PackedLayer):
        return
    for part in packed.parts:
        inner = type(module.get_submodule(part))
        if inner.__module__ != _STOCK[packed].__module__:
            raise TypeError(f"{kind.__name__}.{part} is a {inner.__module__}.{inner.__name__}, not transformers' own")
    if issubclass(packed, BertLike) and (module.is_decoder or module.add_cross_attention):
        raise ValueError(
            f"this {kind.__name__} is a decoder (is_decoder, add_cross_attention): fastbert knows encoders"
        )


def restore(model: M) -> M:
    """Undo `accelerate`: the same classes as before, nothing left behind. Without effect on other models.

    Raises:
        TypeError: a wrapper such as FSDP changed the class of a layer after `accelerate`.
    """
    packed = [m for m in model.modules() if isinstance(m, _PACKED)]
    for module in packed:
        if type(module) not in _STOCK:
            raise TypeError(f"{type(module).__name__} was changed after fastbert.accelerate: undo that first")
    for module in packed:
        module.__class__ = _STOCK[type(module)]
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
