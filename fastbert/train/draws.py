"""Random numbers of a batch as a pure function of (seed, stream, epoch, item, place in the item): one integer hash.

The same token of the same item gets the same number in any batch, on any device and rank, and nothing is saved for it.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch

from fastbert.ops.dropout import hash32
from fastbert.packing import PackedBatch
from fastbert.train.batch import TrainBatch

Tensor = torch.Tensor
SPAN = 1 << 32  # draws are uniform in [0, SPAN)


@dataclass(frozen=True)
class Places:
    """Where each token stands: (T) sequence and (T) position in it, from 0."""

    sequence: Tensor
    position: Tensor

    @classmethod
    def of(cls, packed: PackedBatch) -> Places:
        """Of the tokens of a packed batch."""
        device, starts = packed.cu_seqlens.device, packed.cu_seqlens[:-1].long()
        sequence = torch.repeat_interleave(
            torch.arange(packed.num_sequences, device=device), packed.lengths.long(), output_size=packed.num_tokens
        )
        return cls(sequence, torch.arange(packed.num_tokens, device=device) - starts[sequence])


def stream_key(stream: str, seed: int, epoch: int) -> int:
    """32 bits that say which stream of numbers is meant; all 64 bits of seed and epoch count."""
    key = zlib.crc32(stream.encode())
    for number in (seed, epoch):
        for word in (number % SPAN, number // SPAN):
            key = int(hash32(torch.tensor(key ^ word))) ^ 0x9E3779B9  # the hash of 0 is 0: keep away from it
    return key


def draws(batch: TrainBatch, places: Places, stream: str, seed: int, epoch: int) -> Tensor:
    """(T) int64, uniform in [0, 2^32): one draw a token.

    Args:
        batch: its `index` says which items of the dataset these are.
        places: of the batch's tokens.
        stream: what the numbers are for; other names give independent ones.
        seed, epoch: non-negative.
    """
    index = batch.index.repeat_interleave(batch.group, output_size=batch.num_items * batch.group)
    member = torch.arange(index.shape[0], device=index.device) % batch.group
    key = stream_key(stream, seed, epoch)
    item = hash32(hash32(hash32((index >> 32) ^ key) ^ index) ^ member)
    return hash32(item[places.sequence] ^ hash32(places.position))
