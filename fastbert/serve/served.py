"""A loaded model of any kind: token ids of a packed batch in, for each sequence the array that was asked for out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from fastbert.embedder import Embedder, position_limit
from fastbert.engine import pin, release_weights
from fastbert.engine.dtypes import resolve_device, resolve_dtype
from fastbert.hub import resolve
from fastbert.machine import cpu
from fastbert.models.auto import (
    AutoClass,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from fastbert.models.encoder import EncoderModel
from fastbert.models.quantize import loaded_dtype, quantize
from fastbert.packing import PackedBatch
from fastbert.pooling import Pooling
from fastbert.sentence_folder import scales_first, with_dense
from fastbert.serve import readouts
from fastbert.serve.kinds import Kind, kind_of
from fastbert.tokenizer import Tokenizer
from fastbert.weights import read_json

_HEADS: dict[str, type[AutoClass]] = {
    "classifier": AutoModelForSequenceClassification,
    "reranker": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "fill-mask": AutoModelForMaskedLM,
    "splade": AutoModelForMaskedLM,
}
_VECTORS = frozenset(("vectors", "unit"))
# Half of what `Embedder` takes, at nearly its speed: who comes while a pass is under way waits for its end.
_TOKENS_PER_THREAD, _TOKENS_PER_GPU = 1024, 16384


class Served:
    """A model that is served. `compute` belongs to `passes_at_once` threads at a time; all else may be read from any.

    Attributes:
        kind: `embedding`, `splade`, `classifier`, `reranker`, `token-classification` or `fill-mask`.
        base: the encoder.
        tokenizer: its tokenizer.
        outputs: what `compute` gives, of `fastbert.serve.work.OUTPUTS`.
        dimension: numbers of a vector: features, words of the vocabulary for `splade`, None for the other kinds.
        pooling: `cls`, `mean`, `last_token`, ..., `splade`, or None.
        prompts, default_prompt_name: of a sentence-transformers folder.
        id2label: names of a classifier's columns.
        mask_id: id of the mask token, or None.
        dtype: `float32`, `bfloat16`, `float16` or `int8`.
        sha: commit on the hub, where the folder is a snapshot of it.
        num_threads: of a forward pass on a CPU.
        batch_tokens: tokens of a forward pass that its device is good at.
        passes_at_once: passes that may share a CPU's threads: two where an engine computes on an even number, else one.
        embedder: of the kind `embedding`.
    """

    def __init__(
        self,
        kind: Kind,
        model: Any,
        tokenizer: Tokenizer,
        dtype: str,
        *,
        embedder: Embedder | None = None,
        num_threads: int | None = None,
        sha: str | None = None,
    ) -> None:
        self.kind, self.tokenizer, self.dtype, self.sha, self.embedder = kind.name, tokenizer, dtype, sha, embedder
        self._model = model
        self.base: EncoderModel = model.base_model if embedder is None else model
        self.num_threads = default_threads() if num_threads is None else num_threads
        vocab_size = self.base.config.vocab_size
        if tokenizer.num_ids > vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.num_ids} ids but the model's vocab_size is {vocab_size}: "
                "they do not belong together"
            )
        self.mask_id = _mask_id(tokenizer)
        self.id2label: Mapping[int, str] = model.config.id2label if kind.name in _HEADS else {}
        self.prompts: Mapping[str, str] = {} if embedder is None else embedder.prompts
        self.default_prompt_name = None if embedder is None else embedder.default_prompt_name
        self._readouts = readouts.of_kind(kind, model, embedder, self.mask_id)
        self.outputs = frozenset(self._readouts)
        self._unit_vectors: Callable[[PackedBatch], torch.Tensor] | None = None  # where an engine makes them whole
        self.pooling: str | None = None
        self.dimension: int | None = None
        if embedder is not None:
            self.dimension = embedder.get_embedding_dimension()
            self.pooling = "+".join(embedder.pooling.modes).replace("lasttoken", "last_token")
        elif kind.name == "splade":
            self.dimension, self.pooling = vocab_size, "splade"
        on_cpu = self.device.type == "cpu"
        self.batch_tokens = _TOKENS_PER_THREAD * self.num_threads if on_cpu else _TOKENS_PER_GPU
        self.passes_at_once = 1

    @classmethod
    def load(
        cls,
        name: str | os.PathLike[str],
        *,
        dtype: str | None = None,
        device: torch.device | str | None = None,
        num_threads: int | None = None,
        max_seq_length: int | None = None,
        pooling: str | None = None,
        dense_path: str | None = None,
        keep_weights: bool = True,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> Served:
        """Load a model of the kind that its files say.

        Args:
            name: a folder or a hub id; see `fastbert.hub.resolve` for where it is looked for.
            dtype, device: as in `Embedder.from_pretrained`.
            num_threads: threads of a CPU forward pass; None = what affinity, control groups and torch's setting allow.
            max_seq_length: tokens an input; None = as the model's files say.
            pooling: instead of what the files say; see `fastbert.serve.kinds.kind_of`.
            dense_path: folder of a Dense module, in the model's own, that takes the place of those that the files name.
            keep_weights: as in `Embedder.from_pretrained`.
            revision, cache_dir, token, local_files_only: as in `huggingface_hub.snapshot_download`.

        Raises:
            FileNotFoundError: no such model, or a file is missing in its folder.
            ValueError: a corrupt file, a model that is not served, or an option or device that does not fit.
        """
        root = resolve(name, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only)
        kind = kind_of(root, pooling)
        device = resolve_device(device)
        dtype = resolve_dtype(dtype, device)
        sha = root.name if root.parent.name == "snapshots" else None
        if kind.name == "embedding":
            embedder = Embedder.from_pretrained(root, dtype, device, max_seq_length=max_seq_length)
            if kind.pooling is not None:
                embedder.pooling = Pooling((kind.pooling,), embedder.pooling.include_prompt)
            if dense_path is not None:
                embedder.modules = with_dense(embedder.modules, root / dense_path).to(device)
            served = cls(
                kind, embedder.model, embedder.tokenizer, dtype, embedder=embedder, num_threads=num_threads, sha=sha
            )
            return served._owned(keep_weights)
        if dense_path is not None:
            raise ValueError(
                f"{root} holds a {kind.name} model: only vectors go through a Dense module, not its answers"
            )
        family = _HEADS[kind.name].class_of(read_json(kind.transformer / "config.json").get("model_type"))
        model = family.from_pretrained(kind.transformer, dtype=loaded_dtype(dtype), device=device)
        limit = position_limit(model.base_model)
        declared = None if kind.max_length is None else min(kind.max_length, limit)
        length = declared if max_seq_length is None else max_seq_length
        tokenizer = Tokenizer.from_folder(kind.transformer, limit, length)
        quantize(model.base_model, dtype)
        served = cls(kind, model, tokenizer, dtype, num_threads=num_threads, sha=sha)
        return served._owned(keep_weights)

    def _owned(self, keep_weights: bool) -> Served:
        if not keep_weights:
            _ = self.fingerprint  # which reads them
            release_weights(self._model)
        engine = pin(self.base)  # nobody else has it, and here nothing changes it
        self.passes_at_once = 1 if engine is None or self.num_threads % 2 else 2
        if engine is not None and self.embedder is not None and _is_plain(self.embedder):
            self._unit_vectors = partial(engine.run, pooling=self.embedder.pooling.modes[0], unit=True)
        return self

    @cached_property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.base.device

    @property
    def max_length(self) -> int:
        """Tokens of an input, special ones included."""
        return self.tokenizer.max_length

    @property
    def vocab_size(self) -> int:
        """One more than the greatest token id that an input may have."""
        return self.base.config.vocab_size

    @property
    def position_offset(self) -> int:
        """Position of each input's first token."""
        return self.base.position_offset

    @cached_property
    def fingerprint(self) -> bytes:
        """Hash of all weights and of what makes outputs of them: two models with the same one answer alike."""
        digest = blake2b(digest_size=16)
        modules = [self._model] if self.embedder is None else [self._model, self.embedder.modules]
        made = [self.kind, self.dtype, self.pooling, self.dimension, self.device.type, self.base.config.to_dict()]
        digest.update(repr(made).encode())
        for module in modules:
            for name, tensor in module.state_dict().items():
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.digest()

    def compute(
        self, batch: PackedBatch, outputs: Sequence[str], prompt_lengths: Sequence[int] | None = None, share: int = 1
    ) -> list[np.ndarray]:
        """One forward pass.

        In fp32 on a CPU a sequence's values are the same bits whatever it is batched with, and vectors are those of
        `Embedder.encode`.

        Args:
            batch: S sequences, on the CPU.
            outputs: what each of them is computed for, of `self.outputs`.
            prompt_lengths: leading tokens of each that belong to a prompt; None = 0.
            share: passes that share the threads of a CPU: this one is encoded on as large a part of them.

        Returns:
            S float32 arrays; see `fastbert.serve.work.Work` for their shapes.
        """
        self._use_threads(share)
        if self._unit_vectors is not None and _VECTORS.issuperset(outputs):
            return list(self._unit_vectors(batch).numpy())
        return self._read(batch, outputs, prompt_lengths)

    @torch.inference_mode()
    def _read(
        self, batch: PackedBatch, outputs: Sequence[str], prompt_lengths: Sequence[int] | None
    ) -> list[np.ndarray]:
        lengths = [0] * len(outputs) if prompt_lengths is None else prompt_lengths
        places = {output: [i for i, wanted in enumerate(outputs) if wanted == output] for output in set(outputs)}
        found: dict[int, np.ndarray] = {}
        if self.embedder is not None and places.keys() <= _VECTORS and len(set(lengths)) == 1:
            pooled_SD, _ = self.embedder.pooled(batch, lengths[0])  # the engine stages it; nobody reads hidden states
            self._use_threads(1)
            for output, rows in places.items():
                vectors = readouts.vectors_of(self.embedder, pooled_SD, rows, output == "unit")
                found.update(zip(rows, vectors, strict=True))
        else:
            if self.device.type != "cpu":
                batch = batch.to(self.device, non_blocking=True)
            encoded = self.base.encode_packed(batch)
            self._use_threads(1)  # a BLAS may round differently with their number
            for output, rows in places.items():
                found.update(zip(rows, self._readouts[output](encoded, rows, lengths), strict=True))
        return [found[row] for row in range(len(outputs))]

    def _use_threads(self, share: int) -> None:
        """Of the thread that computes: OpenMP keeps the number by thread."""
        wanted = -(-self.num_threads // share)
        if self.device.type == "cpu" and torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)

    @property
    def skips_prompt(self) -> bool:
        """Whether vectors leave out the tokens of a prompt."""
        return self.embedder is not None and not self.embedder.pooling.include_prompt

    def execution_plan(self) -> str:
        """What a forward pass runs on."""
        return self.base.execution_plan()


def _is_plain(embedder: Embedder) -> bool:
    """Whether its vectors are token states pooled and scaled to length 1, and nothing else."""
    pooling, modules = embedder.pooling, embedder.modules
    plain = len(pooling.modes) == len(modules) == 1 and pooling.include_prompt and embedder.truncate_dim is None
    return plain and scales_first(modules)


def default_threads() -> int:
    """Threads of a CPU forward pass: torch's setting (physical cores, `OMP_NUM_THREADS`), no more than are allotted."""
    return min(torch.get_num_threads(), cpu().usable)


def _mask_id(tokenizer: Tokenizer) -> int | None:
    token = tokenizer.config.get("mask_token")
    named = token.get("content") if isinstance(token, Mapping) else token
    ids = (tokenizer.backend.token_to_id(t) for t in (named, "[MASK]", "<mask>") if isinstance(t, str))
    return next((i for i in ids if i is not None), None)
