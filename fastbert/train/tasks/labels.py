"""Names of labels: found in a column, kept in a configuration, turned into ids."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fastbert.corpus import CorpusError
from fastbert.models.config import Config
from fastbert.train.tables import Table


def label_name(value: Any, where: str, column: str) -> str:
    """How a label is written in `id2label`: strings as they are, whole numbers in digits.

    Raises:
        CorpusError: nothing, an empty string, or a number with a fraction.
    """
    if isinstance(value, (bool, int, np.bool_, np.integer)):
        return str(int(value))
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, (float, np.floating)) and math.isfinite(value):
        if float(value).is_integer():
            return str(int(value))
        raise CorpusError(f"{where}: column {column!r} holds {value}: for numbers use the task regression")
    raise CorpusError(f"{where}: column {column!r} holds {value!r}, a label is needed: drop or label such rows first")


def label_names(table: Table, column: str) -> list[str]:
    """The label of each row, by name."""
    values = table.column(column, "label-column")
    return [label_name(value, table.where(i), column) for i, value in enumerate(values)]


def number(value: Any, where: str, column: str) -> float:
    """A finite number, from a number or its digits.

    Raises:
        CorpusError: anything else.
    """
    try:
        parsed = float(value)
    except (TypeError, ValueError):
        parsed = math.nan
    if not math.isfinite(parsed):
        raise CorpusError(f"{where}: column {column!r} holds {value!r}, a number is needed: drop such rows first")
    return parsed


def choose_names(
    found: Iterable[str], asked: Sequence[str] | None, table: Table, column: str, config: Config
) -> tuple[str, ...]:
    """Names of labels in order of their ids.

    In this order: those asked for; those of the checkpoint, where it has them all; those of the data set; those found,
    whole numbers by value and others by the alphabet.

    Raises:
        CorpusError: a name asked for twice.
    """
    names = set(found)
    if asked is not None:
        if len(set(asked)) < len(asked):
            raise CorpusError(f"the labels {list(asked)} have a name twice")
        return tuple(asked)
    known = tuple(str(name) for _, name in sorted((config.id2label or {}).items()))
    for named in (known, table.label_names.get(column, ())):
        if names and names <= set(named):
            return named
    whole = all(name.removeprefix("-").isdecimal() and name.isascii() for name in names)
    return tuple(sorted(names, key=int) if whole else sorted(names))


def at_least_two(names: Sequence[str], table: Table, column: str) -> None:
    """Raise CorpusError where there is nothing to tell apart."""
    if len(names) < 2:
        raise CorpusError(
            f"{table.name}: column {column!r} has the one label {names[0] if names else 'nothing'!r} throughout; "
            "a classifier needs two or more"
        )


def label_ids(names: Sequence[str], labels: Sequence[str], table: Table, column: str) -> np.ndarray:
    """(N) int64 ids of the names of N rows.

    Args:
        names: one a row.
        labels: all names in order of their ids.

    Raises:
        CorpusError: a name that is no label, with its row.
    """
    ids = {label: i for i, label in enumerate(labels)}
    for i, name in enumerate(names):
        if name not in ids:
            raise unknown_label(name, labels, table.where(i), column)
    return np.array([ids[name] for name in names], dtype=np.int64)


def unknown_label(name: str, labels: Sequence[str], where: str, column: str) -> CorpusError:
    """What to raise for a label that the training data lack."""
    known = ", ".join(map(repr, labels[:20])) + (f" and {len(labels) - 20} more" if len(labels) > 20 else "")
    return CorpusError(
        f"{where}: the label {name!r} in column {column!r} is not one of the {len(labels)} known ones: {known}. "
        "Add examples of it to the training data, name all labels with --labels, or drop the row"
    )
