"""The CUDA engine: a model's forward pass over packed tokens, captured as one CUDA graph per bucket of tokens.

A graph computes with the model's own memory, so a write to a weight, however made, is seen by the next replay; what a
batch changes, ids and each token's range of keys, lies in static buffers. The tail of a bucket is tokens that see no
keys. On a CPU the same steps run without a graph: that is how they are tested.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext

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
from fastbert.packing import PackedBatch

SMALLEST, LARGEST = 64, 65536  # tokens of a bucket
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Replay = Callable[[], object]
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
    return lambda: hidden.copy_(forward()), hidden


class _Bucket:
    """The static buffers of a graph over T tokens: ids (3, T), ranges of keys (2, T), the hidden states it leaves."""

    def __init__(self, num_tokens: int, device: torch.device) -> None:
        self.num_tokens = num_tokens
        self.ids = torch.zeros(3, num_tokens, dtype=torch.int64, device=device)
        self.staging = torch.zeros(3, num_tokens, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.staged: torch.cuda.Event | None = None
        self.ranges = torch.zeros(2, num_tokens, dtype=torch.int32, device=device)
        self.cu_seqlens = torch.tensor([0, num_tokens], dtype=torch.int32, device=device)
        self.replay: Replay | None = None
        self.hidden = torch.empty(0)

    def load(self, batch: PackedBatch, by_ranges: bool) -> None:
        """Copy a batch in; ids of the tail are 0, and it sees no keys (or, for a backend without ranges, itself)."""
        T, device = batch.num_tokens, self.ids.device
        rows = (batch.input_ids, batch.position_ids, batch.type_ids)
        host = batch.input_ids.device.type == "cpu" and device.type == "cuda"
        if by_ranges and not host:
            return kernels.load_batch(*rows, batch.cu_seqlens, self.ids, self.ranges)
        if host and self.staged is not None:
            self.staged.synchronize()  # the copy of the batch before last may still be reading
        target = self.staging if host else self.ids
        for row, values in zip(target, rows, strict=True):
            row[:T].zero_() if values is None else row[:T].copy_(values)
        target[:, T:].zero_()
        if host:
            self.ids.copy_(self.staging, non_blocking=True)
            self.staged = torch.cuda.Event()
            self.staged.record()
        cu_seqlens = batch.cu_seqlens.to(device, non_blocking=True)
        if by_ranges:
            kernels.fill_ranges(cu_seqlens, self.ranges)
        else:
            self.cu_seqlens = F.pad(cu_seqlens, (0, 1), value=self.num_tokens)

    def batch(self, has_types: bool) -> PackedBatch:
        """The whole bucket as a batch."""
        ids, positions, types = self.ids
        return PackedBatch(ids, positions, types if has_types else None, self.cu_seqlens, self.num_tokens)


class Engine:
    """A model's graphs, captured bucket by bucket as batches come. Threads and streams take turns.

    Attributes:
        dtype: of hidden states, results and weights; statistics and sums are fp32.
    """

    def __init__(self, watch: Watch, model: EncoderModel, capture: Capture) -> None:
        self._watch = watch
        self._embed, self._encoder, self._embeddings = model.embed, model.encoder, model.embeddings
        self._layers = form_of(list(layers_of(self._encoder)))
        self._versions = self._written()
        self._device = model.device
        self._capture = capture
        self._buckets: dict[int, _Bucket] = {}
        self._turn = threading.Lock()
        self._done: torch.cuda.Event | None = None
        self.backend = forced_backend()
        self.dtype = model.embeddings.word_embeddings.weight.dtype

    def is_fresh(self, model: EncoderModel) -> bool:
        """Whether the graphs still compute the model: same modules and settings, every tensor where it was."""
        same = self.backend == forced_backend() and parts_of(model) == self._watch.parts and self._watch.same()
        return same and self._versions == self._written()

    def _written(self) -> list[int]:
        """How often torch has written to each weight, where copies of them are used: a write through `.data` it does
        not count."""
        return [t._version for t in self._watch.tensors] if self._layers.copies else []

    def run(self, batch: PackedBatch, out: torch.Tensor | None = None) -> torch.Tensor | None:
        """PackedBatch -> hidden states (T, D) of the last layer, or None for more than `LARGEST` tokens.

        Args:
            batch: on the model's device; or on the host, which stages it through pinned memory.
            out: (T, D) to write to, on the device or in pinned memory on the host (then the caller waits for the
                stream); None allocates on the device.

        Raises:
            IndexError: ids outside a table, for a batch on the host: a device is not asked.
            ValueError: `cu_seqlens` that do not fit the tokens (as above); `out` of another shape or dtype.
        """
        T = batch.num_tokens
        if T > LARGEST:
            return None
        self._check(batch)
        with torch.inference_mode(False), torch.no_grad(), self._turn, self._on_device():
            if self._done is not None:
                self._done.wait()  # another stream may still be reading the static buffers
            bucket = self._loaded(batch)
            if out is None:
                out = bucket.hidden.new_empty(T, bucket.hidden.shape[1])
            elif out.shape != (T, bucket.hidden.shape[1]) or out.dtype != self.dtype:
                expected = (T, bucket.hidden.shape[1])
                raise ValueError(f"out is {out.dtype} {tuple(out.shape)}, expected {self.dtype} {expected}")
            assert bucket.replay is not None
            bucket.replay()
            with torch.inference_mode(out.is_inference()):  # such a tensor may be written to nowhere else
                out.copy_(bucket.hidden[:T], non_blocking=True)
            if self._device.type == "cuda":
                self._done = torch.cuda.Event()
                self._done.record()
        return out

    def _on_device(self) -> torch.cuda.device | nullcontext[None]:
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _check(self, batch: PackedBatch) -> None:
        tables = self._embeddings
        check_ids("input_ids", batch.input_ids, tables.word_embeddings.weight)
        check_ids("position_ids", batch.position_ids, tables.position_embeddings.weight)
        if batch.type_ids is not None and tables.token_type_embeddings is not None:
            check_ids("type_ids", batch.type_ids, tables.token_type_embeddings.weight)
        if can_look(batch.cu_seqlens) and int(batch.cu_seqlens[-1]) != batch.num_tokens:
            raise ValueError(f"cu_seqlens ends at {int(batch.cu_seqlens[-1])} but there are {batch.num_tokens} tokens")

    def _loaded(self, batch: PackedBatch) -> _Bucket:
        """The bucket of the batch with the batch in it, captured if it is new."""
        size = bucket_of(batch.num_tokens)
        bucket = self._buckets.get(size) or _Bucket(size, self._device)
        by_ranges = backend_for("attention", self._embeddings.word_embeddings.weight) is kernels
        bucket.load(batch, by_ranges)
        if bucket.replay is None:
            bucket.replay, bucket.hidden = self._capture(lambda: self._forward(bucket, by_ranges))
            self._buckets[size] = bucket  # only a captured one is kept
        return bucket

    def _forward(self, bucket: _Bucket, by_ranges: bool) -> torch.Tensor:
        with kernels.given_ranges(bucket.ranges) if by_ranges else nullcontext():
            batch = bucket.batch(self._embeddings.token_type_embeddings is not None)
            x, rel_bias = self._embed(batch), None
            if isinstance(self._encoder, AlbertEncoder):
                x = self._encoder.embedding_hidden_mapping_in(x)
            if isinstance(self._encoder, MPNetEncoder):
                table = self._encoder.relative_attention_bias.weight
                rel_bias = F.embedding(relative_buckets(table.device), table).mT
            return self._layers(x, batch, rel_bias)

    def __str__(self) -> str:
        how = "CUDA graphs" if self._device.type == "cuda" else "no graphs on a CPU"
        sizes = ", ".join(map(str, sorted(self._buckets))) or "none yet"
        return f"cuda engine: {str(self.dtype)[6:]} on {self._device}, {how}; buckets of tokens captured: {sizes}"


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
