"""The CUDA engine: a model's forward pass over packed tokens, captured as one CUDA graph per bucket of tokens.

A graph computes with the model's own memory, so a write to a weight, however made, is seen by the next replay; what a
batch changes, ids and each token's range of keys, lies in static buffers. The tail of a bucket is tokens that see no
keys. On a CPU the same steps run without a graph: that is how they are tested.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fastbert import kernels
from fastbert.engine.cuda_layers import form_of
from fastbert.engine.watch import Watch, layers_of, parts_of, refusal
from fastbert.models.albert import AlbertEncoder
from fastbert.models.encoder import EncoderModel
from fastbert.models.mpnet import MPNetEncoder, relative_buckets
from fastbert.models.quantize import Float8Linear
from fastbert.ops.dispatch import backend_for, can_look, capturable, forced_backend
from fastbert.ops.embed import check_ids
from fastbert.ops.l2_normalize import l2_normalize
from fastbert.ops.pool import pool
from fastbert.packing import PackedBatch

SMALLEST, LARGEST = 64, 65536  # tokens of a bucket
VECTORS = 64  # sequences that a graph pools, at most; the tokens of its tail are one more
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Replay = Callable[[], object]
Pooled = tuple[str, bool]  # mode of `ops.pool`, and whether vectors have length 1
Capture = Callable[[Callable[[], torch.Tensor]], tuple[Replay, torch.Tensor]]


def bucket_of(num_tokens: int) -> int:
    """Tokens of the bucket of a batch: multiples of 64, from 1024 on eight of them to each power of two, so that at
    most an eighth is tail."""
    step = max(SMALLEST, 1 << max(0, (num_tokens - 1).bit_length() - 4))
    return max(1, -(-num_tokens // step)) * step


class _Graphs:
    """Captures CUDA graphs. They share one memory pool: they run one after the other, and what one leaves in its output
    is copied out before the next."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, forward: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
        with torch.cuda.device(self._device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):  # kernels are compiled and workspaces allocated before the capture
                    forward()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                hidden = forward()
        return graph.replay, hidden


def _uncaptured(forward: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
    """In place of a capture where there is no GPU: runs again what a graph would replay."""
    hidden = forward()
    return torch.no_grad()(lambda: hidden.copy_(forward())), hidden


def _views(inputs: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a bucket's inputs: ids (3, T), ranges of keys (2, T) int32, first tokens of sequences (VECTORS + 2) int32."""
    ids, ranges, places = inputs.split([3 * num_tokens, num_tokens, VECTORS // 2 + 1])
    return ids.view(3, -1), ranges.view(torch.int32).view(2, -1), places.view(torch.int32)


class _Bucket:
    """The static buffers of a graph over T tokens, and what it leaves: hidden states, or vectors of sequences."""

    def __init__(self, num_tokens: int, device: torch.device) -> None:
        self.num_tokens = num_tokens
        self.inputs = torch.zeros(4 * num_tokens + VECTORS // 2 + 1, dtype=torch.int64, device=device)
        self.ids, self.ranges, self.places = _views(self.inputs, num_tokens)
        self.staging = torch.zeros_like(self.inputs, device="cpu", pin_memory=device.type == "cuda")
        self.staged = torch.cuda.Event() if device.type == "cuda" else None
        self.cu_seqlens = torch.tensor([0, num_tokens], dtype=torch.int32, device=device)
        self.replay: Replay | None = None
        self.result = torch.empty(0)

    def load(self, batch: PackedBatch, by_ranges: bool) -> None:
        """Copy a batch in; ids of the tail are 0, and it sees no keys (or, for a backend without ranges, itself)."""
        rows, T, S = (batch.input_ids, batch.position_ids, batch.type_ids), batch.num_tokens, batch.num_sequences
        if batch.input_ids.device.type == "cpu" and self.inputs.device.type == "cuda":
            return self.stage(batch)
        if by_ranges:
            kernels.load_batch(*rows, batch.cu_seqlens, self.ids, self.ranges)
        else:
            for row, values in zip(self.ids, rows, strict=True):
                row[:T].zero_() if values is None else row[:T].copy_(values)
            self.ids[:, T:].zero_()
            self.cu_seqlens = F.pad(batch.cu_seqlens.to(self.ids.device), (0, 1), value=self.num_tokens)
        if S <= VECTORS:
            self.places[: S + 1].copy_(batch.cu_seqlens)
            self.places[S + 1 : -1].fill_(T)
            self.places[-1:].fill_(self.num_tokens)

    def stage(self, batch: PackedBatch) -> None:
        """The same of a batch on the host: put together in pinned memory, by NumPy, whose calls take a fifth of
        torch's, and sent in one copy."""
        if self.staged is not None:
            self.staged.synchronize()  # the copy of the batch before may still be reading
        ids, ranges, places = (view.numpy() for view in _views(self.staging, self.num_tokens))
        T, S, cu = batch.num_tokens, batch.num_sequences, batch.cu_seqlens.numpy()
        for row, values in zip(ids, (batch.input_ids, batch.position_ids, batch.type_ids), strict=True):
            row[:T] = 0 if values is None else values.numpy()
        ids[:, T:] = 0
        lengths = np.diff(cu)
        ranges[:, T:] = T
        ranges[0, :T], ranges[1, :T] = np.repeat(cu[:-1], lengths), np.repeat(cu[1:], lengths)
        if S <= VECTORS:
            places[: S + 1], places[S + 1 :], places[-1] = cu, T, self.num_tokens
        self.inputs.copy_(self.staging, non_blocking=True)
        if self.staged is not None:
            self.staged.record()

    def batch(self, has_types: bool) -> PackedBatch:
        """The whole bucket as a batch."""
        ids, positions, types = self.ids
        return PackedBatch(ids, positions, types if has_types else None, self.cu_seqlens, self.num_tokens)


def _check_ids(name: str, ids: torch.Tensor, table: torch.Tensor) -> None:
    """`check_ids`, which is asked for its words only: it takes longer. A negative id is a large one."""
    if can_look(ids) and ids.numel() and ids.numpy().view(np.uint64).max() >= table.shape[0]:
        check_ids(name, ids, table)


class Engine:
    """A model's graphs, captured bucket by bucket as batches come. Threads and streams take turns.

    Attributes:
        dtype: of hidden states, results and weights; statistics and sums are fp32.
        device: of the graphs and their weights.
    """

    def __init__(self, watch: Watch, model: EncoderModel, capture: Capture) -> None:
        self._watch = watch
        self._embed, self._encoder, self._embeddings = model.embed, model.encoder, model.embeddings
        self._layers = form_of(list(layers_of(self._encoder)))
        self._versions = self._written()
        self.device = model.device
        self._capture = capture
        self._buckets: dict[tuple[int, Pooled | None], _Bucket] = {}
        self._turn = threading.Lock()
        self._done: torch.cuda.Event | None = None
        self.backend = forced_backend()
        self.dtype = model.embeddings.word_embeddings.weight.dtype

    def is_fresh(self, model: EncoderModel) -> bool:
        """Whether the graphs still compute the model: same modules and settings, every tensor where it was."""
        same = self.backend == forced_backend() and parts_of(model) == self._watch.parts and self._watch.same()
        return same and self._versions == self._written()

    def has_captured(self, batch: PackedBatch, pooled: Pooled | None) -> bool:
        """Whether `run` only replays: the graph of so many tokens is there."""
        return (bucket_of(batch.num_tokens), pooled) in self._buckets

    def _written(self) -> list[int]:
        """How often torch has written to each weight, where copies of them are used: a write through `.data` it does
        not count."""
        return [t._version for t in self._watch.tensors] if self._layers.copies else []

    def run(
        self, batch: PackedBatch, out: torch.Tensor | None = None, pooling: str | None = None, unit: bool = False
    ) -> torch.Tensor | None:
        """PackedBatch -> hidden states (T, D) of the last layer, or None for more than `LARGEST` tokens.

        Args:
            batch: on the model's device; or on the host, which stages it through pinned memory.
            out: to write to, on the device or in pinned memory on the host (then the caller waits for the stream);
                None allocates on the device.
            pooling, unit: a mode of `ops.pool` asks for vectors (S, D) instead, of length 1 (and fp32) if `unit`:
                None for more than `VECTORS` sequences.

        Raises:
            IndexError: ids outside a table, for a batch on the host: a device is not asked.
            ValueError: `cu_seqlens` that do not fit the tokens (as above); `out` of another shape or dtype.
        """
        rows = batch.num_tokens if pooling is None else batch.num_sequences
        if batch.num_tokens > LARGEST or (pooling is not None and rows > VECTORS):
            return None
        self._check(batch)
        with self._turn, self._on_device():
            if self._done is not None:
                self._done.wait()  # another stream may still be reading the static buffers
            bucket = self._loaded(batch, None if pooling is None else (pooling, unit))
            shape = (rows, bucket.result.shape[1])
            if out is None:
                out = bucket.result.new_empty(shape)
            elif out.shape != shape or out.dtype != bucket.result.dtype:
                raise ValueError(f"out is {out.dtype} {tuple(out.shape)}, expected {bucket.result.dtype} {shape}")
            assert bucket.replay is not None
            bucket.replay()
            with torch.inference_mode(out.is_inference()):  # such a tensor may be written to nowhere else
                out.copy_(bucket.result[:rows], non_blocking=True)
            if self.device.type == "cuda":
                self._done = self._done or torch.cuda.Event()
                self._done.record()
        return out

    def _on_device(self) -> torch.cuda.device | nullcontext[None]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _check(self, batch: PackedBatch) -> None:
        tables = self._embeddings
        _check_ids("input_ids", batch.input_ids, tables.word_embeddings.weight)
        _check_ids("position_ids", batch.position_ids, tables.position_embeddings.weight)
        if batch.type_ids is not None and tables.token_type_embeddings is not None:
            _check_ids("type_ids", batch.type_ids, tables.token_type_embeddings.weight)
        if can_look(batch.cu_seqlens) and batch.cu_seqlens.numpy()[-1] != batch.num_tokens:
            raise ValueError(f"cu_seqlens ends at {int(batch.cu_seqlens[-1])} but there are {batch.num_tokens} tokens")

    def _loaded(self, batch: PackedBatch, pooled: Pooled | None = None) -> _Bucket:
        """The bucket of the batch with the batch in it, captured if it is new."""
        key = bucket_of(batch.num_tokens), pooled
        by_ranges = backend_for("attention", self._embeddings.word_embeddings.weight) is kernels
        bucket = self._buckets.get(key)
        if bucket is not None:
            bucket.load(batch, by_ranges)
            return bucket
        with torch.inference_mode(False), torch.no_grad():
            bucket = _Bucket(key[0], self.device)
            bucket.load(batch, by_ranges)
            bucket.replay, bucket.result = self._capture(lambda: self._forward(bucket, by_ranges, pooled))
        self._buckets[key] = bucket  # only a captured one is kept
        return bucket

    def _forward(self, bucket: _Bucket, by_ranges: bool, pooled: Pooled | None) -> torch.Tensor:
        with kernels.given_ranges(bucket.ranges) if by_ranges else nullcontext():
            batch = bucket.batch(self._embeddings.token_type_embeddings is not None)
            x, rel_bias = self._embed(batch), None
            if isinstance(self._encoder, AlbertEncoder):
                x = self._encoder.embedding_hidden_mapping_in(x)
            if isinstance(self._encoder, MPNetEncoder):
                table = self._encoder.relative_attention_bias.weight
                rel_bias = F.embedding(relative_buckets(table.device), table).mT
            hidden = self._layers(x, batch, rel_bias)
        if pooled is None:
            return hidden
        vectors = pool(hidden, bucket.places, pooled[0])
        return l2_normalize(vectors) if pooled[1] else vectors

    def __str__(self) -> str:
        how = "CUDA graphs" if self.device.type == "cuda" else "no graphs on a CPU"
        sizes = ", ".join(map(str, sorted({size for size, _ in self._buckets}))) or "none yet"
        return f"cuda engine: {str(self.dtype)[6:]} on {self.device}, {how}; buckets of tokens captured: {sizes}"


def compile(model: EncoderModel, capture: Capture | None = None) -> Engine | str:
    """An engine of the model as it is now, or why there is none. `capture` replaces CUDA graphs in tests."""
    parts, device = parts_of(model), model.device
    reason = refusal(parts, device.type, _DTYPES, (nn.Linear, Float8Linear))
    if reason is not None:
        return reason
    if device.type == "cuda" and not capturable(device.type, model.embeddings.word_embeddings.weight.dtype):
        return "no kernels are the default on CUDA (`python -m fastbert.ops`), and the reference cannot be captured"
    if capture is None:
        capture = _Graphs(device) if device.type == "cuda" else _uncaptured
    return Engine(Watch(parts, copied=False), model, capture)
