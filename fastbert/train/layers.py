"""What training must know of a model's layers: their order, how deep a parameter lies, what is computed again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fastbert.models.encoder import EncoderModel
from fastbert.models.layer_stack import LayerStack


def encoders(model: nn.Module) -> list[EncoderModel]:
    """The base models in a model: one, or two where a generator and a discriminator are trained together."""
    return [module for module in model.modules() if isinstance(module, EncoderModel)]


def layers_of(stack: LayerStack) -> list[nn.Module]:
    """The layers of an encoder in the order in which they run; a shared one comes again."""
    shared = getattr(stack, "layers", None)  # ALBERT's, which run one layer many times
    return list(shared()) if shared is not None else list(stack.get_submodule("layer").children())


def depths(model: nn.Module) -> tuple[dict[str, int], int]:
    """How deep each parameter lies, and the greatest depth.

    Returns:
        name -> 0 for what comes before the first of n layers, i for layer i from 1, n + 1 for poolers and heads (as
        Clark et al. 2020 and BEiT count for layer-wise rates). A layer that runs several times counts where it runs
        last. Encoders of different depth in one model (a generator and a discriminator) each end at the same depth.
    """
    bases = encoders(model)
    stacks = [layers_of(base.encoder) for base in bases]
    top = max((len(layers) for layers in stacks), default=0) + 1
    by_id: dict[int, int] = {}
    for base, layers in zip(bases, stacks, strict=True):
        below = [base.embeddings, base.encoder, *(m for m in base.children() if m is not base.pooler)]
        by_id |= {id(p): 0 for module in below for p in module.parameters()}
        first = top - len(layers)
        by_id |= {id(p): first + i for i, layer in enumerate(layers) for p in layer.parameters()}
    return {name: by_id.get(id(p), top) for name, p in model.named_parameters()}, top


@contextmanager
def checkpointing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing inside the block, where it was not on before."""
    off = [base for base in encoders(model) if wanted and not base.is_gradient_checkpointing]
    for base in off:
        base.gradient_checkpointing_enable()
    try:
        yield
    finally:
        for base in off:
            base.gradient_checkpointing_disable()
