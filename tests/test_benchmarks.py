"""Benchmarks print no number for a wrong result, and their rows carry what a reader needs."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import __main__ as suite
from benchmarks import compare, encoder, harness, ops, peers, report
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import report as gpu_report
from benchmarks.texts import WORDS, real_texts
from fastbert import Embedder, testing

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
    assert "| fastbert |" in text
    assert report.render(text.replace("| fastbert |", "| fastbird |")) == text


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


# Peers: the same token ids, the same pooling, whatever is between.


def test_padded_batches_hold_every_sequence_once():
    ids = [[101, *range(1, n), 102] for n in (3, 1, 9, 4, 7)]
    found = {}
    for rows, input_ids, mask in peers.batches(ids, 2):
        assert input_ids.shape == mask.shape
        assert mask.sum(1).max() == mask.shape[1], "no column is padding alone"
        for row, line, kept in zip(rows, input_ids, mask, strict=True):
            assert not kept[kept.sum() :].any()
            found[row] = line[: kept.sum()].tolist()
    assert [found[i] for i in range(len(ids))] == ids


def test_pooling_ignores_padding():
    hidden = np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32)
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    vectors = peers.pooled(hidden, mask)
    mean = hidden[1, :2].mean(0)
    np.testing.assert_allclose(vectors[1], mean / np.linalg.norm(mean), rtol=1e-5)
    hidden[1, 2:] = 1e6
    np.testing.assert_array_equal(peers.pooled(hidden, mask), vectors)


@pytest.mark.parametrize("name", ["transformers", "ctranslate2", "onnxruntime", "openvino", "openvino-tuned"])
def test_a_peer_computes_what_we_compute(minilm, name):
    reason = peers.reason_against(peers.PEERS[name])
    if reason:
        pytest.skip(f"{name}: {reason}")
    texts = real_texts(WORDS["query"], 20) + real_texts(WORDS["sentence"], 3)
    exact = Embedder.from_pretrained(minilm, "float32", device="cpu").encode(texts, normalize_embeddings=True)
    encode = peers.make(name, minilm)
    assert encoder.worst_cosine(encode(texts), exact) >= encoder.GATE
    assert encoder.worst_cosine(encode([f"not {text}" for text in texts]), exact) < encoder.GATE, "the gate must fail"


def test_what_is_missing_is_named_with_the_line_that_installs_it(monkeypatch, capsys):
    absent = replace(peers.PEERS["transformers"], needs=("transformers", "no_such_engine"))
    assert peers.reason_against(absent) == "missing: pip install no_such_engine"
    monkeypatch.setitem(peers.PEERS, "transformers", absent)
    assert dict(encoder.providers("unused", ["transformers"])) == {}
    assert capsys.readouterr().out == "transformers: missing: pip install no_such_engine\n"
    monkeypatch.setattr(peers, "has_bfloat16", lambda: False)
    assert peers.reason_against(peers.PEERS["transformers-bf16"]) == peers.NO_BFLOAT16
    with pytest.raises(SystemExit, match="no provider 'onnxruntim'; there are fastbert, "):
        dict(encoder.providers("unused", ["onnxruntim"]))


# The GPU's benchmark, on the CPU: its first minute on a GPU must measure.


def test_every_step_of_the_gpu_benchmark(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "correct", lambda at: None)  # test_kernels.py runs those cases
    gpu.main(["--dry-run"])
    out = capsys.readouterr().out
    (path,) = tmp_path.glob("gpu-*-dry-run.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    measured = {(row["op"], row["mode"]) for row in rows}
    assert {("attention", "forward"), ("attention", "training"), ("add_layer_norm", "training")} <= measured
    assert {("gelu", "forward"), ("bert-base", "forward"), ("bert-large", "forward")} <= measured
    assert {("bert-base mlm", "training"), ("linear_gelu", "forward"), ("float8_linear", "forward")} <= measured
    assert "fastbert" in {row["backend"] for row in rows}
    assert len(list(tmp_path.glob("gpu-*-peak.csv"))) == 1
    assert {"torch packed varlen_attn", "torch sdpa padded", "torch.compile padded"} <= {r["backend"] for r in rows}
    assert "is wrong" not in out
    for section in gpu.SECTIONS:
        assert f"\n{section}: " in out


def test_the_gpu_benchmark_keeps_to_its_box(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "correct", lambda at: None)
    gpu.main(["--dry-run", "--only", "attention", "--seconds", "0"])
    assert "out of time: the rest is not measured" in capsys.readouterr().out
    gpu.main(["--dry-run", "--only", "attention,memory", "--total", "-1"])
    assert "memory: out of time, not measured (--only memory)" in capsys.readouterr().out


def test_a_wrong_variant_gets_no_number(capsys):
    at = gpu_report.setting(True, "bfloat16", 1)
    right = torch.ones(3)

    def absent():
        raise NotImplementedError("no such kernel")

    runs = {"right": lambda: right, "wrong": lambda: 1.01 * right, "absent": absent}
    assert list(gpu_report.checked("op", at, runs, right)) == ["right"]
    out = capsys.readouterr().out
    assert "wrong is wrong" in out
    assert "absent does not run here: no such kernel" in out


# One run's report, and what another run is held against.


def rows_of(slower: float = 1.0, noise: float = 0.02) -> list[harness.Row]:
    """Rows of two providers and their base over twelve rounds; the second provider slowed down."""
    rng = np.random.default_rng(int(1000 * slower))
    rows = []
    minute = 1 + rng.random(12)  # what else the machine does hits all alike
    for name, ms in {
        "sentence-transformers": 30.0,
        "fastbert": 5.0,
        "fastbert-bf16": 3.0 * slower,
        "ctranslate2": 4.0,
    }.items():
        times = (ms * minute * (1 + noise * rng.standard_normal(12))).tolist()
        p50, p20, p80 = harness.percentiles(times)
        rows.append(
            harness.Row(
                "encode", "query-64x900", name, "throughput", encoder.dtype_of(name), p50, p20, p80, 1.0, 0.1, 50.0,
                "cpu", "2", "avx2", 2, 0.1, "abc", "2026-11-27", harness.times_base(minute * 30, times),
                copy_gb_s=20.0, gemm_tflop_s=0.3, samples=harness.joined(times),
            )
        )  # fmt: skip
    return rows


def test_a_slower_machine_is_no_regression_a_slower_engine_is(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    paths = [
        harness.write(rows_of(), "old"),
        harness.write(rows_of(1.0001), "same"),
        harness.write(rows_of(1.3), "new"),
    ]
    old, same, new = (compare.read(path) for path in paths)
    assert not any(change.regressed for change in compare.compare(old, same))
    worst, *others = compare.compare(old, new)
    assert worst.key[2] == "fastbert-bf16"
    assert worst.regressed
    assert worst.relative
    assert worst.times == pytest.approx(1.3, rel=0.05)
    assert not any(change.regressed for change in others)
    assert suite.show_changes(paths[0], paths[1]) == 0
    assert suite.show_changes(paths[0], paths[2]) == 1


def test_few_rounds_or_noise_prove_nothing():
    key = ("encode", "query-1x9", "fastbert", "batch1", "float32")
    (change,) = compare.compare({key: [1.0, 1.1, 1.2]}, {key: [1.5, 1.6, 1.7]})
    assert not change.regressed
    assert compare.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_rows_without_samples_say_what_to_do():
    with pytest.raises(ValueError, match="samples"):
        compare.read(next(harness.COMMITTED.glob("ops-*.csv")))


def test_ratios_are_of_the_same_round():
    assert harness.times_base([2.0, 40.0, 2.0], [1.0, 20.0, 1.0]) == 2.0
    assert np.isnan(harness.times_base(None, [1.0]))


def test_short_calls_fill_the_clock():
    calls = []
    harness.interleave({"a": lambda: calls.append(0)}, rounds=1, warmup=1, least_ms=0.05)
    assert len(calls) > 3


def test_the_page_says_where_a_peer_wins_and_needs_no_other_file(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    harness.write(rows_of(), "encoder-x")
    assert suite.report(tmp_path)
    text = (tmp_path / "index.html").read_text("utf-8")
    assert "float32, throughput, query texts, 64 of 14 tokens: ctranslate2 is 1.2" in text
    assert "bfloat16, throughput" not in text
    assert text.count("data:image/svg+xml;base64,") >= 4
    assert not re.search(r"(src|href|srcset)=.?(http|[a-z]+\.)", text)
    assert (tmp_path / "peers.svg").exists()
    assert not suite.report(tmp_path / "empty")


def test_a_lone_text_has_so_many_tokens(minilm):
    tokenizer = Embedder.from_pretrained(minilm, "float32", device="cpu").tokenizer
    for length in (16, 128):
        text = encoder.text_of(length, lambda texts: tokenizer.encode(texts).ids)
        assert len(tokenizer.encode([text]).ids[0]) == length


def test_a_short_model_is_given_room(minilm):
    with ExitStack() as stack:
        folder = encoder.roomy(minilm, 512, stack)
        text = "word " * 600
        ids = Embedder.from_pretrained(folder, "float32", device="cpu").tokenizer.encode([text]).ids
        assert len(ids[0]) == 512
    assert encoder.roomy(minilm, 64, stack) == minilm


def test_peers_by_family():
    names = encoder.chosen("openvino,ctranslate2-int8")
    assert names[:4] == [*encoder.OWN, encoder.BASE]
    assert {"openvino", "openvino-int8", "openvino-tuned-bf16", "ctranslate2-int8"} <= set(names)
    assert "ctranslate2" not in names
    with pytest.raises(SystemExit, match="no peer 'openvin'"):
        encoder.chosen("openvin")


def test_command(tmp_path):
    run = subprocess.run([sys.executable, "-m", "fastbert", "bench", "--help"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "--compare" in run.stdout
    wrong = [sys.executable, "-m", "fastbert", "bench", "opps", "--out", str(tmp_path)]
    run = subprocess.run(wrong, capture_output=True, text=True)
    assert run.returncode == 2
    assert "no suite 'opps'" in run.stderr
