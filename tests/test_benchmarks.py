"""Benchmarks print no number for a wrong result, and their rows carry what a reader needs."""

from __future__ import annotations

import csv

import pytest
import torch

from benchmarks import harness, ops, report
from fastbert import testing

CASE = next(c for c in testing.CASES if str(c) == "gelu-ragged")
ROOFS = harness.Roofs(bytes_s=1e10, flop_s=1e11)


def test_rows_of_a_right_op(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    rows = ops.bench(CASE, torch.float32, "cpu", ROOFS, rounds=3)
    assert {row.mode for row in rows} == {"forward", "training"}
    assert "reference" in {row.backend for row in rows}
    for row in rows:
        assert 0 < row.ms_p20 <= row.ms_p50 <= row.ms_p80
        assert row.roof_percent >= 0  # rounded; a busy machine may be that slow
        assert row.gb_s >= 0
        assert row.commit
        assert row.threads == torch.get_num_threads()
    path = harness.write(rows, "here")
    harness.write(rows[:1], "here")  # the same key replaces, others stay
    with path.open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)


def test_a_wrong_op_prints_no_number(monkeypatch):
    monkeypatch.setitem(testing.PUBLIC, "gelu", lambda x, bias, approximate: x + bias)
    with pytest.raises(AssertionError, match="budget"):
        ops.bench(CASE, torch.float32, "cpu", ROOFS, rounds=1)


def test_traffic_is_counted():
    case = next(c for c in testing.CASES if str(c) == "attention-bert_base")
    inputs = case.inputs(torch.float32)
    nbytes, flop = ops.traffic(case, inputs, inputs["qkv"][:, 0])
    assert flop == 4 * (128**2 + 7**2 + 40**2) * 12 * 64
    assert nbytes == 4 * 175 * 12 * 64 * (3 + 1) + 4 * 4


def test_variants_take_turns():
    calls = []
    times = harness.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, warmup=1)
    assert calls == ["a", "b"] * 3
    assert [len(t) for t in times.values()] == [2, 2]


def test_numbers_in_the_readme_are_the_committed_rows():
    text = report.README.read_text(encoding="utf-8")
    assert report.render(text) == text
    assert "| query |" in text
    assert report.render(text.replace("| query |", "| quarry |")) == text
