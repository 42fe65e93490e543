"""Packing: pack and unpack are inverse, plans cover every token once, wrong input is named."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert import ops, pack, pack_padded
from fastbert.ops import dispatch
from fastbert.packing import token_batches

BACKENDS = ["reference", *(n for n in dispatch.BACKENDS if dispatch.has(n, "plan_mask", "cpu", torch.bool))]

masks = st.integers(1, 6).flatmap(
    lambda length: st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=1, max_size=6)
)
id_lists = st.lists(st.lists(st.integers(0, 30521), max_size=9), min_size=1, max_size=8)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=60)
@given(mask=masks)
def test_pack_padded_and_unpack_are_inverse(backend, mask):
    mask = torch.tensor(mask)
    B, L = mask.shape
    ids = torch.arange(1, B * L + 1).view(B, L)
    with ops.use_backend(backend):
        batch, padding = pack_padded(ids, mask)
    assert batch.input_ids.tolist() == ids[mask].tolist()
    assert batch.position_ids.tolist() == torch.arange(L).expand(B, L)[mask].tolist()
    assert batch.lengths.tolist() == mask.sum(1).tolist()
    assert batch.max_seqlen == int(mask.sum(1).max())
    assert batch.cu_seqlens.dtype == torch.int32
    assert torch.equal(padding.unpack(batch.input_ids), ids * mask)
    hidden = torch.randn(batch.num_tokens, 3)
    assert torch.equal(padding.pack(padding.unpack(hidden)), hidden)
    assert [len(part) for part in batch.split(hidden)] == mask.sum(1).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=60)
@given(sequences=id_lists, offset=st.sampled_from([0, 2]))
def test_pack_lists(backend, sequences, offset):
    with ops.use_backend(backend):
        batch = pack(sequences, [[1] * len(s) for s in sequences], position_offset=offset)
    assert [part.tolist() for part in batch.split(batch.input_ids)] == sequences
    assert [part.tolist() for part in batch.split(batch.position_ids)] == [
        list(range(offset, offset + len(s))) for s in sequences
    ]
    assert batch.max_seqlen == max(map(len, sequences))
    assert batch.type_ids.tolist() == [1] * batch.num_tokens
    assert batch.num_sequences == len(sequences)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=80)
@given(
    lengths=st.lists(st.integers(0, 60), max_size=40),
    budget=st.integers(1, 100),
    limit=st.one_of(st.none(), st.integers(1, 5)),
)
def test_token_batches_cover_everything_within_the_budget(backend, lengths, budget, limit):
    with ops.use_backend(backend):
        batches = token_batches(lengths, budget, limit)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    flat = [lengths[i] for batch in batches for i in batch]
    assert flat == sorted(lengths, reverse=True)
    for batch in batches:
        assert batch
        assert limit is None or len(batch) <= limit
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= budget
    for batch, following in pairwise(batches):  # no batch is cut early
        full = limit is not None and len(batch) == limit
        assert full or sum(lengths[i] for i in batch) + lengths[following[0]] > budget


def test_unpack_is_differentiable_and_fills():
    _, padding = pack_padded(torch.tensor([[5, 6, 0]]), torch.tensor([[1, 1, 0]]))
    hidden = torch.ones(2, 1, requires_grad=True)
    padded = padding.unpack(hidden * 3, fill=-1.0)
    assert padded.flatten().tolist() == [3.0, 3.0, -1.0]
    padded.sum().backward()
    assert hidden.grad.flatten().tolist() == [3.0, 3.0]


def test_unpack_square_puts_columns_back():
    _, padding = pack_padded(torch.ones(2, 4).long(), torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0]]))
    out = padding.unpack_square([torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.zeros(1, 0, 0)])
    assert out[0, 0].tolist() == [[0, 0, 0, 0], [0, 1, 0, 2], [0, 0, 0, 0], [0, 3, 0, 4]]
    assert out[1].abs().sum() == 0


IDS = torch.ones(2, 4).long()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pack([]), ValueError, "empty"),
        (lambda: pack([[1, 2]], [[0]]), ValueError, "same lengths"),
        (lambda: pack([[1, "a"]]), TypeError, "str|int"),
        (lambda: pack([[1, 2.5]]), TypeError, "float|int"),
        (lambda: pack_padded(IDS[0]), ValueError, r"\(batch, length\)"),
        (lambda: pack_padded(IDS.float()), ValueError, "must be integers"),
        (lambda: pack_padded(IDS, torch.ones(2, 3)), ValueError, r"\(2, 3\) but the input has shape \(2, 4\)"),
        (lambda: pack_padded(IDS, torch.ones(2, 4) * -1e9), ValueError, "additive"),
        (lambda: pack_padded(IDS, torch.ones(2, 4, dtype=torch.complex64)), ValueError, "complex64"),
        (lambda: pack_padded(IDS, None, torch.ones(2, 3).long()), ValueError, "token_type_ids has shape"),
        (lambda: pack_padded(IDS, None, None, torch.ones(3, 4).long()), ValueError, "position_ids has shape"),
        (lambda: pack_padded(IDS)[1].pack(torch.ones(4, 2)), ValueError, "values have shape"),
        (lambda: pack_padded(IDS)[1].unpack(torch.ones(4, 2)), ValueError, "8 tokens were packed"),
        (lambda: pack_padded(IDS)[0].split(torch.ones(4, 2)), ValueError, "8 tokens"),
        (lambda: token_batches([3], 0), ValueError, "at least 1"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int8, torch.float32, torch.float16])
def test_any_mask_dtype_means_nonzero_keeps(dtype):
    mask = torch.tensor([[1, 0, 1, 1]]).to(dtype)
    assert pack_padded(IDS[:1], mask)[0].num_tokens == 3


KEEP = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]]).bool()
LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize(
    "mask",
    [
        KEEP[:, None, None],
        KEEP[:, None, None].expand(2, 1, 4, 4),
        torch.where(KEEP[:, None, None], 0.0, LOWEST),
        torch.where(KEEP[:, None, None].expand(2, 1, 4, 4), 0.0, float("-inf")),
        KEEP[:, None].expand(2, 4, 4).long(),
        (KEEP[:, None] & KEEP[:, :, None]).float(),
        KEEP[:, None, None] & KEEP[:, None, :, None],
    ],
)
def test_masks_for_each_query_that_agree(mask):
    batch, padding = pack_padded(torch.ones(2, 4).long(), mask)
    assert torch.equal(padding.unpack(batch.input_ids) > 0, KEEP)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 4, 4).tril(), "different keys"),
        (torch.ones(2, 1, 4, 4).bool().tril(), "different keys"),
        (torch.ones(2, 1, 4, 4).long(), "must be bool, or float"),
        (torch.ones(2, 1, 4, 4), "other values"),
        (torch.zeros(2, 1, 4, 4) - 0.5, "other values"),
        (torch.ones(2, 3, 4, 4).bool(), r"\(2, 3, 4, 4\) but"),
        (torch.block_diag(torch.ones(2, 2), torch.ones(2, 2)).expand(2, 4, 4), "different keys"),
    ],
)
def test_masks_that_cannot_be_honoured(mask, message):
    with pytest.raises(ValueError, match=message):
        pack_padded(torch.ones(2, 4).long(), mask)


def test_positions_broadcast():
    for positions in (torch.arange(5, 9), torch.arange(5, 9)[None], torch.arange(5, 9).expand(2, 4)):
        batch, _ = pack_padded(IDS, torch.tensor([[1, 1, 0, 1]] * 2), None, positions)
        assert batch.position_ids.tolist() == [5, 6, 8] * 2
