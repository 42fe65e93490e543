"""Tables of labelled examples, whole in memory: out of files, Hugging Face datasets, data frames, lists and mappings.

It knows formats and columns, and nothing of what they mean.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from fastbert.corpus import CorpusError

Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Table:
    """Rows by columns.

    Attributes:
        name: what error messages call it.
        columns: name -> one value a row.
        label_names: column -> names of its classes in order of their ids, where the source says them.
    """

    name: str
    columns: Mapping[str, list[Any]]
    label_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {name: len(values) for name, values in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise CorpusError(f"{self.name}: columns must be equally long, they have {lengths} rows")
        if not self.columns or not len(self):
            raise CorpusError(f"{self.name} has no rows: at least one labelled example is needed")

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def column(self, name: str, option: str) -> list[Any]:
        """The values of a column.

        Raises:
            CorpusError: there is none of that name; the message lists those there are and names the `option`.
        """
        if name not in self.columns:
            found = ", ".join(map(repr, self.columns))
            raise CorpusError(f"{self.name} has no column {name!r}, it has {found}: choose with --{option}")
        return self.columns[name]

    def texts(self, name: str, option: str) -> list[str]:
        """A column of texts; empty ones are allowed.

        Raises:
            CorpusError: no such column, or a value that is no text, with its row counted from 1.
        """
        values = self.column(name, option)
        for i, value in enumerate(values):
            if not isinstance(value, str):
                raise CorpusError(f"{self.where(i)}: column {name!r} holds {value!r}, a text is needed")
        return values

    def where(self, row: int) -> str:
        """How messages name a row."""
        return f"{self.name}, row {row + 1}"


def read_table(source: Any, name: str = "data", columns: Sequence[str] | None = None) -> Table:
    """A table of whatever holds labelled examples.

    Args:
        source: a path (see `FORMATS`); a `Table`; a Hugging Face `Dataset` or a data frame; a mapping of columns; an
            iterable of mappings, one a row.
        name: what error messages call it, where it is no file.
        columns: names for a CSV or TSV file that has no header line.

    Raises:
        CorpusError: no such file, an unknown suffix, a line that cannot be parsed (with its number), no rows.
        TypeError: a source of another kind.
    """
    if isinstance(source, Table):
        return source
    if isinstance(source, (str, os.PathLike)):
        return _read_file(Path(source), columns)
    if hasattr(source, "column_names") and hasattr(source, "features"):  # a Hugging Face dataset
        return _from_dataset(source, name)
    if hasattr(source, "to_dict") and hasattr(source, "columns"):  # a data frame
        return Table(name, {str(key): list(values) for key, values in source.to_dict("list").items()})
    if isinstance(source, Mapping):
        return Table(name, {key: list(values) for key, values in source.items()})
    if isinstance(source, Iterable):
        return Table(name, _from_rows(source, name))
    raise TypeError(f"{name} is a {type(source).__name__}: give a path, a dataset, columns or rows")


def _from_rows(rows: Iterable[Any], name: str) -> Columns:
    columns: Columns = {}
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise CorpusError(f"{name}, row {i + 1} is a {type(row).__name__}: a mapping of columns is needed")
        if i == 0:
            columns = {key: [] for key in row}
        if row.keys() != columns.keys():
            raise CorpusError(f"{name}, row {i + 1} has {sorted(row)} but row 1 has {sorted(columns)}")
        for key, value in row.items():
            columns[key].append(value)
    return columns


def _from_dataset(dataset: Any, name: str) -> Table:
    names = {}
    for column, feature in dataset.features.items():
        classes = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
        if classes:
            names[column] = tuple(classes)
    columns = {column: list(dataset[column]) for column in dataset.column_names}
    for column, classes in names.items():
        columns[column] = [_named(value, classes) for value in columns[column]]
    return Table(name, columns, names)


def _named(value: Any, classes: Sequence[str]) -> Any:
    """Class ids as names; -1, which datasets write where there is no label, as None."""
    if isinstance(value, int):
        return classes[value] if value >= 0 else None
    return [_named(one, classes) for one in value] if isinstance(value, Sequence) else value


def _read_file(path: Path, columns: Sequence[str] | None) -> Table:
    read = FORMATS.get(path.suffix.lower())
    if read is None:
        raise CorpusError(f"{path} ends in {path.suffix!r}: labelled examples are read from {', '.join(FORMATS)}")
    if columns is not None and read not in (_read_csv, _read_tsv):
        raise CorpusError(f"{path}: names of columns can be given for .csv and .tsv files only")
    if not path.is_file():
        raise CorpusError(f"cannot read {path}: {'it is a folder' if path.is_dir() else 'no such file'}")
    try:
        return Table(str(path), read(path, columns))
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start}). "
            "Convert the file first, for example with `iconv -f ENCODING -t UTF-8`"
        ) from error


def _open(path: Path) -> TextIO:
    return path.open(encoding="utf-8-sig", newline="")


def _read_csv(path: Path, columns: Sequence[str] | None) -> Columns:
    with _open(path) as file:
        return _read_fields(path, csv.reader(file, strict=True), columns)


def _read_tsv(path: Path, columns: Sequence[str] | None) -> Columns:
    with _open(path) as file:  # a quote is a character of the text, as in GLUE's files
        return _read_fields(path, csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE), columns)


def _read_fields(path: Path, reader: Any, columns: Sequence[str] | None) -> Columns:
    csv.field_size_limit(2**31 - 1)  # the default refuses texts over 128 KB
    header: list[str] = list(columns or ())
    table: Columns = {}
    try:
        for fields in reader:
            if not fields:
                continue
            if not table:
                header = header or fields
                if len(set(header)) < len(header):
                    raise CorpusError(f"{path}: two columns have the same name in {header}")
                table = {name: [] for name in header}
                if columns is None:
                    continue
            if len(fields) != len(header):
                raise CorpusError(
                    f"{path}, line {reader.line_num}: {len(fields)} fields but there are {len(header)} columns "
                    f"({', '.join(header)}); in .csv a field with a comma in it needs quotes"
                )
            for name, value in zip(header, fields, strict=True):
                table[name].append(value)
    except csv.Error as error:
        raise CorpusError(f"{path}, line {reader.line_num}: {error}") from error
    return table


def _read_jsonl(path: Path, columns: Sequence[str] | None) -> Columns:
    rows = []
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                rows.append(_json(line, f"{path}, line {number}"))
    return _from_rows(rows, str(path))


def _read_json(path: Path, columns: Sequence[str] | None) -> Columns:
    content = _json(path.read_text(encoding="utf-8-sig"), str(path))
    if isinstance(content, Mapping) and "data" in content:
        content = content["data"]
        if content and isinstance(content[0], Mapping) and "paragraphs" in content[0]:
            return _from_rows(_squad_rows(content, path), str(path))
    if isinstance(content, Mapping):
        return {key: list(values) for key, values in content.items()}
    return _from_rows(content, str(path))


def _squad_rows(articles: Sequence[Any], path: Path) -> Iterable[dict[str, Any]]:
    """SQuAD's nesting (articles, paragraphs, questions), one row a question."""
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    found = question.get("answers") or []
                    yield {
                        "id": question["id"],
                        "context": paragraph["context"],
                        "question": question["question"],
                        "answers": {
                            "text": [a["text"] for a in found],
                            "answer_start": [a["answer_start"] for a in found],
                        },
                    }
    except (KeyError, TypeError) as error:
        raise CorpusError(f"{path} is not in SQuAD's format: {error!r} is missing") from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise CorpusError(f"{where} is not JSON: {error.msg} at position {error.pos + 1}") from error


def _read_parquet(path: Path, columns: Sequence[str] | None) -> Columns:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise CorpusError("parquet files need pyarrow: pip install pyarrow") from error
    try:
        return pyarrow.parquet.read_table(path).to_pydict()
    except pyarrow.ArrowInvalid as error:
        raise CorpusError(f"{path} is not a parquet file: {error}") from error


def _read_conll(path: Path, columns: Sequence[str] | None) -> Columns:
    """One word a line, its tag last, sentences parted by empty lines; `-DOCSTART-` lines are left out."""
    table: Columns = {"words": [], "tags": []}
    words: list[str] = []
    tags: list[str] = []
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            fields = line.rstrip("\r\n").split("\t") if "\t" in line else line.split()
            if not line.strip("\ufeff \t\r\n") or fields[0] == "-DOCSTART-":
                if words:
                    table["words"].append(words)
                    table["tags"].append(tags)
                words, tags = [], []
            elif len(fields) < 2:
                raise CorpusError(f"{path}, line {number}: {line.strip()!r} has one field, a word and a tag are needed")
            else:
                words.append(fields[0])
                tags.append(fields[-1].strip())
    if words:
        table["words"].append(words)
        table["tags"].append(tags)
    return table


FORMATS: dict[str, Callable[[Path, Sequence[str] | None], Columns]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".conll": _read_conll,
    ".bio": _read_conll,
    ".iob2": _read_conll,
}
