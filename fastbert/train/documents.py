"""Texts for pretraining: files, folders and Hugging Face datasets to documents, each a list of sentences."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbert.corpus import READERS, CorpusError, open_corpus
from fastbert.train.sentences import split_sentences

HUB = "hub:"
_PARAGRAPHS = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class Texts:
    """Where texts come from, and how they become documents of sentences.

    In a `.txt` file a line is a sentence and a blank line ends a document (BERT's format). Elsewhere a row of `column`
    is a document, its lines are sentences. With `split`, texts are prose: lines are joined, a blank line ends a
    paragraph (two end a document in a `.txt` file), and `split_sentences` finds the sentences in it.

    Args:
        sources: paths of `.txt`, `.jsonl`, `.csv` or `.parquet` files; folders of them; folders that
            `Dataset.save_to_disk` wrote; `hub:NAME`, `hub:NAME:SPLIT` or `hub:NAME:CONFIG:SPLIT` for a data set of a
            hub; or `datasets.Dataset` objects.
        column: the column or key that holds the text.
        split: look for sentences in the text.
        part: only documents whose hash, as a share, lies in this range. (0.01, 1) and (0, 0.01) divide them: equal
            documents fall on the same side, whatever their order and number.

    Raises:
        CorpusError: no source, a path that does not exist, a folder without any file that can be read.
    """

    sources: tuple[Any, ...]
    column: str = "text"
    split: bool = False
    part: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        given = (self.sources,) if isinstance(self.sources, (str, os.PathLike)) else tuple(self.sources)
        found = [part for source in given for part in _expand(source)]
        if not found:
            raise CorpusError("no texts: give files, folders or data sets to read them from")
        object.__setattr__(self, "sources", tuple(found))

    def __str__(self) -> str:
        """The sources, as errors name them."""
        return ", ".join(map(str, self.sources))[:200]

    def fingerprint(self) -> str:
        """A hash that changes with the sources (path, size and time of files) and with how they are read."""
        parts = [_identity(source) for source in self.sources]
        return hashlib.blake2b(
            json.dumps([parts, self.column, self.split, self.part]).encode(), digest_size=16
        ).hexdigest()

    def __iter__(self) -> Iterator[str]:
        """Sentences."""
        for document, _ in self.documents():
            yield from document

    def documents(self) -> Iterator[tuple[list[str], float]]:
        """Documents, each with the share of the sources that has been read (0 to 1).

        Raises:
            CorpusError: a row that holds no text, with its file and line; a column that is missing.
        """
        for i, source in enumerate(self.sources):
            for document, done in self._read(source):
                if document and self._is_mine(document):
                    yield document, (i + done) / len(self.sources)

    @property
    def nbytes(self) -> int:
        """Size of the files, and of data sets with all their columns."""
        return sum(s.stat().st_size if isinstance(s, Path) else int(s.data.nbytes) for s in self.sources)

    def _is_mine(self, document: list[str]) -> bool:
        low, high = self.part
        if (low, high) == (0.0, 1.0):
            return True
        digest = hashlib.blake2b("\n".join(document).encode(), digest_size=8).digest()
        return low <= int.from_bytes(digest, "little") / 2**64 < high

    def _read(self, source: Any) -> Iterator[tuple[list[str], float]]:
        if not isinstance(source, Path):
            for row, text in enumerate(_rows(source, self.column), 1):
                yield self._of_row(text), row / len(source)
            return
        corpus = open_corpus(source, self.column)
        if source.suffix.lower() == ".txt":
            documents = _prose(corpus.texts) if self.split else _lines(corpus.texts)
        else:
            documents = (self._of_row(text) for text in corpus.texts)
        for document in documents:
            yield document, corpus.fraction_read() or 0.0

    def _of_row(self, text: str) -> list[str]:
        text = _encodable(text)
        if not self.split:
            return [line.strip() for line in text.split("\n") if line.strip()]
        paragraphs = (" ".join(part.split()) for part in _PARAGRAPHS.split(text))
        return [sentence for paragraph in paragraphs for sentence in split_sentences(paragraph)]


def _lines(lines: Iterator[str]) -> Iterator[list[str]]:
    document: list[str] = []
    for line in lines:
        if line.strip():
            document.append(line.strip())
        elif document:
            yield document
            document = []
    yield document


def _prose(lines: Iterator[str]) -> Iterator[list[str]]:
    document: list[str] = []
    paragraph: list[str] = []
    blank = 0
    for line in lines:
        if line.strip():
            paragraph.append(line.strip())
            blank = 0
            continue
        blank += 1
        if paragraph:
            document += split_sentences(" ".join(paragraph))
            paragraph = []
        if blank == 2 and document:
            yield document
            document = []
    yield document + split_sentences(" ".join(paragraph))


def _encodable(text: str) -> str:
    """Without lone surrogates, which no UTF-8 text holds: they are read as U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _expand(source: Any) -> Sequence[Any]:
    """Files of a folder, a data set of a name or a folder."""
    if not isinstance(source, (str, os.PathLike)):
        return [_dataset(source, type(source).__name__)]
    if str(source).startswith(HUB):
        return [_from_hub(str(source))]
    path = Path(source)
    if not path.exists():
        raise CorpusError(f"{path} does not exist: give files, folders, or hub:NAME for a data set of a hub")
    if not path.is_dir():
        return [path]
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return [_dataset(_datasets().load_from_disk(str(path)), str(path))]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in READERS and file.is_file())
    if not files:
        raise CorpusError(f"the folder {path} holds no file that ends in {', '.join(READERS)}")
    return files


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Hugging Face data sets need datasets: pip install 'fastbert-engine[train]'") from error
    return datasets


def _from_hub(source: str) -> Any:
    name, *rest = source.removeprefix(HUB).split(":")
    config, split = (rest[0] if len(rest) == 2 else None), (rest[-1] if rest else "train")
    if not name or len(rest) > 2:
        raise CorpusError(f"{source!r} names no data set: write hub:NAME, hub:NAME:SPLIT or hub:NAME:CONFIG:SPLIT")
    return _dataset(_datasets().load_dataset(name, config, split=split), source)


def _dataset(dataset: Any, name: str) -> Any:
    if isinstance(dataset, dict):
        if len(dataset) > 1 and "train" not in dataset:
            raise CorpusError(f"{name} has the splits {', '.join(dataset)} and no train: pass one of them")
        dataset = dataset.get("train", next(iter(dataset.values())))
    if not hasattr(dataset, "column_names") or not hasattr(dataset, "__len__"):
        raise CorpusError(f"{name} is no source of texts: give paths, or data sets with rows and columns")
    return dataset


def _rows(dataset: Any, column: str) -> Iterator[str]:
    if column not in dataset.column_names:
        found = ", ".join(map(repr, dataset.column_names))
        raise CorpusError(f"the data set has no column {column!r}, it has {found}: choose with --column")
    row = 0
    for batch in dataset.select_columns([column]).iter(batch_size=1000):
        for text in batch[column]:
            row += 1
            if not isinstance(text, str):
                kind = "null" if text is None else type(text).__name__
                raise CorpusError(f"the data set, row {row}: column {column!r} holds {kind}, a text is needed")
            yield text


def _identity(source: Any) -> list[Any]:
    if isinstance(source, Path):
        status = source.stat()
        return [str(source.resolve()), status.st_size, status.st_mtime_ns]
    return [source._fingerprint]  # of a `datasets.Dataset`: its files and every change since
