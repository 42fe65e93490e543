"""Labelled examples out of every kind of source; bad input is named with its place."""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest

from fastbert.corpus import CorpusError
from fastbert.train.tables import Table, read_table

ROWS = [{"text": 'a "b", c', "label": "1"}, {"text": "", "label": "0"}, {"text": "é\u2028x", "label": "1"}]
COLUMNS = {"text": [r["text"] for r in ROWS], "label": [r["label"] for r in ROWS]}


def written(path, text):
    path.write_bytes(text.encode())
    return path


def sources(tmp_path):
    csv = 'text,label\r\n"a ""b"", c",1\r\n"",0\r\n\r\né\u2028x,1\r\n'
    pyarrow.parquet.write_table(pyarrow.table(COLUMNS), tmp_path / "a.parquet")
    return {
        "csv": written(tmp_path / "a.csv", "\ufeff" + csv),
        "tsv": written(tmp_path / "a.tsv", 'text\tlabel\na "b", c\t1\n\t0\né\u2028x\t1\n'),
        "jsonl": written(tmp_path / "a.jsonl", "\n".join(json.dumps(r) for r in ROWS) + "\n\n"),
        "json": written(tmp_path / "a.json", json.dumps(ROWS)),
        "parquet": tmp_path / "a.parquet",
        "rows": ROWS,
        "generator": (row for row in ROWS),
        "columns": COLUMNS,
        "table": Table("t", COLUMNS),
        "path as a str": str(tmp_path / "a.csv"),
    }


def test_every_source_gives_the_same_columns(tmp_path):
    for kind, source in sources(tmp_path).items():
        assert read_table(source).columns == COLUMNS, kind


class Frame:
    """What a data frame answers to."""

    columns = ("text", "label")

    def to_dict(self, kind):
        assert kind == "list"
        return COLUMNS


class Classes:
    names = ("neg", "pos")


class Words:
    feature = Classes()


class Dataset:
    """What a Hugging Face dataset answers to."""

    column_names = ("text", "label", "tags")
    features = {"text": None, "label": Classes(), "tags": Words()}  # noqa: RUF012

    def __getitem__(self, name):
        return {"text": ["a", "b", "c"], "label": [1, 0, -1], "tags": [[0, 1], [], [1]]}[name]


def test_data_frames_and_datasets():
    assert read_table(Frame()).columns == COLUMNS
    table = read_table(Dataset())
    assert table.columns["label"] == ["pos", "neg", None]
    assert table.columns["tags"] == [["neg", "pos"], [], ["pos"]]
    assert table.label_names == {"label": ("neg", "pos"), "tags": ("neg", "pos")}


def test_conll(tmp_path):
    text = "-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n\n\n# NN O\n\ufeff\n"
    assert read_table(written(tmp_path / "a.conll", text)).columns == {
        "words": [["EU", "rejects"], ["#"]],
        "tags": [["B-ORG", "O"], ["O"]],
    }
    with pytest.raises(CorpusError, match=r"a.conll, line 2: 'word' has one field"):
        read_table(written(tmp_path / "a.conll", "a\tO\nword\n"))


def test_squad(tmp_path):
    question = {"id": "7", "question": "who?", "answers": [{"text": "Bob", "answer_start": 6}]}
    nothing = {"id": "8", "question": "when?", "answers": [], "is_impossible": True}
    content = {"data": [{"title": "t", "paragraphs": [{"context": "It is Bob", "qas": [question, nothing]}]}]}
    table = read_table(written(tmp_path / "a.json", json.dumps(content)))
    assert table.columns["answers"] == [{"text": ["Bob"], "answer_start": [6]}, {"text": [], "answer_start": []}]
    assert table.columns["context"] == ["It is Bob"] * 2
    del content["data"][0]["paragraphs"][0]["context"]
    with pytest.raises(CorpusError, match="SQuAD's format: KeyError\\('context'\\)"):
        read_table(written(tmp_path / "a.json", json.dumps(content)))


def test_files_without_a_header(tmp_path):
    path = written(tmp_path / "a.tsv", "4\tone\ttwo\n3.8\tx\ty\n")
    table = read_table(path, columns=("score", "a", "b"))
    assert table.columns == {"score": ["4", "3.8"], "a": ["one", "x"], "b": ["two", "y"]}
    with pytest.raises(CorpusError, match=r"\.csv and \.tsv files only"):
        read_table(written(tmp_path / "a.jsonl", "{}"), columns=("a",))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "a.csv has no rows"),
        ("a.csv", "text,label\n", "a.csv has no rows"),
        ("a.csv", "text,label\nx,1\na, b,1\n", r"line 3: 3 fields but there are 2 columns \(text, label\)"),
        ("a.csv", 'text,label\n"x,1\n', "line 2: unexpected end of data"),
        ("a.csv", "a,a\n1,2\n", "two columns have the same name"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', "line 2 is not JSON"),
        ("a.jsonl", '{"a": 1}\n{"b": 1}\n', r"row 2 has \['b'\] but row 1 has \['a'\]"),
        ("a.jsonl", "[1]\n", "row 1 is a list"),
        ("a.json", "{", "a.json is not JSON"),
        ("a.json", '{"a": [1], "b": [1, 2]}', "equally long"),
        ("a.parquet", "x", "not a parquet file"),
        ("a.xlsx", "x", r"ends in '.xlsx': labelled examples are read from .csv"),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    with pytest.raises(CorpusError, match=message):
        read_table(written(tmp_path / name, text))


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(CorpusError, match=r"cannot read .*a.csv: no such file"):
        read_table(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_bytes("text\ncaf\xe9\n".encode("latin-1"))
    with pytest.raises(CorpusError, match="not UTF-8"):
        read_table(tmp_path / "a.csv")
    with pytest.raises(TypeError, match="train is a int"):
        read_table(3, "train")
    with pytest.raises(CorpusError, match="train has no rows"):
        read_table([], "train")


def test_columns_are_asked_for_by_name():
    table = Table("t.csv", COLUMNS)
    with pytest.raises(
        CorpusError, match=r"t.csv has no column 'txt', it has 'text', 'label': choose with --text-column"
    ):
        table.texts("txt", "text-column")
    with pytest.raises(CorpusError, match="t, row 2: column 'a' holds None, a text is needed"):
        Table("t", {"a": ["x", None]}).texts("a", "text-column")
