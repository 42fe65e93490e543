"""Benchmarks print no number for a wrong result, and their rows carry what a reader needs."""

from __future__ import annotations

import csv
import subprocess
import sys
from contextlib import ExitStack

import pytest
import torch

from benchmarks import harness, ops, report, turns
from fastbert import testing

CASE = next(c for c in testing.CASES if str(c) == "gelu-ragged")


ROOFS = harness.Roofs(bytes_s=1e10, flop_s=1e11)


@pytest.fixture
def roofs(monkeypatch):
    """Of every dtype, without measuring."""
    monkeypatch.setattr(harness, "measure_roofs", lambda dtype, device: ROOFS)


def test_rows_of_a_right_op(tmp_path, monkeypatch, roofs):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    with ExitStack() as stack:
        bench = ops.Bench.of([CASE], [torch.float32], "cpu")
        rows = bench.rows(turns.take_turns(bench.cells(stack), seconds=0.0, parts=harness.PARTS))
    assert {row.mode for row in rows} == {"forward", "training"}
    assert "reference" in {row.backend for row in rows}
    for row in rows:
        assert 0 < row.ms_p10 <= row.ms_p20 <= row.ms_p50 <= row.ms_p80
        assert len(row.samples.split(";")) == 2 * harness.PARTS
        assert 0 < row.times_low <= row.times_high
        assert row.roof_percent >= 0  # rounded; a busy machine may be that slow
        assert row.gb_s >= 0
        assert row.commit
        assert row.threads == torch.get_num_threads()
        assert row.peak_tflop_s == 0.1
    path = harness.write(rows, "here")
    harness.write(rows[:1], "here")  # the same key replaces, others stay
    with path.open() as file:
        reader = csv.DictReader(file)
        assert len(list(reader)) == len(rows)
        assert reader.fieldnames[-6:] == ["device", "torch", "threads", "load", "commit", "date"]


def test_a_wrong_op_prints_no_number(monkeypatch):
    monkeypatch.setitem(testing.PUBLIC, "gelu", lambda x, bias, approximate: x + bias)
    with pytest.raises(AssertionError, match="budget"):
        ops.Bench.of([CASE], [torch.float32], "cpu")


def test_int8_linear_is_held_against_the_float_layer(monkeypatch, roofs):
    case = next(c for c in testing.BENCHMARK_CASES if str(c) == "int8_linear-minilm_up")
    with ExitStack() as stack:
        bench = ops.Bench.of([case], [torch.bfloat16], "cpu")
        rows = bench.rows(turns.take_turns(bench.cells(stack), seconds=0.0))
    assert {row.mode for row in rows} == {"forward"}
    float_row = next(row for row in rows if row.backend == ops.FLOAT)
    assert "reference" in {row.backend for row in rows}
    assert float_row.times_base == 1.0
    works = bench.known[case, torch.bfloat16]
    T, K, N = 744, 384, 1536
    assert {work.flop for work in works.values()} == {2 * T * K * N}
    assert works["reference"] == ops.Work(2 * T * K + N * K + 4 * N + 2 * N + 2 * T * N, 2 * T * K * N, torch.int8)
    assert works[ops.FLOAT] == ops.Work(2 * (T * K + N * K + N + T * N), 2 * T * K * N, torch.bfloat16)
    inputs = case.inputs(torch.float32)
    given = ops.float_linear(inputs)
    close = torch.nn.functional.linear(**given) - testing.PUBLIC["int8_linear"](**inputs)
    assert close.abs().max() < 0.02 * given["input"].abs().max(), "another layer than the one that it replaces"
    off = {**inputs, "weight_scale": inputs["weight_scale"].roll(1)}
    apart = torch.nn.functional.linear(**ops.float_linear(off)) - testing.PUBLIC["int8_linear"](**inputs)
    assert apart.abs().max() > 0.05 * given["input"].abs().max()


@pytest.mark.parametrize("lost", ["bias", "weight_scale", "weight"])
def test_a_wrong_int8_linear_prints_no_number(monkeypatch, roofs, lost):
    case = next(c for c in testing.BENCHMARK_CASES if str(c) == "int8_linear-minilm_up")
    right = testing.PUBLIC["int8_linear"]
    spoil = {"bias": lambda b: b * 1.01, "weight_scale": lambda s: s * 1.001, "weight": lambda w: w // 2 * 2}[lost]
    monkeypatch.setitem(testing.PUBLIC, "int8_linear", lambda **inputs: right(**{**inputs, lost: spoil(inputs[lost])}))
    with pytest.raises(AssertionError, match="budget"):
        ops.Bench.of([case], [torch.float32], "cpu")


def test_traffic_is_counted():
    case = next(c for c in testing.CASES if str(c) == "attention-bert_base")
    inputs = case.inputs(torch.float32)
    nbytes, flop = ops.traffic(case, inputs, inputs["qkv"][:, 0])
    assert flop == 4 * (128**2 + 7**2 + 40**2) * 12 * 64
    assert nbytes == 4 * 175 * 12 * 64 * (3 + 1) + 4 * 4
    seen = sum(abs(i - j) <= 32 for n in (140, 7, 40) for i in range(n) for j in range(n))
    case = next(c for c in testing.CASES if str(c) == "attention_window-bert_base")
    inputs = case.inputs(torch.float32)
    assert ops.traffic(case, inputs, inputs["qkv"][:, 0])[1] == 4 * seen * 12 * 64


def test_numbers_in_the_readme_are_the_committed_rows():
    text = report.README.read_text(encoding="utf-8")
    assert report.render(text) == text
    assert "| fastbert |" in text
    assert report.render(text.replace("| fastbert |", "| fastbird |")) == text


def changed(path, kind, change):
    """A copy of the committed rows of a kind, changed one by one."""
    rows = list(csv.DictReader(next(report.RESULTS.glob(f"{kind}-*[0-9].csv")).open(newline="")))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows({**row, **(change(row) or {})} for row in rows)
    return path


def test_tables_say_where_a_peer_wins(tmp_path):
    def fast(row):
        if row["backend"] == "onnxruntime-int8" and row["case"].startswith("passage-96"):
            return {"ms_p50": "1"}

    assert report.table(changed(tmp_path / "a.csv", "encoder", fast)).endswith("onnxruntime-int8 (96 x 105).")
    slow = changed(
        tmp_path / "b.csv", "encoder", lambda row: None if "fastbert" in row["backend"] else {"ms_p50": "1e9"}
    )
    assert report.table(slow).endswith("No peer is the fastest of its number format in any column.")
    own = changed(tmp_path / "c.csv", "gpu", lambda row: {"ms_p50": "1e-9"} if row["backend"] == "fused" else None)
    assert "linear_gelu" not in report.gpu_table(own).splitlines()[-1]
    peer = changed(tmp_path / "d.csv", "gpu", lambda row: {"ms_p50": "1e-9"} if row["backend"] == "cudnn" else None)
    assert "attention T16384, S32 forward (cudnn)" in report.gpu_table(peer).splitlines()[-1]


def test_the_table_of_serving_has_a_line_for_each_load(tmp_path):
    head = "test,texts,clients,texts_a_request,server,texts_s,of_inflight_percent,ms_p50,ms_p99,threads,date"
    rows = [
        "load,passage,1,1,fastbert,99.6,70.2,8.04,9.96,2,2026-01-02",
        "load,query,64,1,fastbert,1234.4,84.6,7.14,19.26,2,2026-01-02",
        "load,query,64,1,peer,88.2,6.4,70.3,99.2,2,2026-01-02",
        "load,query,8,1,fastbert,800.2,65.1,5.6,14.1,2,2026-01-02",
        "overload,query,1024,8,fastbert,1,0,1,1,2,2026-01-02",
    ]
    path = tmp_path / "server-here.csv"
    path.write_text("\n".join([head, *rows]))
    lines = report.serving(path).splitlines()
    assert "2 cores" in lines[0]
    assert lines[2] == "| texts | clients x texts each | fastbert | peer |"
    assert lines[4:] == [
        "| query | 8 x 1 | 800 (65 %), 5.6/14.1 | - |",
        "| query | 64 x 1 | 1,234 (85 %), 7.1/19.3 | 88 (6 %), 70.3/99.2 |",
        "| passage | 1 x 1 | 100 (70 %), 8.0/10.0 | - |",
    ]


def test_command(tmp_path):
    run = subprocess.run([sys.executable, "-m", "fastbert", "bench", "--help"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "--compare" in run.stdout
    wrong = [sys.executable, "-m", "fastbert", "bench", "opps", "--out", str(tmp_path)]
    run = subprocess.run(wrong, capture_output=True, text=True)
    assert run.returncode == 2
    assert "no suite 'opps'" in run.stderr


def test_generations_of_one_name_are_told_apart():
    named = {(25, 1): "Zen 3", (25, 17): "Zen 4", (25, 97): "Zen 4", (26, 2): "Zen 5", (6, 207): "Emerald Rapids"}
    assert {numbers: harness.generation(*numbers) for numbers in named} == named
    assert harness.generation(6, 85) == "6.85", "numbers, of which nobody knows a name here"
