"""y = dropout(LN(word[input_ids] + type[type_ids] + position[position_ids])): the input layer of every family."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastbert.ops.dispatch import backend_for, can_look, check_devices
from fastbert.ops.dropout import Seed, check_dropout, dropout_ref


def embed_ref(
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    type_ids: torch.Tensor | None,
    word: torch.Tensor,
    position: torch.Tensor,
    token_type: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
    seed: Seed = 0,
) -> torch.Tensor:
    """The specification: `(word + type) + position`, statistics in fp32 (fp64 for fp64), dropout last."""
    wide = torch.promote_types(word.dtype, torch.float32)
    z = F.embedding(input_ids, word, padding_idx).to(wide)
    if type_ids is not None and token_type is not None:
        z = z + F.embedding(type_ids, token_type).to(wide)
    z = z + F.embedding(position_ids, position).to(wide)
    y = F.layer_norm(z, z.shape[-1:], weight.to(wide), bias.to(wide), eps)
    return dropout_ref(y, dropout_p, seed).to(word.dtype)


class EmbedFunction(torch.autograd.Function):
    """Saves the ids and the row statistics; the sum is gathered again from the tables in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: Any,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        type_ids: torch.Tensor | None,
        word: torch.Tensor,
        position: torch.Tensor,
        token_type: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
        padding_idx: int | None,
        dropout_p: float,
        seed: Seed,
    ) -> torch.Tensor:
        y, mean, rstd = backend.embed_fwd(
            input_ids, position_ids, type_ids, word, position, token_type, weight, bias, eps, dropout_p, seed
        )
        ctx.backend, ctx.padding_idx, ctx.dropout_p, ctx.seed = backend, padding_idx, dropout_p, seed
        ctx.save_for_backward(input_ids, position_ids, type_ids, word, position, token_type, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        dword, dposition, dtoken_type, dweight, dbias = ctx.backend.embed_bwd(
            dy.contiguous(), *ctx.saved_tensors, ctx.padding_idx, ctx.dropout_p, ctx.seed
        )
        return None, None, None, None, dword, dposition, dtoken_type, dweight, dbias, None, None, None, None


def check_ids(name: str, ids: torch.Tensor, table: torch.Tensor) -> None:
    """Raise on ids outside the table. Only on the CPU: on a GPU the check would cost a synchronisation."""
    if not can_look(ids) or ids.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(ids))
    if low < 0 or high >= table.shape[0]:
        raise IndexError(
            f"{name} has values from {low} to {high} but the table has rows 0 to {table.shape[0] - 1}: "
            "was the text tokenised with this model's tokenizer, and is it within max_position_embeddings?"
        )


def embed(
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    type_ids: torch.Tensor | None,
    word: torch.Tensor,
    position: torch.Tensor,
    token_type: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-12,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
    seed: Seed = 0,
) -> torch.Tensor:
    """Sum of three embedding rows, layer-normalised, with dropout (Devlin et al. 2018, arXiv 1810.04805, fig. 2).

    Args:
        input_ids, position_ids: (T) int64.
        type_ids: (T) int64, or None for families without segments.
        word: (V, D); position: (P, D); token_type: (N, D) or None.
        weight, bias: (D) of the layer norm; eps is added in fp32.
        padding_idx: row of `word` that receives no gradient.
        dropout_p, seed: see `fastbert.ops.dropout`.

    Returns:
        (T, D) in the dtype of `word`.
        Saved for backward: the ids and mean and 1/std of each row (T).

    Raises:
        IndexError: ids outside a table (checked on the CPU only).
        ValueError: id tensors of different lengths, tables of different dtypes, or `dropout_p` outside [0, 1).
    """
    if input_ids.ndim != 1 or position_ids.shape != input_ids.shape:
        raise ValueError(
            f"input_ids {tuple(input_ids.shape)} and position_ids {tuple(position_ids.shape)} must both be (T)"
        )
    if (type_ids is None) != (token_type is None):
        raise ValueError("type_ids and the token_type table go together: give both or neither")
    dtypes = {t.dtype for t in (word, position, token_type) if t is not None}
    if len(dtypes) > 1:
        raise ValueError(f"the embedding tables must have one dtype, got {', '.join(sorted(map(str, dtypes)))}")
    check_devices(
        word=word, position=position, token_type=token_type, input_ids=input_ids, position_ids=position_ids,
        type_ids=type_ids, weight=weight, bias=bias,
    )  # fmt: skip
    check_ids("input_ids", input_ids, word)
    check_ids("position_ids", position_ids, position)
    if type_ids is not None and token_type is not None:
        check_ids("type_ids", type_ids, token_type)
    check_dropout(dropout_p)
    backend = backend_for("embed", word)
    if backend is None:
        return embed_ref(
            input_ids,
            position_ids,
            type_ids,
            word,
            position,
            token_type,
            weight,
            bias,
            eps,
            padding_idx,
            dropout_p,
            seed,
        )
    return EmbedFunction.apply(
        backend, input_ids, position_ids, type_ids, word, position, token_type, weight, bias, eps, padding_idx,
        dropout_p, seed,
    )  # fmt: skip
