"""One shard: documents to token ids in an Arrow file. Worker processes import this file and nothing heavier."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers


@dataclass(frozen=True)
class ShardJob:
    """A shard to make: its file, its text, `tokenizer.json`'s content, ids there are."""

    path: str
    documents: list[list[str]]
    tokenizer: str
    num_ids: int


@dataclass(frozen=True)
class Shard:
    """A finished shard: tokens of each sentence, sentences of each document."""

    name: str
    sentences: np.ndarray
    documents: np.ndarray


def one_thread() -> None:
    """Let this process tokenise with one thread: there is one worker a core."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def write_shard(job: ShardJob) -> Shard:
    """Tokenise and write; sentences and documents without any token are left out."""
    pyarrow, documents = arrow(), job.documents
    backend = tokenizers.Tokenizer.from_str(job.tokenizer)
    backend.no_truncation()
    sentences = [sentence for document in documents for sentence in document]
    ids = [encoding.ids for encoding in backend.encode_batch_fast(sentences, add_special_tokens=False)]
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    owner = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    kept = lengths > 0
    per_document = np.bincount(owner[kept], minlength=len(documents))
    counts = per_document[per_document > 0]
    lengths = lengths[kept]
    flat = np.concatenate([np.empty(0, np.int64), *[np.asarray(part) for part in ids if part]])
    flat = flat.astype(np.uint16 if job.num_ids <= 1 << 16 else np.int32)
    bounds = np.concatenate([[0], counts.cumsum()])
    token_bounds = np.concatenate([[0], lengths.cumsum()])[bounds]
    columns = {
        "input_ids": pyarrow.LargeListArray.from_arrays(token_bounds, pyarrow.array(flat)),
        "sentence_lengths": pyarrow.LargeListArray.from_arrays(bounds, pyarrow.array(lengths.astype(np.int32))),
    }
    batch = pyarrow.record_batch(columns)
    with pyarrow.OSFile(job.path, "wb") as file, pyarrow.ipc.new_stream(file, batch.schema) as writer:
        writer.write_batch(batch)
    return Shard(Path(job.path).name, lengths, counts)


def arrow() -> Any:
    """The module `pyarrow`.

    Raises:
        ImportError: it is not installed; the message says how to.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError("shards are Arrow files and need pyarrow: pip install 'fastbert-engine[train]'") from error
    return pyarrow
