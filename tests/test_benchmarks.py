"""Benchmarks print no number for a wrong result, and their rows carry what a reader needs."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import encoder, harness, ops, peers, report
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
    assert "| query |" in text
    assert report.render(text.replace("| query |", "| quarry |")) == text


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
