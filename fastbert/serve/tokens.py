"""Texts to token ids beside the event loop: a pool of threads, and several requests in one call of the tokenizer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Protocol

import torch

from fastbert.machine import cpu
from fastbert.serve.cutting import Cutter
from fastbert.serve.errors import BadIds, Invalid, TokenizerError
from fastbert.serve.jobs import Jobs, Row, Work, characters
from fastbert.tokenizer import Text, Tokenizer

Input = str | tuple[str, str] | list[int]

# A short text is tokenised sooner (some 20 us) than a thread is woken.
_AT_ONCE = 256  # characters
_AT_ONCE_TEXTS = 4


class Tokenized(Protocol):
    """What is needed of a model; `fastbert.serve.served.Served` is one."""

    tokenizer: Tokenizer

    @property
    def vocab_size(self) -> int:
        """One more than the greatest token id."""

    @property
    def device(self) -> torch.device:
        """Where the model computes."""

    @property
    def skips_prompt(self) -> bool:
        """Whether vectors leave out the tokens of a prompt."""


@dataclass(slots=True)
class Tokens:
    """Token ids of N inputs.

    Attributes:
        ids: N lists.
        type_ids: N lists of segment ids, or None where no input is a pair.
        truncated: N flags.
        prompt_length: leading tokens of the prompt, where the model leaves them out of vectors; else 0.
    """

    ids: list[list[int]]
    type_ids: list[list[int]] | None
    truncated: list[bool]
    prompt_length: int = 0


class TokenizerPool:
    """Threads that tokenise for one model. `encode` belongs to the event loop; `tokenizers` works without the GIL.

    The parallelism of `tokenizers` itself is switched off in this process (unless `TOKENIZERS_PARALLELISM` is set):
    its threads would take the cores from the model's.

    Args:
        served: the model.
        workers: threads; None = a quarter of the cores where the model computes on them too, else all but one.
    """

    def __init__(self, served: Tokenized, workers: int | None = None) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if workers is None:
            cores = cpu().usable
            workers = max(1, min(16, cores // 4 if served.device.type == "cpu" else cores - 1))
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.workers = workers
        self._served = served
        self._tokenizer = served.tokenizer
        self._cutter = Cutter(self._tokenizer)
        self._jobs = Jobs(workers)
        self._prompt_length = lru_cache(maxsize=256)(self._tokenizer.prompt_length)

    async def encode(
        self,
        inputs: Sequence[Input],
        *,
        truncate: bool = True,
        direction: str = "right",
        prompt: str = "",
        max_length: int | None = None,
    ) -> Tokens:
        """Token ids of texts, of pairs of texts, and token ids as they were sent.

        Args:
            inputs: token ids are used as they are: no special tokens, no prompt.
            truncate: cut what is too long; False = refuse it.
            direction: `right` or `left`: the end that is cut.
            prompt: put before each text, and before the first of a pair.
            max_length: tokens an input, special ones included; None, or more than the model takes = the model's.

        Raises:
            Invalid: an input is too long and `truncate` is False, or `max_length` has no room for special tokens.
            BadIds: a token id that the model does not have.
            TokenizerError: the tokenizer gave up.
        """
        if direction not in ("right", "left"):
            raise Invalid(f"truncation_direction is {direction!r:.40}; it is 'right' or 'left'", "truncation_direction")
        limit = min(max_length or self._tokenizer.max_length, self._tokenizer.max_length)
        rows: list[Row | None] = [None] * len(inputs)
        texts: list[Text] = []
        places: list[int] = []
        for place, given in enumerate(inputs):
            if isinstance(given, list):
                rows[place] = self._ids(given, place, limit, truncate, direction)
            else:
                places.append(place)
                texts.append(prompt + given if isinstance(given, str) else (prompt + given[0], given[1]))
        for place, row in zip(places, await self._rows(texts, limit, truncate, direction), strict=True):
            rows[place] = row
        found = [row for row in rows if row is not None]
        types: list[list[int]] | None = None
        if any(isinstance(given, tuple) for given in inputs):
            types = [[0] * len(ids) if kinds is None else kinds for ids, kinds, _ in found]
        skipped = self._prompt_length(prompt) if prompt and self._served.skips_prompt else 0
        return Tokens([ids for ids, _, _ in found], types, [cut for _, _, cut in found], skipped)

    def close(self) -> None:
        """Stop the threads; what waits is still tokenised."""
        self._jobs.close()

    def _ids(self, ids: list[int], place: int, limit: int, truncate: bool, direction: str) -> Row:
        size = self._served.vocab_size
        if ids and (min(ids) < 0 or max(ids) >= size):
            wrong = next(i for i in ids if not 0 <= i < size)
            raise BadIds(
                f"input {place} has the token id {wrong}, but the model's ids are 0 to {size - 1}: they are probably "
                "of another tokenizer, such as OpenAI's tiktoken. Send text instead; LangChain's OpenAIEmbeddings "
                "does with check_embedding_ctx_length=False"
            )
        if len(ids) > limit and not truncate:
            raise _too_long(limit, str(len(ids)))
        return (ids[:limit] if direction == "right" else ids[-limit:]), None, len(ids) > limit

    async def _rows(self, texts: Sequence[Text], limit: int, truncate: bool, direction: str) -> list[Row]:
        side = self._tokenizer.config.get("truncation_side") or "right"
        work: Work = self._fast
        if not truncate:
            work = partial(self._whole, limit)
        elif limit != self._tokenizer.max_length or direction != side:
            work = partial(self._cut, limit, direction)
        if len(texts) <= _AT_ONCE_TEXTS and sum(map(characters, texts)) <= _AT_ONCE:
            return work(texts)
        return await self._jobs.run(texts, work)

    def _fast(self, texts: Sequence[Text]) -> list[Row]:
        """Cut as the tokenizer is set."""
        try:
            encoded = self._tokenizer.encode(texts)
        except Exception as error:  # tokenizers raises plain Exception
            raise TokenizerError(f"tokenizer error: {error}") from error
        types: Sequence[list[int] | None] = encoded.type_ids or [None] * len(texts)
        return list(zip(encoded.ids, types, encoded.truncated, strict=True))

    def _cut(self, limit: int, direction: str, texts: Sequence[Text]) -> list[Row]:
        """Cut otherwise."""
        try:
            return [self._cutter.encode(text, limit, direction) for text in texts]
        except ValueError as error:
            raise Invalid(str(error)) from error
        except Exception as error:
            raise TokenizerError(f"tokenizer error: {error}") from error

    def _whole(self, limit: int, texts: Sequence[Text]) -> list[Row]:
        """Not cut, or refused."""
        rows = self._fast(texts)
        for text, (ids, _, cut) in zip(texts, rows, strict=True):
            if cut or len(ids) > limit:
                tokens, exact = self._cutter.count(text)
                raise _too_long(limit, str(tokens) if exact else f"more than {tokens}")
        return rows


def _too_long(limit: int, found: str) -> Invalid:
    return Invalid(f"Input validation error: `inputs` must have less than {limit} tokens. Given: {found}", "inputs")
