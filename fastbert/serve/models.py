"""Models at work: loaded, tokenised for by threads, computed by a batcher."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fastbert.serve.batcher import Batcher
from fastbert.serve.cache import Cache, CachedBatcher
from fastbert.serve.encodings import Encodings
from fastbert.serve.errors import Invalid
from fastbert.serve.served import Served
from fastbert.serve.settings import Settings
from fastbert.serve.tokens import TokenizerPool


class Model:
    """A model at work.

    Attributes:
        name: in answers and in the `model` field.
        id: what was asked to be served: a folder or a hub id.
        served: the model proper.
        batcher: its queue.
        submit: computes work: the batcher's, or a cache's in front of it.
        tokens: its tokeniser threads.
        encodings: its tokeniser for the routes that answer with tokens.
    """

    def __init__(self, name: str, id: str, served: Served, settings: Settings, cache: Cache | None = None) -> None:
        self.name, self.id, self.served = name, id, served
        self.batcher = Batcher(
            served,
            max_batch_tokens=settings.max_batch_tokens,
            max_batch_sequences=settings.max_batch_requests,
            max_queue_tokens=settings.max_queue_tokens,
            target_p99_ms=settings.target_p99_ms,
        )
        cached = None if cache is None else CachedBatcher(self.batcher, served.fingerprint, cache)
        self.submit = self.batcher.submit if cached is None else cached.submit
        self.tokens = TokenizerPool(served, settings.tokenization_workers)
        self.encodings = Encodings(served.tokenizer)
        self._default_prompt = settings.default_prompt
        self._default_prompt_name = settings.default_prompt_name or served.default_prompt_name
        self.prompt(None)  # a wrong default is said now, not with the first request

    def prompt(self, name: str | None) -> str:
        """Words before a text: of a prompt's name, or the server's default.

        Raises:
            Invalid: the model has no prompt of this name.
        """
        if name is None and self._default_prompt is not None:
            return self._default_prompt
        name = name if name is not None else self._default_prompt_name
        if name is None:
            return ""
        prompts = self.served.prompts
        if name not in prompts:
            given = f"Input validation error: `default-prompt-name` is set to `{name}` but "
            if not prompts:
                raise Invalid(f"{given}no prompts were found in the Sentence Transformers configuration", "prompt_name")
            raise Invalid(
                f"{given}it was not found in the Sentence Transformers prompts. Available prompts: {list(prompts)}",
                "prompt_name",
            )
        return prompts[name]

    @property
    def padding_saved(self) -> float | None:
        """Share of the tokens that padded batches would have had beyond ours; None before the first batch."""
        counters = self.batcher.counters
        return 1 - counters.tokens / counters.padded_tokens if counters.padded_tokens else None

    async def start(self, warmup: bool) -> None:
        """Compute the shapes that will come."""
        if warmup:
            await self.batcher.warm_up()

    async def close(self, timeout_s: float) -> bool:
        """Finish what was accepted; whether that was possible in time."""
        finished = await self.batcher.drain(timeout_s)
        await asyncio.to_thread(self.tokens.close)
        return finished


def load(name: str, id: str, folder: Path, settings: Settings, cache: Cache | None = None) -> Model:
    """A model of a folder, by these settings."""
    served = Served.load(
        folder,
        dtype=settings.dtype,
        device=settings.device,
        num_threads=settings.threads,
        max_seq_length=settings.max_seq_length,
        pooling=settings.pooling,
        dense_path=settings.dense_path,
        keep_weights=settings.keep_weights,
    )
    return Model(name, id, served, settings, cache)
