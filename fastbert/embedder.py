"""Embedder: texts to vectors. It sorts by length, packs to a token budget, runs the encoder, pools, restores the order.

It knows no file format (`sentence_folder`, `tokenizer`), no kernel and no padding.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastbert.engine import release_weights
from fastbert.engine.dtypes import resolve_device, resolve_dtype
from fastbert.hub import resolve
from fastbert.models.auto import AutoModel
from fastbert.models.encoder import EncoderModel
from fastbert.models.quantize import loaded_dtype, quantize
from fastbert.ops import l2_normalize
from fastbert.packing import PackedBatch, pack, token_batches
from fastbert.progress import progress
from fastbert.sentence_folder import (
    SIMILARITIES,
    Dense,
    SentenceFolder,
    finished,
    read_folder,
    scales_first,
    write_folder,
)
from fastbert.tokenizer import Text, Tokenizer
from fastbert.vectors import Collector, Vectors, quantize_vectors, similarity, similarity_pairwise
from fastbert.weights import read_json
from fastbert.windows import encode_windows

# Tokens a batch. MiniLM fp32 on one Zen 5 thread, real sentences: 4.2 k tokens/s at 2048, 4.0 at 512, 3.8 at 8192.
TOKENS_PER_THREAD, TOKENS_PER_GPU = 2048, 65536


@dataclass(frozen=True)
class Embeddings:
    """Vectors and what they cost.

    Attributes:
        vectors: (N, D) float32, on the CPU.
        num_tokens: tokens computed, special ones included.
        num_truncated: texts that were longer than `max_seq_length`.
    """

    vectors: torch.Tensor
    num_tokens: int
    num_truncated: int


@dataclass(frozen=True)
class _Step:
    """One packed batch, computed: `rows` are its texts' places in the list."""

    rows: list[int]
    batch: PackedBatch
    hidden_TD: torch.Tensor | None
    vectors_SD: torch.Tensor
    num_truncated: int


class Embedder:
    """An encoder with its tokenizer and pooling; `encode` has the arguments and results of sentence-transformers.

    Calls keep no state on the object: several threads may encode at once.

    Attributes:
        model: the encoder, in `eval()` mode.
        prompts: texts by name that can be put before each input.
        default_prompt_name: the prompt that is used where none is named, or None.
        truncate_dim: leading features that are returned, or None for all.
    """

    def __init__(self, model: EncoderModel, tokenizer: Tokenizer, folder: SentenceFolder) -> None:
        if tokenizer.num_ids > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.num_ids} ids but the model's vocab_size is {model.config.vocab_size}: "
                "they do not belong together"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.pooling = folder.pooling
        self.modules = folder.modules.to(model.device)
        self.prompts = {"query": "", "document": "", **folder.prompts}
        self.default_prompt_name = folder.default_prompt_name
        if self.default_prompt_name is not None:
            self._prompt(None, self.default_prompt_name)
        self.truncate_dim = folder.truncate_dim
        self._dimension(self.truncate_dim)  # says where modules do not fit one another
        self.similarity_fn_name = folder.similarity_fn_name
        self._folder = folder

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        dtype: str | None = None,
        device: torch.device | str | None = None,
        num_threads: int | None = None,
        max_seq_length: int | None = None,
        *,
        keep_weights: bool = True,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> Embedder:
        """Load a sentence-transformers model, or a plain encoder (mean-pooled, with a warning).

        Args:
            name: a folder or a hub id; see `fastbert.hub.resolve` for where it is looked for.
            dtype: `float32`; `bfloat16`; `float16` (GPU only); `int8` (CPU only, opt-in: cosine to fp32 about 0.998);
                `float8` (GPU of capability 8.9 or newer, opt-in);
                `auto`, the fastest that is as good: bfloat16 on a GPU or CPU that multiplies it faster, else float16
                on a GPU, float32 on a CPU. None = float32 on a CPU, `auto` on a GPU.
            device: None = a GPU where there is one.
            num_threads: threads of a CPU forward pass; this is torch's setting and counts for the whole process.
            max_seq_length: tokens a text; None = as the model's files say.
            keep_weights: False lets the weights go once the CPU engine has packed them (about half of the memory): the
                model can then encode, and no more; see `fastbert.release_weights`.
            revision, cache_dir, token, local_files_only: as in `huggingface_hub.snapshot_download`.

        Raises:
            FileNotFoundError: no such model, or a file is missing in its folder.
            ValueError: a corrupt file, an unsupported architecture or module, or an option that does not fit.
        """
        device = resolve_device(device)
        dtype = resolve_dtype(dtype, device)
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        root = resolve(name, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only)
        folder = read_folder(root)
        family = AutoModel.class_of(read_json(folder.transformer / "config.json").get("model_type"))
        options: dict[str, Any] = {"add_pooling_layer": False} if "pooler" in family.head_roots else {}
        model = family.from_pretrained(folder.transformer, dtype=loaded_dtype(dtype), device=device, **options)
        limit = position_limit(model)
        declared = None if folder.max_seq_length is None else min(folder.max_seq_length, limit)
        length = declared if max_seq_length is None else max_seq_length
        tokenizer = Tokenizer.from_folder(folder.transformer, limit, length, folder.do_lower_case)
        quantize(model, dtype)
        if not keep_weights:
            release_weights(model)
        return cls(model, tokenizer, folder)

    @property
    def device(self) -> torch.device:
        """Where the encoder runs."""
        return self.model.device

    @property
    def max_seq_length(self) -> int:
        """Tokens a text may have, special tokens included; longer ones are cut. Settable."""
        return self.tokenizer.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        limit = position_limit(self.model)
        if value > limit:
            raise ValueError(f"max_seq_length is {value} but the model has positions for {limit} tokens")
        self.tokenizer = self.tokenizer.with_max_length(value)

    @property
    def similarity_fn_name(self) -> str:
        """What `similarity` computes: cosine, dot, euclidean or manhattan. Settable."""
        return self._similarity_fn_name

    @similarity_fn_name.setter
    def similarity_fn_name(self, name: str) -> None:
        if name not in SIMILARITIES:
            raise ValueError(f"similarity_fn_name {name!r} is not one of {', '.join(SIMILARITIES)}")
        self._similarity_fn_name = name

    def get_embedding_dimension(self) -> int:
        """Features of a vector that `encode` returns."""
        return self._dimension(self.truncate_dim)

    get_sentence_embedding_dimension = get_embedding_dimension

    def _dimension(self, truncate_dim: int | None) -> int:
        width = len(self.pooling.modes) * self.model.config.hidden_size
        for module in self.modules:
            takes = module.linear.in_features if isinstance(module, Dense) else getattr(module, "num_features", width)
            if takes != width:
                raise ValueError(f"{type(module).__name__} takes {takes} features but gets {width}: see modules.json")
            width = module.linear.out_features if isinstance(module, Dense) else width
        if truncate_dim is not None and truncate_dim < 1:
            raise ValueError(f"truncate_dim must be at least 1, got {truncate_dim}")
        return width if truncate_dim is None else min(width, truncate_dim)

    def _prompt(self, prompt: str | None, prompt_name: str | None) -> str:
        name = prompt_name if prompt_name is not None else self.default_prompt_name
        if prompt is not None or name is None:
            return prompt or ""
        if name not in self.prompts:
            raise ValueError(f"prompt name {name!r} is unknown; the model's prompts are {sorted(self.prompts)}")
        return self.prompts[name]

    def pooled(
        self, batch: PackedBatch, prompt_length: int = 0, keep: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Token states of a batch as `pool` pools them; and themselves, (T, D), None where neither `keep` nor pooling
        needs them."""
        skip = 0 if self.pooling.include_prompt else prompt_length
        if len(self.pooling.modes) == 1 and not skip and not keep:
            return self.model.pool_packed(batch, self.pooling.modes[0], scales_first(self.modules)), None
        hidden_TD = self.model.forward_packed(batch)
        cu_seqlens = batch.cu_seqlens.to(hidden_TD.device, non_blocking=True)
        return self.pool(hidden_TD, cu_seqlens, prompt_length), hidden_TD

    def pool(self, hidden_TD: torch.Tensor, cu_seqlens: torch.Tensor, prompt_length: int = 0) -> torch.Tensor:
        """(T, D), (S + 1) -> (S, len(modes) * D), without the `prompt_length` first tokens where the model leaves
        prompts out; of length 1 where its modules begin with that. `sentence_folder.finished` goes on."""
        pooled_SD = self.pooling(hidden_TD, cu_seqlens, prompt_length)
        return l2_normalize(pooled_SD) if scales_first(self.modules) else pooled_SD

    @torch.inference_mode()
    def _steps(
        self,
        texts: Sequence[Text],
        prompt: str,
        batch_size: int | None,
        token_budget: int | None,
        truncate_dim: int | None,
        unit: bool = False,
        keep: bool = False,
    ) -> Iterator[_Step]:
        """Compute texts batch by batch, part of the list by part, in each the longest texts first; `keep` the hidden
        states, which vectors alone may do without."""
        tokenizer, device = self.tokenizer, self.device
        prompt_length = tokenizer.prompt_length(prompt) if prompt and not self.pooling.include_prompt else 0
        truncate_dim = self.truncate_dim if truncate_dim is None else truncate_dim
        on_cpu = device.type == "cpu"
        if token_budget is None:
            token_budget = TOKENS_PER_THREAD * torch.get_num_threads() if on_cpu else TOKENS_PER_GPU
        for first, encoded in encode_windows(tokenizer, texts, prompt, token_budget, on_cpu):
            for rows in token_batches([len(ids) for ids in encoded.ids], token_budget, batch_size):
                types = None if encoded.type_ids is None else [encoded.type_ids[i] for i in rows]
                batch = pack([encoded.ids[i] for i in rows], types, self.model.position_offset)
                pooled_SD, hidden_TD = self.pooled(batch, prompt_length, keep)
                vectors_SD = finished(self.modules, pooled_SD, truncate_dim, unit)
                num_truncated = sum(encoded.truncated[i] for i in rows)
                yield _Step([first + i for i in rows], batch, hidden_TD, vectors_SD, num_truncated)

    def encode_with_stats(
        self,
        texts: Sequence[Text],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        token_budget: int | None = None,
        show_progress_bar: bool = False,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
    ) -> Embeddings:
        """Vectors of a list of texts, with the number of tokens computed and of texts cut; see `encode`.

        Args:
            batch_size: texts a batch at most; None = no limit but the budget.
            token_budget: tokens a batch at most; None = 2048 a CPU thread, 65536 on a GPU.
        """
        truncate_dim = self.truncate_dim if truncate_dim is None else truncate_dim
        vectors = torch.empty(len(texts), self._dimension(truncate_dim))
        prompt = self._prompt(prompt, prompt_name)
        num_tokens = num_truncated = 0
        collector = Collector(vectors)
        with progress(len(texts), show_progress_bar) as advance:
            for step in self._steps(texts, prompt, batch_size, token_budget, truncate_dim, normalize_embeddings):
                collector.add(step.rows, step.vectors_SD)
                num_tokens += step.batch.num_tokens
                num_truncated += step.num_truncated
                advance(len(step.rows), step.batch.num_tokens)
            collector.finish()
        return Embeddings(vectors, num_tokens, num_truncated)

    def encode(
        self,
        texts: str | Iterable[Text],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        output_value: str | None = "sentence_embedding",
        precision: str = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: torch.device | str | None = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        token_budget: int | None = None,
    ) -> Any:
        """Encode texts as `SentenceTransformer.encode` does.

        Args:
            texts: a str, or an iterable of str and of (str, str) pairs.
            prompt_name: which of `prompts` to put before each text; None = `default_prompt_name`.
            prompt: a prompt of your own; it wins over `prompt_name`.
            batch_size, token_budget: texts and tokens a batch at most; the defaults suit most machines.
            show_progress_bar: a bar on stderr with tokens per second; None = no.
            output_value: `sentence_embedding`; `token_embeddings`: a (length, D) tensor for each text; None: a dict
                of both and `input_ids` for each text. The last two are tensors on the CPU.
            precision: see `fastbert.vectors.quantize_vectors`.
            convert_to_numpy: one array; without it, and without `convert_to_tensor`, a list of vectors.
            convert_to_tensor: one tensor on the embedder's device.
            device: None, or the embedder's own: a call does not move the model.
            normalize_embeddings: scale to length 1, after `truncate_dim` cut the vectors.
            truncate_dim: leading features to return; None = the embedder's.

        Returns:
            (N, D) float32 numpy array; for a single str (D). An empty list gives (0, D).

        Warns:
            UserWarning: once a call, with the number of texts that were cut to `max_seq_length`.

        Raises:
            TypeError: an input that is not a str or a pair of str.
            ValueError: an unknown prompt name, precision or output_value; another device.
        """
        if device is not None:
            asked, own = torch.device(device), self.device
            if asked.type != own.type or asked.index not in (None, own.index):
                raise ValueError(
                    f"device is {device} but the model is on {own}: from_pretrained(..., device={str(device)!r})"
                )
        if isinstance(texts, (bytes, dict)) or not isinstance(texts, Iterable):
            raise TypeError(f"texts must be a str or a list of str, it is a {type(texts).__name__}")
        if output_value not in ("sentence_embedding", "token_embeddings", None):
            raise ValueError(f"output_value {output_value!r} is not 'sentence_embedding', 'token_embeddings' or None")
        single = isinstance(texts, str)
        inputs: list[Text] = [texts] if isinstance(texts, str) else list(texts)
        if output_value != "sentence_embedding":
            if precision != "float32":
                raise ValueError(f"precision {precision!r} goes with output_value='sentence_embedding' only")
            outputs, num_truncated = self._token_outputs(
                inputs, self._prompt(prompt, prompt_name), batch_size, token_budget, truncate_dim
            )
            self._warn_truncated(num_truncated, len(inputs))
            found: Any = outputs if output_value is None else [out[output_value] for out in outputs]
            return found[0] if single else found
        result = self.encode_with_stats(
            inputs, prompt_name, prompt, batch_size, token_budget, bool(show_progress_bar),
            normalize_embeddings, truncate_dim,
        )  # fmt: skip
        self._warn_truncated(result.num_truncated, len(inputs))
        array = quantize_vectors(result.vectors.numpy(), precision)
        vectors: Any = array
        if convert_to_tensor:
            vectors = torch.from_numpy(array).to(self.device)
        elif not convert_to_numpy:
            vectors = list(torch.from_numpy(array))
        return vectors[0] if single else vectors

    def _token_outputs(
        self,
        texts: list[Text],
        prompt: str,
        batch_size: int | None,
        token_budget: int | None,
        truncate_dim: int | None,
    ) -> tuple[list[dict[str, torch.Tensor]], int]:
        outputs: list[dict[str, torch.Tensor]] = [{} for _ in texts]
        num_truncated = 0
        for step in self._steps(texts, prompt, batch_size, token_budget, truncate_dim, keep=True):
            assert step.hidden_TD is not None
            num_truncated += step.num_truncated
            ids, states = step.batch.split(step.batch.input_ids), step.batch.split(step.hidden_TD.float())
            for row, *values in zip(step.rows, ids, states, step.vectors_SD, strict=True):
                names = ("input_ids", "token_embeddings", "sentence_embedding")
                outputs[row] = {n: v.cpu().clone() for n, v in zip(names, values, strict=True)}
        return outputs, num_truncated

    def _warn_truncated(self, num_truncated: int, num_texts: int) -> None:
        if num_truncated:
            limit = position_limit(self.model)
            more = f"; embedder.max_seq_length can be set up to {limit}" if self.max_seq_length < limit else ""
            warnings.warn(
                f"{num_truncated} of {num_texts} texts are longer than max_seq_length={self.max_seq_length} tokens "
                f"and were cut{more}",
                stacklevel=3,
            )

    def encode_query(self, texts: str | Iterable[Text], **options: Any) -> Any:
        """`encode` with the prompt named "query", unless the call names another."""
        if options.get("prompt_name") is None and options.get("prompt") is None:
            options["prompt_name"] = "query"
        return self.encode(texts, **options)

    def encode_document(self, texts: str | Iterable[Text], **options: Any) -> Any:
        """`encode` with the prompt named "document", unless the call names another."""
        if options.get("prompt_name") is None and options.get("prompt") is None:
            options["prompt_name"] = "document"
        return self.encode(texts, **options)

    def similarity(self, a: Vectors, b: Vectors) -> torch.Tensor:
        """(N, D), (M, D) -> (N, M) by `similarity_fn_name`; distances are negative, so that more is more alike."""
        return similarity(self.similarity_fn_name, a, b)

    def similarity_pairwise(self, a: Vectors, b: Vectors) -> torch.Tensor:
        """(N, D), (N, D) -> (N) by `similarity_fn_name`."""
        return similarity_pairwise(self.similarity_fn_name, a, b)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write a folder that this class, sentence-transformers and other servers load.

        Raises:
            ValueError: an int8 or float8 model: it has no float weights to write.
        """
        root = Path(path)
        if any(buffer.dtype.itemsize == 1 for buffer in self.model.buffers()):
            raise ValueError("an int8 or float8 model cannot be saved: load it with dtype='float32' and save that")
        self.model.save_pretrained(root)
        self.tokenizer.save(root)
        content = replace(
            self._folder,
            transformer=root,
            max_seq_length=self.max_seq_length,
            prompts=self.prompts,
            default_prompt_name=self.default_prompt_name,
            similarity_fn_name=self.similarity_fn_name,
            truncate_dim=self.truncate_dim,
        )
        write_folder(root, content, self.model.config.hidden_size)


def position_limit(model: EncoderModel) -> int:
    """Tokens that the model has positions for."""
    return model.config.max_position_embeddings - model.position_offset
