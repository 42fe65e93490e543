"""Readers give back what was written, errors name the row, and an output survives a crash at every single step."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert import corpus as corpus_module
from fastbert.corpus import Corpus, CorpusError, Part, VectorFile, open_corpus


def write_txt(path: Path, texts: list[str]) -> None:
    path.write_bytes("".join(f"{t}\n" for t in texts).encode())


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_bytes("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)).encode())


def write_csv(path: Path, texts: list[str]) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["id", "text"], *([i, t] for i, t in enumerate(texts))])


def write_parquet(path: Path, texts: list[str]) -> None:
    pq.write_table(pa.table({"id": pa.array(range(len(texts))), "text": pa.array(texts, pa.string())}), path)


WRITE = {".txt": write_txt, ".jsonl": write_jsonl, ".csv": write_csv, ".parquet": write_parquet}
# A line of a text file cannot hold these; the csv module reads NUL since Python 3.11.
NOT_IN = {".txt": "\n\r\ufeff", ".csv": "" if sys.version_info >= (3, 11) else "\0"}


@pytest.mark.parametrize("suffix", WRITE)
def test_round_trip(suffix: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("texts") / f"in{suffix}"
    characters = st.characters(codec="utf-8", exclude_characters=NOT_IN.get(suffix, ""))

    @settings(max_examples=60, deadline=None, database=None)
    @given(st.lists(st.text(characters) | st.sampled_from(["", "a,b", '"', "\u2028\x85\x0b\x1c", "é" * 9]), max_size=9))
    def check(texts: list[str]) -> None:
        WRITE[suffix](path, texts)
        assert list(open_corpus(path).texts) == texts

    check()


@pytest.mark.parametrize("suffix", WRITE)
def test_reads_no_further_than_a_chunk(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"in{suffix}"
    texts = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(60_000)]  # does not compress below 1 MB
    WRITE[suffix](path, texts)
    corpus = open_corpus(path)
    chunks = corpus.chunks(1000)
    assert next(chunks) == texts[:1000]
    fraction = corpus.fraction_read()
    assert fraction is not None
    assert fraction < 0.7
    rest = list(chunks)
    assert [len(chunk) for chunk in rest] == [1000] * 59
    assert rest[-1] == texts[-1000:]


def test_a_chunk_is_all_that_is_held() -> None:
    taken = count()
    corpus = Corpus("endless", (f"{next(taken)}" for _ in count()))
    chunks = corpus.chunks(100)
    for _ in range(3):
        assert len(next(chunks)) == 100
    assert next(taken) == 300


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("bom.txt", b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree", ["one", "two", "", "three"]),
        ("empty.txt", b"", []),
        ("only-bom.txt", b"\xef\xbb\xbf", []),
        ("separators.txt", "a\u2028b\x0cc\rd\n".encode(), ["a\u2028b\x0cc\rd"]),
        ("bom.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "\\ud800"}', ["a", "\ud800"]),
        ("quotes.csv", b'text,n\r\n"a ""b"",\r\nc",1\r\n\r\n,2\r\n', ['a "b",\r\nc', ""]),
        ("long.csv", b"text\n" + b"x" * 200_000 + b"\n", ["x" * 200_000]),
        ("header.csv", b"text\n", []),
    ],
)
def test_spellings(name: str, content: bytes, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert list(open_corpus(tmp_path / name).texts) == texts


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"fine\nb\xe9d\n", ["line 2", "0xe9", "position 2", "iconv"]),
        ("utf16.txt", "hello\n".encode("utf-16"), ["line 1", "0xff"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', ["line 2", "not JSON"]),
        ("b.jsonl", b'\n{"text": "a"}\n"text"\n', ["line 3", "str", "object"]),
        ("c.jsonl", b'{"body": "a", "id": 1}\n', ["line 1", "'text'", "'body', 'id'", "--column"]),
        ("d.jsonl", b'{"text": "a"}\n{"text": null}\n', ["line 2", "null"]),
        ("e.jsonl", b'{"text": 3}\n', ["line 1", "int"]),
        ("f.jsonl", b"[" * 100_000, ["line 1", "deep"]),
        ("a.csv", b"id,body\n1,a\n", ["'text'", "'id', 'body'", "--column"]),
        ("b.csv", b'text,id\n"a\nb",1\nc, d,2\n', ["line 4", "3 fields", "has 2", "quotes"]),
        ("c.csv", b'text\n"never closed\n', ["line 2"]),
        ("d.csv", b"text\n\xff\n", ["line 2", "0xff"]),
        ("a.parquet", b"this is not parquet at all", ["a.parquet", "not a parquet file"]),
        ("a.xlsx", b"", ["'.xlsx'", ".txt, .jsonl, .csv, .parquet"]),
    ],
)
def test_errors_say_where(name: str, content: bytes, words: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError) as error:
        list(open_corpus(tmp_path / name).texts)
    assert all(word in str(error.value) for word in [name, *words]), error.value


def test_parquet_columns(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    coded = pa.array(["a", "b", "a"]).dictionary_encode()
    pq.write_table(pa.table({"n": [1, 2, 3], "holes": ["x", "y", None], "coded": coded}), path)
    assert list(open_corpus(path, "coded").texts) == ["a", "b", "a"]
    for column, words in {"n": "row 1: column 'n' holds int", "holes": "row 3: column 'holes' holds null"}.items():
        with pytest.raises(CorpusError, match=words):
            list(open_corpus(path, column).texts)
    with pytest.raises(CorpusError, match="'n', 'holes', 'coded'"):
        list(open_corpus(path).texts)


def test_missing_pyarrow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CorpusError, match="pip install pyarrow"):
        VectorFile(tmp_path / "out.parquet")


@pytest.mark.parametrize(("name", "words"), [("gone.txt", "No such file"), ("folder.txt", "directory")])
def test_unreadable(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(CorpusError, match=words):
        open_corpus(tmp_path / name)


# Outputs.

CHUNKS = [["a", "b"], ["\u2028 \ud800 é", ""], ["last"]]
NUM_ROWS = sum(map(len, CHUNKS))
SETTINGS = {"model": "m", "dtype": "float32", "truncate_dim": None}


def vectors(texts: list[str]) -> np.ndarray:
    """A pure function of the texts, with values that need all 9 digits."""
    seeds = [[len(t) + 0.1, sum(map(ord, t)) / 7, 1e-30] for t in texts]
    return np.array(seeds, np.float32)


def run(file: VectorFile, chunks: list[list[str]] = CHUNKS, other: dict[str, object] | None = None) -> list[int]:
    """What `embed_to_file` does; returns the indices of the parts that were computed."""
    computed: list[int] = []
    if file.begin(SETTINGS if other is None else other):
        return computed
    for index, texts in enumerate(chunks):
        if file.part(index, texts) is None:
            computed.append(index)
            file.add(index, texts, Part(vectors(texts), texts, 3 * len(texts), 0))
    file.finish(len(chunks))
    return computed


def read_npy(path: Path) -> list[tuple[int, None, list[float]]]:
    return [(i, None, row) for i, row in enumerate(np.load(path, allow_pickle=False).tolist())]


def read_jsonl(path: Path) -> list[tuple[int, str | None, list[float]]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [(r["index"], r.get("text"), np.array(r["embedding"], np.float32).tolist()) for r in rows]


def read_parquet(path: Path) -> list[tuple[int, str | None, list[float]]]:
    table = pq.read_table(path)
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 3)
    return [(r["index"], r.get("text"), r["embedding"]) for r in table.to_pylist()]


READ: dict[str, Callable[[Path], list]] = {".npy": read_npy, ".jsonl": read_jsonl, ".parquet": read_parquet}


@pytest.mark.parametrize("with_text", [True, False])
@pytest.mark.parametrize("suffix", READ)
def test_output_holds_every_row(suffix: str, with_text: bool, tmp_path: Path) -> None:
    path = tmp_path / f"out{suffix}"
    assert run(VectorFile(path, with_text=with_text)) == [0, 1, 2]
    flat = [t for chunk in CHUNKS for t in chunk]
    kept = with_text and suffix != ".npy"
    # Arrow's strings are UTF-8, which has no surrogates; JSON's escapes have them.
    texts = [t.replace("\ud800", "\ufffd") if suffix == ".parquet" else t for t in flat] if kept else [None] * NUM_ROWS
    # U+2028 ends a line for str.splitlines, so the jsonl reader above must not see it raw.
    if suffix == ".jsonl" and kept:
        rows = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
        found = [(r["index"], r["text"], np.array(r["embedding"], np.float32).tolist()) for r in rows]
    else:
        found = READ[suffix](path)
    assert found == list(zip(range(NUM_ROWS), texts, vectors(flat).tolist(), strict=True))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


class Crash(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


@pytest.fixture
def crash_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Make the k-th step that touches the file system (mkdir, open to write, fsync, rename, delete) a crash."""
    steps, doomed = count(), -1

    def arm(step: int) -> None:
        nonlocal steps, doomed
        steps, doomed = count(), step

    def crashing(function: Callable) -> Callable:
        def wrapped(*args, **kwargs):
            if next(steps) == doomed:
                raise Crash
            return function(*args, **kwargs)

        return wrapped

    for owner, name in [(os, "replace"), (os, "fsync"), (Path, "mkdir"), (Path, "unlink"), (Path, "rmdir")]:
        monkeypatch.setattr(owner, name, crashing(getattr(owner, name)))
    for name in corpus_module.WRITERS:
        monkeypatch.setitem(corpus_module.WRITERS, name, crashing(corpus_module.WRITERS[name]))
    yield arm
    arm(-1)


@pytest.mark.parametrize("suffix", READ)
def test_a_crash_at_any_step_loses_and_repeats_nothing(
    suffix: str, tmp_path: Path, crash_at: Callable[[int], None]
) -> None:
    whole = tmp_path / f"whole{suffix}"
    run(VectorFile(whole))
    num_crashes = 0
    for step in count():
        path = tmp_path / f"out{step}{suffix}"
        crash_at(step)
        try:
            run(VectorFile(path))
        except Crash:
            num_crashes += 1
        else:
            break  # the run has fewer steps than that
        crash_at(-1)
        finished = {int(p.stem.split("-")[1]) for p in path.parent.glob(f"{path.name}.partial/part-*.npz")}
        complete = path.exists()
        if complete and not VectorFile(path, resume=True, overwrite=True)._resumed:
            computed = []  # all that was left to do was to remove an empty folder
        else:
            computed = run(VectorFile(path, resume=True))
        assert computed == ([] if complete else sorted(set(range(len(CHUNKS))) - finished)), step
        assert path.read_bytes() == whole.read_bytes(), step
    assert num_crashes > 15


def test_resume_twice_through_a_crash_of_the_resumed_run(tmp_path: Path, crash_at: Callable[[int], None]) -> None:
    path = tmp_path / "out.npy"
    computed: list[int] = []
    for step in (6, 4, 5, 2, 3, 2, 2, 2, 2, 2, -1):
        crash_at(step)
        before = {p.name for p in path.parent.glob("out.npy.partial/part-*.npz")}
        try:
            file = VectorFile(path, resume=True)
            computed += run(file)
            break
        except Crash:
            assert before <= {p.name for p in path.parent.glob("out.npy.partial/part-*.npz")} or path.exists()
    crash_at(-1)
    assert np.array_equal(np.load(path), vectors([t for chunk in CHUNKS for t in chunk]))


def interrupted(path: Path, num_parts: int = 2) -> None:
    file = VectorFile(path)
    file.begin(SETTINGS)
    for index, texts in enumerate(CHUNKS[:num_parts]):
        file.add(index, texts, Part(vectors(texts), texts, 1, 0))


def test_other_settings_are_refused_with_both_sides(tmp_path: Path) -> None:
    interrupted(tmp_path / "out.npy")
    with pytest.raises(CorpusError, match="dtype: 'float32' then, 'int8' now"):
        run(VectorFile(tmp_path / "out.npy", resume=True), other={**SETTINGS, "dtype": "int8"})
    assert run(VectorFile(tmp_path / "out.npy", resume=True)) == [2]


@pytest.mark.parametrize(
    ("chunks", "words"),
    [
        ([["a", "b"], ["changed", ""], ["last"]], "part-000001.npz was computed from other texts.* rows 3 to 4"),
        ([["a", "b"]], "more than the 1 parts"),
    ],
)
def test_other_texts_are_refused(chunks: list[list[str]], words: str, tmp_path: Path) -> None:
    interrupted(tmp_path / "out.npy")
    with pytest.raises(CorpusError, match=words):
        run(VectorFile(tmp_path / "out.npy", resume=True), chunks)


def test_a_row_repaired_after_the_finished_parts_is_no_other_input(tmp_path: Path) -> None:
    interrupted(tmp_path / "out.npy")
    assert run(VectorFile(tmp_path / "out.npy", resume=True), [*CHUNKS[:2], ["repaired"]]) == [2]


def test_existing_files_are_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "out.npy"
    path.write_bytes(b"precious")
    with pytest.raises(CorpusError, match=r"exists already.*--overwrite"):
        VectorFile(path)
    with pytest.raises(CorpusError, match=r"exists already.*--overwrite"):
        VectorFile(path, resume=True)
    assert path.read_bytes() == b"precious"
    assert run(VectorFile(path, overwrite=True)) == [0, 1, 2]
    interrupted(tmp_path / "two.npy")
    with pytest.raises(CorpusError, match=r"unfinished run.*--resume.*--overwrite"):
        VectorFile(tmp_path / "two.npy")
    assert run(VectorFile(tmp_path / "two.npy", overwrite=True)) == [0, 1, 2]
    foreign = tmp_path / "three.npy.partial"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(CorpusError, match="other files"):
        VectorFile(tmp_path / "three.npy", overwrite=True)
    assert (foreign / "thesis.txt").read_text() == "irreplaceable"


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b.replace(b"\x80", b"\x81")])
def test_a_damaged_part_is_named(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "out.npy"
    interrupted(path)
    part = tmp_path / "out.npy.partial" / "part-000000.npz"
    broken = damage(part.read_bytes())
    part.write_bytes(broken if broken != part.read_bytes() else b"PK")
    with pytest.raises(CorpusError, match=r"part-000000\.npz is damaged.*delete it"):
        run(VectorFile(path, resume=True))
    part.unlink()
    assert run(VectorFile(path, resume=True)) == [0, 2]


@pytest.mark.parametrize(
    ("name", "words"), [("out.csv", "'.csv'.*.npy, .jsonl, .parquet"), ("no/out.npy", "folder .*no does not exist")]
)
def test_unwritable(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=words):
        VectorFile(tmp_path / name)
