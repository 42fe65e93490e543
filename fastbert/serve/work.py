"""What goes into a model's queue, what comes out of it, and the ways in which it can be refused."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

OUTPUTS = ("vectors", "unit", "logits", "sparse", "mask", "tokens")
LANES = ("interactive", "bulk")


@dataclass(slots=True)
class Work:
    """Token ids to compute.

    Attributes:
        ids: N lists of token ids, special tokens included.
        type_ids: N lists of segment ids of the same lengths, or None where all are 0.
        output: what is wanted for each of the N:
            `vectors`: (D) pooled, after the model's modules, otherwise not normalised;
            `unit`: (D) the same, scaled to length 1;
            `tokens`: (length, D) hidden states;
            `logits`: (labels) of a classifier or reranker, (length, labels) of a token classifier;
            `sparse`: (V) weights of the vocabulary's words, as SPLADE makes them;
            `mask`: (masks, V) vocabulary logits at the mask tokens, in their order.
        lane: `interactive`: somebody waits; `bulk`: takes what is left over, and at least a set share of the time.
        deadline: `time.monotonic()` after which the answer is of no use, or None.
        prompt_length: leading tokens of each that belong to a prompt; some models leave them out of `vectors`.
        connection: what it came by, if that carries one piece of work at a time; None = it is not known.
    """

    ids: Sequence[Sequence[int]]
    type_ids: Sequence[Sequence[int]] | None = None
    output: str = "vectors"
    lane: str = "interactive"
    deadline: float | None = None
    prompt_length: int = 0
    connection: asyncio.BaseTransport | None = None

    def __post_init__(self) -> None:
        if self.output not in OUTPUTS:
            raise ValueError(f"output {self.output!r} is not one of {', '.join(OUTPUTS)}")
        if self.lane not in LANES:
            raise ValueError(f"lane {self.lane!r} is not one of {', '.join(LANES)}")
        if len(self.ids) == 0:
            raise ValueError("there is nothing to compute: ids is empty")
        if empty := [i for i, ids in enumerate(self.ids) if len(ids) == 0]:
            raise ValueError(f"ids[{empty[0]}] is empty: an input needs at least one token")
        if self.type_ids is not None and list(map(len, self.type_ids)) != list(map(len, self.ids)):
            raise ValueError("type_ids must have the same lengths as ids, one for each token")


@dataclass(slots=True)
class Done:
    """Computed work.

    Attributes:
        values: N float32 arrays, in the order of the ids. They may be views of a batch's results: copy to keep.
        queue_s: N times from submission to the start of the forward pass.
        compute_s: N times of the forward pass that an input was part of.
        tokens: tokens of all inputs.
    """

    values: list[np.ndarray]
    queue_s: list[float]
    compute_s: list[float]
    tokens: int


class WorkError(Exception):
    """Work that has no result."""


class Overloaded(WorkError):
    """The queue has no room; `retry_after_s` is when it is expected to have some."""

    def __init__(self, retry_after_s: float, tokens: int, queue_tokens: int, max_queue_tokens: int) -> None:
        super().__init__(
            f"{tokens} tokens do not fit into the queue: {queue_tokens} of {max_queue_tokens} tokens are waiting"
        )
        self.retry_after_s = retry_after_s


class DeadlineExceeded(WorkError):
    """The deadline passed before the result was there; what was not begun is not computed."""


class Draining(WorkError):
    """The server is shutting down and accepts nothing more, or had to give up before this was done."""


class NonFinite(WorkError):
    """NaN or infinities came out for some inputs; `rows` are their places in the work."""

    def __init__(self, rows: Sequence[int]) -> None:
        super().__init__(f"the model computed NaN or infinity for input {', '.join(map(str, rows))}")
        self.rows = list(rows)


class ComputeFailed(WorkError):
    """The forward pass failed; the cause is chained."""
