"""Texts out of files and vectors into files, a chunk at a time: neither side is ever in memory whole.

An output grows as finished parts in a folder beside it and gets its own name only when it is complete, so that a run
that is killed at any moment can be continued. This file knows nothing of models.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import os
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np


class CorpusError(ValueError):
    """An input or output file that cannot be used as asked; the message says where and what to do."""


@dataclass
class Corpus:
    """Texts in their order, readable once.

    Attributes:
        name: what error messages call it.
        texts: yields the texts one by one and raises `CorpusError` at the first row that is no text.
        file: what is read from, or None where its size is unknown.
    """

    name: str
    texts: Iterator[str]
    file: IO[bytes] | None = None

    def chunks(self, num_rows: int) -> Iterator[list[str]]:
        """Lists of `num_rows` texts, the last one shorter. Only one of them is in memory."""
        while chunk := list(islice(self.texts, num_rows)):
            yield chunk

    def fraction_read(self) -> float | None:
        """How much of the input has been read, 0 to 1; None where its size is unknown (a pipe)."""
        return None if self.file is None else self.file.tell() / max(os.fstat(self.file.fileno()).st_size, 1)


def open_corpus(path: Path | None, column: str = "text") -> Corpus:
    """The texts of a file; None is standard input, one text a line.

    Args:
        path: `.txt` (one text a line, blank lines are empty texts), `.jsonl` (one object a line, blank lines are
            skipped), `.csv` (with a header) or `.parquet`. All of them UTF-8, with or without a byte order mark.
        column: the column or key that holds the text; a `.txt` file has none.

    Raises:
        CorpusError: no such file or an unknown suffix; and, while reading, bytes that are not UTF-8, a row that cannot
            be parsed or an absent, null or non-string text, with its line or row counted from 1.
    """
    if path is None:
        return Corpus("standard input", _read_txt(sys.stdin.buffer, "standard input", ""))
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise CorpusError(f"{path} ends in {path.suffix!r}: texts are read from {', '.join(READERS)}")
    try:
        file = path.open("rb")
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror}") from error
    return Corpus(str(path), read(file, str(path), column), file if path.is_file() else None)


def _lines(file: Iterable[bytes], name: str) -> Iterator[str]:
    """Decoded lines with their ends. Only a line feed ends one: `str.splitlines` would cut at U+2028 and others."""
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
            if not line:
                continue
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"{name}, line {number}: byte 0x{line[error.start]:02x} at position {error.start + 1} is not UTF-8. "
                "Convert the file first, for example with `iconv -f ENCODING -t UTF-8`"
            ) from error


def _no_column(where: str, column: str, columns: Iterable[str]) -> CorpusError:
    found = ", ".join(map(repr, columns))
    return CorpusError(f"{where} has no column {column!r}, it has {found}: choose with --column")


def _text(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise CorpusError(f"{where}: column {column!r} holds {kind}, a text is needed: drop or fill such rows first")
    return value


def _read_txt(file: IO[bytes], name: str, column: str) -> Iterator[str]:
    for line in _lines(file, name):
        yield line.removesuffix("\n").removesuffix("\r")


def _read_jsonl(file: IO[bytes], name: str, column: str) -> Iterator[str]:
    for number, line in enumerate(_lines(file, name), 1):
        if line.isspace():
            continue
        where = f"{name}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CorpusError(f"{where} is not JSON: {error.msg} at position {error.pos + 1}") from error
        except RecursionError as error:
            raise CorpusError(f"{where} is nested too deeply") from error
        if not isinstance(row, dict):
            raise CorpusError(f'{where} holds {type(row).__name__}, an object such as {{"{column}": "..."}} is needed')
        if column not in row:
            raise _no_column(where, column, row)
        yield _text(row[column], where, column)


def _read_csv(file: IO[bytes], name: str, column: str) -> Iterator[str]:
    csv.field_size_limit(2**31 - 1)  # the default refuses texts over 128 KB
    reader = csv.reader(_lines(file, name), strict=True)
    header: list[str] = []
    try:
        for row in reader:
            if not header:
                header = row
                if header and column not in header:
                    raise _no_column(name, column, header)
            elif row and len(row) != len(header):
                raise CorpusError(
                    f"{name}, line {reader.line_num}: {len(row)} fields but the header has {len(header)}; "
                    "a field with a comma in it needs quotes"
                )
            elif row:
                yield row[header.index(column)]
    except csv.Error as error:
        raise CorpusError(f"{name}, line {reader.line_num}: {error}") from error


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise CorpusError("parquet files need pyarrow: pip install pyarrow") from error
    return pyarrow, pyarrow.parquet


def _read_parquet(file: IO[bytes], name: str, column: str) -> Iterator[str]:
    pyarrow, parquet = _arrow()
    try:
        # Without a buffer, and with pyarrow's own read-ahead, a whole row group would be in memory.
        source = parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
    except pyarrow.ArrowInvalid as error:
        raise CorpusError(f"{name} is not a parquet file: {error}") from error
    if column not in source.schema_arrow.names:
        raise _no_column(name, column, source.schema_arrow.names)
    row = 0
    for batch in source.iter_batches(batch_size=1024, columns=[column]):
        for value in batch.column(column).to_pylist():
            row += 1
            yield _text(value, f"{name}, row {row}", column)


READERS: dict[str, Callable[[IO[bytes], str, str], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


@dataclass(frozen=True)
class Part:
    """Consecutive rows of an output: vectors (N, D) float32, their texts or None, and what it took."""

    vectors: np.ndarray
    texts: list[str] | None
    num_tokens: int
    num_truncated: int


def jsonl_rows(first_row: int, part: Part, with_text: bool = True) -> bytes:
    """One JSON object a row: `index`, `text` where kept, `embedding` (9 digits, which is exact for float32)."""
    numbers = "[" + ",".join(["%.9g"] * part.vectors.shape[1]) + "]"
    rows = []
    for i, vector in enumerate(part.vectors.tolist()):
        text = (
            "" if part.texts is None or not with_text else f'"text": {json.dumps(part.texts[i], ensure_ascii=False)}, '
        )
        rows.append(f'{{"index": {first_row + i}, {text}"embedding": {numbers % tuple(vector)}}}\n')
    return "".join(rows).encode("utf-8", "backslashreplace")  # a lone surrogate becomes its JSON escape


def _write_npy(file: IO[bytes], parts: Iterator[Part], num_rows: int) -> None:
    for i, part in enumerate(parts):
        if i == 0:
            header = {"descr": "<f4", "fortran_order": False, "shape": (num_rows, part.vectors.shape[1])}
            np.lib.format.write_array_header_1_0(file, header)
        file.write(part.vectors.astype("<f4").tobytes())


def _write_jsonl(file: IO[bytes], parts: Iterator[Part], num_rows: int) -> None:
    first_row = 0
    for part in parts:
        file.write(jsonl_rows(first_row, part))
        first_row += len(part.vectors)


def _write_parquet(file: IO[bytes], parts: Iterator[Part], num_rows: int) -> None:
    arrow, parquet = _arrow()
    first_row, writer = 0, None
    for part in parts:
        N, D = part.vectors.shape
        values = arrow.array(part.vectors.reshape(-1), arrow.float32())
        columns = {"index": arrow.array(range(first_row, first_row + N), arrow.int64())}
        if part.texts is not None:
            # Arrow's strings are UTF-8: a lone surrogate becomes U+FFFD.
            valid = [t.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for t in part.texts]
            columns["text"] = arrow.array(valid, arrow.string())
        columns["embedding"] = arrow.FixedSizeListArray.from_arrays(values, D)
        table = arrow.table(columns)
        writer = writer or parquet.ParquetWriter(file, table.schema)
        writer.write_table(table)
        first_row += N
    if writer:
        writer.close()


WRITERS: dict[str, Callable[[IO[bytes], Iterator[Part], int], None]] = {
    ".npy": _write_npy,
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
}


class VectorFile:
    """An output in the making: numbered parts in `PATH.partial/`, assembled into PATH at the end.

    Each part holds the SHA-256 of its texts, so that a resumed run never mixes two inputs; a later row may have been
    repaired in between.
    `manifest.json` in that folder holds the settings. It is renamed to `finished.json` once the assembled file is
    whole, and that goes last when the folder is cleared: whenever a run dies, the next one sees which step is next.
    The order of calls is `begin`, then for each part `part` and, where that gives None, `add`, then `finish`.
    """

    def __init__(self, path: Path, *, resume: bool = False, overwrite: bool = False, with_text: bool = True) -> None:
        """Check that PATH may be written; nothing is changed yet.

        Args:
            path: `.npy` (N, D) float32; `.jsonl` or `.parquet` with `index`, `text` and `embedding`.
            resume: continue with the parts that are there.
            overwrite: replace PATH, and without `resume` the parts too.
            with_text: keep the texts beside the vectors (`.npy` has no place for them).

        Raises:
            CorpusError: an unknown suffix, no such folder, or PATH or its parts exist.
        """
        self.path, self.folder = path, path.with_name(path.name + ".partial")
        self.suffix = path.suffix.lower()
        if self.suffix not in WRITERS:
            raise CorpusError(f"{path} ends in {path.suffix!r}: vectors are written to {', '.join(WRITERS)}")
        if not path.parent.is_dir():
            raise CorpusError(f"cannot write {path}: the folder {path.parent} does not exist")
        if self.suffix == ".parquet":
            _arrow()
        self.with_text = with_text and self.suffix != ".npy"
        self.num_rows = 0
        self._manifest, self._finished = self.folder / "manifest.json", self.folder / "finished.json"
        self._assembled = self.folder / "assembled"
        unfinished = self._manifest.exists() or self._finished.exists()
        self._resumed = self._begun = unfinished and resume
        if not unfinished and self.folder.exists() and any(f.name != "writing" for f in self.folder.iterdir()):
            raise CorpusError(f"{self.folder} is needed for unfinished parts but holds other files: move it away")
        if unfinished and not (resume or overwrite):
            raise CorpusError(f"{self.folder} holds an unfinished run: --resume continues it, --overwrite begins again")
        if path.is_dir() or (path.exists() and not overwrite and not (resume and self._finished.exists())):
            raise CorpusError(f"{path} exists already: choose another name, or --overwrite to replace it")

    def begin(self, settings: Mapping[str, Any]) -> bool:
        """Compare the settings with those of the run that is resumed.

        Args:
            settings: JSON values that decide what the rows are.

        Returns:
            True where that run had only its last renaming left: it is done now, and PATH is complete.

        Raises:
            CorpusError: they differ; the message has both sides.
        """
        self._settings = json.loads(json.dumps({**settings, "with_text": self.with_text}))
        if not self._resumed:
            return False
        finished = self._finished.exists()
        before = json.loads((self._finished if finished else self._manifest).read_text(encoding="utf-8"))
        keys = [k for k in {**before, **self._settings} if before.get(k) != self._settings.get(k)]
        if keys:
            lines = [f"  {k}: {before.get(k)!r} then, {self._settings.get(k)!r} now" for k in keys]
            raise CorpusError(
                f"{self.folder} was begun with other settings:\n" + "\n".join(lines) + "\n"
                "Use those to --resume, or --overwrite without --resume to begin again"
            )
        if finished:
            self._publish()
        return finished

    def part(self, index: int, texts: list[str]) -> Part | None:
        """The finished part of these texts, counted into the totals; None where it is still to be computed.

        Raises:
            CorpusError: it was computed from other texts, or its file is damaged.
        """
        if not self._resumed or not self._part_path(index).exists():
            return None
        part, digest = self._load(index)
        if digest != _digest(texts):
            raise CorpusError(
                f"{self._part_path(index)} was computed from other texts than the input's rows {self.num_rows + 1} to "
                f"{self.num_rows + len(texts)}: --resume needs the same input, --overwrite begins again"
            )
        self.num_rows += len(texts)
        return part

    def add(self, index: int, texts: list[str], part: Part) -> None:
        """Store a computed part; it is on the disk whole, or not there."""
        if not self._begun:
            self._clear()
            self.folder.mkdir(exist_ok=True)
            self._write_whole(self._manifest, lambda file: file.write(json.dumps(self._settings, indent=2).encode()))
            self._begun = True
        arrays: dict[str, Any] = {
            "vectors": part.vectors,
            "counts": np.array([part.num_tokens, part.num_truncated]),
            "digest": np.array(_digest(texts)),
            "texts": np.frombuffer(json.dumps(texts if self.with_text else None).encode(), np.uint8),
        }
        self._write_whole(self._part_path(index), lambda file: np.savez(file, **arrays))
        self.num_rows += len(texts)

    def finish(self, num_parts: int) -> None:
        """Assemble parts 0 to num_parts - 1 into PATH and remove their folder.

        Raises:
            CorpusError: there are more parts than that: the input was longer when they were computed.
        """
        if self._part_path(num_parts).exists():
            raise CorpusError(
                f"{self.folder} has more than the {num_parts} parts of this input: --resume needs the same input, "
                "--overwrite begins again"
            )
        parts = (self._load(i)[0] for i in range(num_parts))
        self._write_whole(self._assembled, lambda file: WRITERS[self.suffix](file, parts, self.num_rows))
        os.replace(self._manifest, self._finished)
        self._publish()

    def _publish(self) -> None:
        if self._assembled.exists():
            os.replace(self._assembled, self.path)
        self._clear()

    def _clear(self) -> None:
        if self.folder.is_dir():
            for file in sorted(self.folder.iterdir(), key=lambda f: f in (self._manifest, self._finished)):
                file.unlink()
            self.folder.rmdir()

    def _part_path(self, index: int) -> Path:
        return self.folder / f"part-{index:06d}.npz"

    def _load(self, index: int) -> tuple[Part, str]:
        try:
            with np.load(self._part_path(index), allow_pickle=False) as arrays:
                num_tokens, num_truncated = arrays["counts"].tolist()
                texts = json.loads(arrays["texts"].tobytes())
                return Part(arrays["vectors"], texts, num_tokens, num_truncated), str(arrays["digest"])
        except (zipfile.BadZipFile, EOFError, KeyError, ValueError) as error:
            raise CorpusError(f"{self._part_path(index)} is damaged ({error}): delete it and --resume") from error

    def _write_whole(self, path: Path, write: Callable[[IO[bytes]], object]) -> None:
        """Write under another name, flush to the disk, rename: PATH never holds half a file."""
        scratch = self.folder / "writing"
        with scratch.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)


def _digest(texts: list[str]) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()
