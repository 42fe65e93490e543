"""Shards: documents as token ids in Arrow files that map into memory, built once by parallel workers.

    FOLDER/manifest.json            fingerprint of texts, tokenizer and settings; counts
    FOLDER/tokens-00000.arrow ...   one row a document: `input_ids`, `sentence_lengths`; `datasets.Dataset.from_file`
    FOLDER/sentences.npy            (sentences + 1) int64: first token of each, over all shards
    FOLDER/documents.npy            (documents + 1) int64: first sentence of each

No special token is in them; what an item of training looks like is decided later (`segments`, `pairs`).
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from fastbert.corpus import CorpusError
from fastbert.tokenizer import Tokenizer
from fastbert.train.documents import Texts
from fastbert.train.shard_writer import Shard, ShardJob, arrow, one_thread, write_shard

SHARD_CHARACTERS = 1 << 24  # text of a shard: some 4 million tokens, 8 MB
MANIFEST, SENTENCES, DOCUMENTS = "manifest.json", "sentences.npy", "documents.npy"
FORMAT = 1


@dataclass(frozen=True)
class Shards:
    """Token ids of documents, mapped into memory.

    Attributes:
        folder: where they lie.
        sentence_starts: (sentences + 1) int64 first token of each sentence; the last entry is the number of tokens.
        document_starts: (documents + 1) int64 first sentence of each document.
        fingerprint: of what they were made from.
    """

    folder: Path
    sentence_starts: np.ndarray
    document_starts: np.ndarray
    fingerprint: str
    _shards: tuple[np.ndarray, ...]
    _firsts: np.ndarray

    @classmethod
    def open(cls, folder: Path) -> Shards:
        """Map finished shards.

        Raises:
            CorpusError: the folder holds none, or of another version.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise CorpusError(f"{folder} holds no finished shards (no {MANIFEST})")
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise CorpusError(f"{folder} has format {manifest['format']}, this version reads {FORMAT}: build it again")
        shards = tuple(_map_tokens(folder / name) for name in manifest["shards"])
        firsts = np.concatenate([[0], np.cumsum([len(tokens) for tokens in shards])])
        starts = [np.load(folder / name, mmap_mode="r") for name in (SENTENCES, DOCUMENTS)]
        return cls(folder, starts[0], starts[1], manifest["fingerprint"], shards, firsts)

    @staticmethod
    def fingerprint_of(folder: Path) -> str | None:
        """What the finished shards in a folder were made from; None where there are none."""
        path = folder / MANIFEST
        return json.loads(path.read_text(encoding="utf-8"))["fingerprint"] if path.is_file() else None

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.sentence_starts[-1])

    @property
    def num_sentences(self) -> int:
        """Sentences of all documents."""
        return len(self.sentence_starts) - 1

    @property
    def num_documents(self) -> int:
        """Documents."""
        return len(self.document_starts) - 1

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Ids of tokens `start` to `stop`, which lie in one document."""
        shard = int(np.searchsorted(self._firsts, start, side="right")) - 1
        first = int(self._firsts[shard])
        return self._shards[shard][start - first : stop - first]

    def unigram_counts(self, num_ids: int) -> np.ndarray:
        """(num_ids) int64: how often each id occurs."""
        return sum((np.bincount(tokens, minlength=num_ids) for tokens in self._shards), np.zeros(num_ids, np.int64))


def shards_fingerprint(texts: Texts, tokenizer: Tokenizer, shard_characters: int = SHARD_CHARACTERS) -> str:
    """What `build_shards` with the same arguments gives its shards."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.no_truncation()  # sentences are not truncated, so `max_length` means nothing here
    described = [texts.fingerprint(), backend.to_str(), shard_characters, FORMAT]
    return hashlib.blake2b(json.dumps(described).encode(), digest_size=16).hexdigest()


def build_shards(
    texts: Texts,
    tokenizer: Tokenizer,
    folder: Path,
    num_workers: int = 1,
    show: bool = False,
    shard_characters: int = SHARD_CHARACTERS,
) -> Shards:
    """Tokenise texts into `folder`, or open what an earlier run made of the same texts there.

    Shards are made in `FOLDER.partial`, which gets its name when all are complete: a killed run leaves nothing that
    looks finished. The number of workers changes nothing in the files.

    Args:
        texts: what to read. Sentences without any token are left out.
        folder: replaced where it holds shards of other texts or of another tokenizer.
        num_workers: processes that tokenise; 1 = this one.
        show: a progress bar on stderr.
        shard_characters: about how much text a shard holds.

    Raises:
        CorpusError: no text at all; a row that holds none; a folder that holds something else.
    """
    fingerprint = shards_fingerprint(texts, tokenizer, shard_characters)
    if Shards.fingerprint_of(folder) == fingerprint:
        return Shards.open(folder)
    if Shards.fingerprint_of(folder) is None and folder.exists() and any(folder.iterdir()):
        raise CorpusError(f"{folder} holds other files: shards get a folder of their own")
    scratch = folder.with_name(folder.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    made = list(_tokenised(texts, tokenizer, scratch, num_workers, show, shard_characters))
    sentences = np.concatenate([np.zeros(1, np.int64), *[counts.sentences for counts in made]]).cumsum()
    documents = np.concatenate([np.zeros(1, np.int64), *[counts.documents for counts in made]]).cumsum()
    if not sentences[-1]:
        raise CorpusError(f"{texts}: {_why_empty(texts)}")
    np.save(scratch / SENTENCES, sentences)
    np.save(scratch / DOCUMENTS, documents)
    manifest = {"format": FORMAT, "fingerprint": fingerprint, "shards": [counts.name for counts in made]}
    (scratch / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(scratch, folder)
    return Shards.open(folder)


def _why_empty(texts: Texts) -> str:
    if texts.part == (0.0, 1.0):
        return "the texts hold no token"
    low, high = texts.part
    return f"no document is in the part from {low:g} to {high:g} of the texts: there are too few for such a share"


def _tokenised(
    texts: Texts, tokenizer: Tokenizer, folder: Path, num_workers: int, show: bool, shard_characters: int
) -> Iterator[Shard]:
    """Read here, tokenise in workers; shards come in the order of the texts."""
    definition = tokenizer.backend.to_str()
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as progress:
        task, num_tokens = progress.add_task("tokenising", total=1.0), 0

        def told(made: Shard, done: float) -> Shard:
            nonlocal num_tokens
            num_tokens += int(made.sentences.sum())
            progress.update(task, completed=done, description=f"{num_tokens:,} tokens")
            return made

        jobs = (
            (ShardJob(str(folder / f"tokens-{i:05d}.arrow"), documents, definition, tokenizer.num_ids), done)
            for i, (documents, done) in enumerate(_chunks(texts, shard_characters))
        )
        if num_workers == 1:
            for job, done in jobs:
                yield told(write_shard(job), done)
            return
        waiting: deque[tuple[Future[Shard], float]] = deque()
        with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), one_thread) as pool:
            for job, done in jobs:
                waiting.append((pool.submit(write_shard, job), done))
                if len(waiting) > 2 * num_workers:  # texts that wait are in memory
                    future, done = waiting.popleft()
                    yield told(future.result(), done)
            for future, done in waiting:
                yield told(future.result(), done)


def _chunks(texts: Texts, shard_characters: int) -> Iterator[tuple[list[list[str]], float]]:
    chunk: list[list[str]] = []
    size, done = 0, 0.0
    for document, done in texts.documents():
        chunk.append(document)
        size += sum(map(len, document))
        if size >= shard_characters:
            yield chunk, done
            chunk, size = [], 0
    if chunk:
        yield chunk, done


def _map_tokens(path: Path) -> np.ndarray:
    """All token ids of a shard, as a view of the file."""
    pyarrow = arrow()
    batch: Any = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_next_batch()
    return batch.column("input_ids").values.to_numpy(zero_copy_only=True)
