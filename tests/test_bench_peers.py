"""Peers of the benchmarks: the same token ids, the same pooling, whatever is between."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import encoder, peers, providers, turns
from benchmarks.texts import WORDS, real_texts
from fastbert import Embedder


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
def test_a_peer_computes_what_we_compute(minilm, name, tmp_path):
    reason = peers.reason_against(peers.PEERS[name])
    if reason:
        pytest.skip(f"{name}: {reason}")
    texts = real_texts(WORDS["query"], 20) + real_texts(WORDS["sentence"], 3)
    exact = Embedder.from_pretrained(minilm, "float32", device="cpu").encode(texts, normalize_embeddings=True)
    encode = peers.make(name, minilm, tmp_path)
    assert encoder.worst_cosine(encode(texts), exact) >= encoder.GATE
    assert encoder.worst_cosine(encode([f"not {text}" for text in texts]), exact) < encoder.GATE, "the gate must fail"


def sleeps_of(name, folder, scratch):
    """A provider for tests: how often a peer's threads go to sleep in a call, the mean of some."""
    torch.set_num_threads(2)
    peer = peers.PEERS[name].kind(folder, peers.PEERS[name].dtype, scratch)

    def slept():
        lines = [line for path in Path("/proc/self/task").glob("*/status") for line in path.read_text().splitlines()]
        return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))

    def count(calls):
        before = slept()
        for _ in range(calls):
            peer.hidden(np.full((1, 40), 7), np.ones((1, 40), np.int64))
        return (slept() - before) / calls

    return count


@pytest.mark.skipif(sys.platform != "linux", reason="who sleeps is read in /proc")
@pytest.mark.parametrize("name", ["ctranslate2", "ctranslate2-int8"])
def test_threads_that_loading_left_do_not_send_a_peer_to_sleep(minilm, name, tmp_path):
    reason = peers.reason_against(peers.PEERS[name])
    if reason:
        pytest.skip(f"{name}: {reason}")
    with turns.Provider(name, sleeps_of, name, minilm, tmp_path) as provider:
        provider.call(5)
        assert provider.call(40) < 40, "each of two threads at each of fifty barriers, where they sleep"


def test_what_is_missing_is_named_with_the_line_that_installs_it(monkeypatch, capsys, tmp_path):
    absent = replace(peers.PEERS["transformers"], needs=("transformers", "no_such_engine"))
    assert peers.reason_against(absent) == "missing: pip install no_such_engine"
    monkeypatch.setitem(peers.PEERS, "transformers", absent)
    with ExitStack() as stack:
        assert encoder.started(["transformers"], tmp_path, tmp_path, stack) == []
    assert capsys.readouterr().out == "transformers: missing: pip install no_such_engine\n"
    monkeypatch.setattr(peers, "has_bfloat16", lambda: False)
    assert peers.reason_against(peers.PEERS["transformers-bf16"]) == peers.NO_BFLOAT16
    assert "pip install llama-cpp-python" in providers.reason_against("llama-cpp")
    with pytest.raises(SystemExit, match="no provider 'onnxruntim'; there are fastbert, "):
        providers.reason_against("onnxruntim")


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
    names = providers.chosen("openvino,ctranslate2-int8")
    assert names[:4] == [*providers.OWN, providers.BASE]
    assert {"openvino", "openvino-int8", "openvino-tuned-bf16", "ctranslate2-int8"} <= set(names)
    assert "ctranslate2" not in names
    with pytest.raises(SystemExit, match="no peer 'openvin'"):
        providers.chosen("openvin")
