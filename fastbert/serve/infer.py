"""From inputs to computed rows: limits, tokens, the batcher, and what each step took. Every route goes through here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from fastbert.serve.call import Call
from fastbert.serve.errors import (
    BackendError,
    EmptyInput,
    Invalid,
    NonFiniteOutput,
    NotReady,
    Overload,
    ServeError,
    TooLate,
    TooManyInputs,
    WrongModel,
)
from fastbert.serve.models import Model
from fastbert.serve.work import ComputeFailed, DeadlineExceeded, Done, Draining, NonFinite, Overloaded, Work

Input = str | list[int] | tuple[str, str]

_PROMPTED = ("embedding", "splade")
_MOST_NUMBERS = 2**24  # of an answer with an array for each token or mask: 64 MB, in JSON thrice that


def counted(call: Call, batch: bool) -> None:
    """Count a request in TEI's series, whatever becomes of it."""
    call.server.series.request_count.add(1, _method(batch))


class tokenizing:
    """What is wrong with an input counts as `tokenization`, as in TEI, which finds it there."""

    def __enter__(self) -> None:
        """Nothing is wrong yet."""

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Mark the error."""
        if isinstance(error, ServeError):
            error.failure = "tokenization"


def need(model: Model, kinds: Sequence[str], message: str) -> None:
    """Raise WrongModel unless the model is of one of the kinds."""
    if model.served.kind not in kinds:
        raise WrongModel(f"Backend error: {message}", "model")


def check_count(call: Call, count: int, name: str = "inputs") -> None:
    """Raise EmptyInput or TooManyInputs for a number of inputs that no request may have."""
    if count == 0:
        raise EmptyInput(f"`{name}` cannot be empty", name)
    limit = call.server.settings.max_client_batch_size
    if count > limit:
        raise TooManyInputs(f"batch size {count} > maximum allowed batch size {limit}", name)


def check_texts(call: Call, inputs: str | list[str]) -> list[str]:
    """A text or texts as a list, not too many and none of them empty."""
    texts = [inputs] if isinstance(inputs, str) else inputs
    check_count(call, len(texts))
    with tokenizing():
        if not all(texts):
            raise EmptyInput("Input validation error: `inputs` cannot be empty", "inputs")
    return texts


def as_list(inputs: str | Sequence[int | str | list[int]]) -> tuple[list[Input], bool]:
    """The inputs of a request as a list, and whether they came as a batch."""
    if isinstance(inputs, str):
        return [inputs], False
    if not inputs or isinstance(inputs[0], int):
        return [list(inputs)], False  # type: ignore[arg-type]
    return list(inputs), True  # type: ignore[arg-type]


async def compute(
    call: Call,
    model: Model,
    inputs: Sequence[Input],
    output: str,
    *,
    batch: bool,
    truncate: bool | None = None,
    direction: str = "Right",
    prompt_name: str | None = None,
) -> list[np.ndarray]:
    """One float32 array an input: tokenise, wait in the queue, compute; see `fastbert.serve.work.Work` for `output`.

    Args:
        inputs: texts, pairs of texts, or token ids that are used as they are.
        batch: whether the client sent a list; a label of the series.
        truncate: cut what is too long; None = as the server is set.
        direction: `Right` or `Left`: the end that is cut.
        prompt_name: of the model's prompts; None = the server's default.

    Raises:
        ServeError: empty, too long or unknown inputs; overload, a passed deadline, a failed computation.
    """
    begin(call, model, len(inputs))
    call.characters = sum(len(i[0]) + len(i[1]) if isinstance(i, tuple) else len(i) for i in inputs)
    settings = call.server.settings
    started = time.perf_counter()
    with tokenizing():
        if not all(any(i) if isinstance(i, tuple) else i for i in inputs):
            raise EmptyInput("Input validation error: `inputs` cannot be empty", "inputs")
        encoded = await model.tokens.encode(
            inputs,
            truncate=settings.auto_truncate if truncate is None else truncate,
            direction=direction.lower(),
            prompt=model.prompt(prompt_name) if model.served.kind in _PROMPTED else "",
        )
    call.stages["tokenize"] = time.perf_counter() - started
    call.num_truncated = sum(encoded.truncated)
    return await submit(call, model, encoded.ids, output, batch, encoded.type_ids, encoded.prompt_length)


def begin(call: Call, model: Model, count: int) -> None:
    """Check the number of a request's inputs, and count them in TEI's series."""
    check_count(call, count)
    call.server.series.inputs[_kind(model)][0].add(count)


def _method(batch: bool) -> str:
    return "batch" if batch else "single"


def _kind(model: Model) -> str:
    return "embed" if model.served.kind in _PROMPTED else "predict"


async def submit(
    call: Call,
    model: Model,
    ids: Sequence[Sequence[int]],
    output: str,
    batch: bool,
    type_ids: Sequence[Sequence[int]] | None = None,
    prompt_length: int = 0,
) -> list[np.ndarray]:
    """One float32 array for each list of token ids; see `compute`, which is this with the tokens still to be made.

    Raises:
        Invalid: an array for each token or mask would be more numbers than an answer may have.
    """
    _check_size(model, ids, output)
    work = Work(ids, type_ids, output, call.lane(), call.deadline(), prompt_length, call.connection)
    done = await _computed(model, work)
    call.tokens += done.tokens
    call.stages["queue"] = sum(done.queue_s) / len(ids)
    call.stages["compute"] = sum(done.compute_s) / len(ids)
    series, lengths, total = call.server.series, [len(row) for row in ids], time.perf_counter() - call.started
    series.truncated.add(call.num_truncated)
    tokenize = call.stages.get("tokenize", 0.0)
    series.answered(_kind(model), _method(batch), total, lengths, tokenize, done.queue_s, done.compute_s)
    return done.values


def _check_size(model: Model, ids: Sequence[Sequence[int]], output: str) -> None:
    config, mask = model.served.base.config, model.served.mask_id
    if output == "tokens":
        numbers = config.hidden_size * sum(map(len, ids))
    elif output == "mask":
        numbers = config.vocab_size * sum(token == mask for row in ids for token in row)
    else:
        return
    if numbers > _MOST_NUMBERS:
        raise Invalid(
            f"Input validation error: the answer would have {numbers} numbers, more than {_MOST_NUMBERS}: "
            "send fewer inputs",
            "inputs",
        )


async def _computed(model: Model, work: Work) -> Done:
    """What was computed; errors in the words of the wire."""
    try:
        return await model.submit(work)
    except Overloaded as error:
        seconds = str(max(1, math.ceil(error.retry_after_s)))
        raise Overload("Model is overloaded", headers={"retry-after": seconds}) from error
    except DeadlineExceeded as error:
        raise TooLate("the deadline passed before the answer was computed") from error
    except NonFinite as error:
        what = "score is NaN" if work.output == "logits" else "the model's output has NaN or infinite values"
        raise NonFiniteOutput(what) from error
    except Draining as error:
        raise NotReady("the server is shutting down", headers={"retry-after": "1"}) from error
    except ComputeFailed as error:
        raise BackendError(f"Backend error: {error}") from error


def timed(call: Call, write: Callable[[], bytes]) -> bytes:
    """Bytes of an answer, their making counted as the stage `serialize`."""
    started = time.perf_counter()
    content = write()
    call.stages["serialize"] = time.perf_counter() - started
    return content
