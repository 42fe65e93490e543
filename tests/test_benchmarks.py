"""Benchmarks print no number for a wrong result, and their rows carry what a reader needs."""

from __future__ import annotations

import csv
import io
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from rich.console import Console

from benchmarks import __main__ as suite
from benchmarks import compare, encoder, harness, ops, page, peers, plots, providers, report, turns
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import report as gpu_report
from benchmarks.texts import WORDS, real_texts
from fastbert import Embedder, testing

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


def test_variants_take_turns():
    calls = []
    times = harness.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, warmup=1)
    assert "".join(calls) == "ab" + "ab" + "ba"
    assert [len(t) for t in times.values()] == [2, 2]


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


# Turns: whoever has none is stopped, and nobody outlives the run.


def slow_lengths(ms: float):
    """A provider for tests: the vector of a text is its length."""
    if ms < 0:
        raise ValueError("there is no such time")

    def encode(texts):
        if texts == ["fail"]:
            raise KeyError("fail")
        time.sleep(ms / 1e3)
        return np.array([[len(text)] for text in texts], np.float32)

    return encode


def state(pid: int) -> str:
    """R running, S asleep, T stopped, Z dead; nothing where there is no such process."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def wait_for(condition, seconds: float = 60.0) -> bool:
    """Whether it comes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_who_has_no_turn_is_stopped():
    with turns.Provider("quick", slow_lengths, 1.0) as quick, turns.Provider("slow", slow_lengths, 20.0) as slow:
        pids = [quick.process.pid, slow.process.pid]
        assert wait_for(lambda: [state(pid) for pid in pids] == ["T", "T"])
        assert quick.call(["abc", "d"]).tolist() == [[3], [1]]
        assert wait_for(lambda: state(pids[0]) == "T")
        cells = [turns.Cell(["abc"], [quick, slow], ["a"]), turns.Cell(["d", "e"], [quick], ["d"], every=3)]
        every, third = turns.take_turns(cells, seconds=0.0)
        assert [len(ms) for ms in every.values()] == [6, 6]
        assert [len(ms) for ms in third.values()] == [2]
        assert min(every["slow"]) >= 20 > min(every["quick"]) >= 1
        with pytest.raises(turns.Failed, match="KeyError: 'fail'"):
            quick.call(["fail"])
        assert quick.call(["ab"]).tolist() == [[2]], "one failure is not the end"
        times = turns.take_turns(cells[:1], seconds=0.0, parts=2)
        assert [len(ms) for ms in times[0].values()] == [4, 4]
        assert [state(pid) for pid in pids] == ["", ""], "each part has processes of its own"
        pids = [quick.process.pid, slow.process.pid]
        assert wait_for(lambda: [state(pid) for pid in pids] == ["T", "T"])
    assert [state(pid) for pid in pids] == ["", ""]
    with pytest.raises(turns.Failed, match="ValueError: there is no such time"):
        turns.Provider("broken", slow_lengths, -1.0)


@linux
def test_suites_take_turns_in_each_round_and_keep_their_samples(monkeypatch):
    order, finished = [], {}
    monkeypatch.setattr(turns.Provider, "time", lambda self, cell: order.append(cell.given) or float(cell.given))

    def prepare(options, stack):
        (name, *givens) = options
        provider = stack.enter_context(turns.Provider(name, slow_lengths, 1.0))
        cells = [turns.Cell(given, [provider], "", every=2 if name == "rare" else 1) for given in givens]
        return turns.Suite(cells, 0.0, 1, lambda found: finished.update({name: found}))

    turns.measure([(prepare, ["often", "1", "2"]), (prepare, ["rare", "3", "4"])])
    assert "".join(order) == "123" + "124" + "123" + "124", "rare cells are spread over the rounds"
    assert finished["often"] == [{"often": [1.0] * 4}, {"often": [2.0] * 4}]
    assert finished["rare"] == [{"rare": [3.0] * 2}, {"rare": [4.0] * 2}]


HOLDS_A_PROVIDER = """
import time
from benchmarks.turns import Provider
from tests.test_benchmarks import slow_lengths

if __name__ == "__main__":
    with Provider("held", slow_lengths, 1.0) as held:
        print(held.process.pid, flush=True)
        time.sleep(600)
"""


@linux
@pytest.mark.parametrize("how", ["ended", "killed"])
def test_stopped_providers_do_not_outlive_the_run(tmp_path, how):
    script = tmp_path / "holds.py"
    script.write_text(HOLDS_A_PROVIDER)
    root = str(suite.SOURCE)
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    held = int(process.stdout.readline())
    assert wait_for(lambda: state(held) == "T")
    if how == "ended":
        suite.end(process)
    else:
        process.kill()
    assert process.wait(60) < 0
    assert wait_for(lambda: state(held) in ("", "Z"))


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_bench_leaves_nothing_behind(tmp_path, number):
    mark = f"FASTBERT_BENCH_OUT={tmp_path}".encode()

    def marked():
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/environ", "rb") as file:
                    found += [pid] if mark in file.read().split(b"\0") else []
            except OSError:
                continue  # gone, or not ours
        return found

    command = [sys.executable, "-m", "fastbert", "bench", "ops", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert wait_for(marked), "the suite has begun"
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode not in (0, 1)
    assert wait_for(lambda: not marked())


# The GPU's benchmark, on the CPU: its first minute on a GPU must measure.


def test_every_step_of_the_gpu_benchmark(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "correct", lambda *_: None)  # test_kernels.py runs those cases
    for section in gpu.SECTIONS:
        gpu.main(["--dry-run", "--only", section])
    out = capsys.readouterr().out
    (path,) = tmp_path.glob("gpu-*-dry-run.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    measured = {(row["op"], row["mode"]) for row in rows}
    assert {(op, mode) for op in ("attention", "add_layer_norm") for mode in ("forward", "training")} <= measured
    assert {("gelu", "forward"), ("bert-base", "forward"), ("bert-large", "forward")} <= measured
    assert {("bert-base mlm", "training"), ("linear_gelu", "forward"), ("float8_linear", "forward")} <= measured
    assert {"fastbert", "fastbert graph"} <= {row["backend"] for row in rows}
    assert len(list(tmp_path.glob("gpu-*-peak.csv"))) == 1
    assert {"torch packed varlen_attn", "torch sdpa padded", "torch.compile padded"} <= {r["backend"] for r in rows}
    assert "is wrong" not in out
    for section in gpu.SECTIONS:
        assert f"\n{section}: " in out


def test_a_gpu_machine_may_have_torch_and_triton_alone(monkeypatch):
    """And no git, nor fastbert installed: a checkout."""
    absent = ("huggingface_hub", "safetensors", "tokenizers", "transformers", "rich", "typer", "numpy")
    code = (
        f"import sys; sys.modules |= dict.fromkeys({absent})\nimport benchmarks.gpu.__main__, fastbert.kernels.__main__"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=suite.SOURCE, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    monkeypatch.setattr(harness.shutil, "which", lambda name: None)
    assert harness.commit.__wrapped__().startswith("fastbert-engine 0.")


def test_the_gpu_benchmark_keeps_to_its_box(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "correct", lambda *_: None)
    gpu.main(["--dry-run", "--only", "attention", "--seconds", "0"])
    assert "out of time: the rest is not measured" in capsys.readouterr().out
    gpu.main(["--dry-run", "--only", "attention,memory", "--total", "-1"])
    assert "memory: out of time, not measured (--only memory)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run", "--only", "atention"])
    assert "no section atention; the sections are attention, memory" in capsys.readouterr().err


def test_a_section_that_dies_or_hangs_costs_no_other(tmp_path, monkeypatch, capfd):
    script = tmp_path / "section.py"
    script.write_text(
        "import os, sys, time\n"
        "name = sys.argv[2]\n"
        "print(name, *sys.argv[3:], flush=True)\n"
        "if name == 'attention': os.abort()\n"
        "if name == 'memory': time.sleep(600)\n"
    )
    monkeypatch.setattr(gpu, "COMMAND", [sys.executable, str(script)])
    monkeypatch.setattr(gpu, "START_SECONDS", 3)
    with pytest.raises(SystemExit, match="not whole: attention, memory"):
        gpu.main(["--dry-run", "--only", "attention,memory,inference", "--seconds", "0"])
    out = capfd.readouterr().out
    assert "attention: failed (-6)" in out
    assert "memory: stopped after 3 s" in out
    assert "inference --dtype bfloat16 --seconds 0.0 --dry-run" in out


def test_a_backward_pass_is_what_a_forward_pass_leaves(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    report = gpu_report.Report(gpu_report.setting(True, "bfloat16", 1))
    report.subtract("op", "case", {"a": 5.0, "b": 1.0, "c": 2.0}, {"a": 2.0, "b": 1.5}, 6e6, 3e9)
    (row,) = report.rows
    assert (row.backend, row.mode, row.ms_p50, row.gb_s, row.tflop_s) == ("a", "backward", 3.0, 2.0, 1.0)
    assert "nan" not in report.table()


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
                "encode", "query-64x900", name, "throughput", providers.dtype_of(name), p50, p20, p80, 1.0, 0.1, 50.0,
                harness.fast_tenth(times), *harness.times_base((minute * 30).tolist(), times), copy_gb_s=20.0,
                peak_tflop_s=0.3, samples=harness.joined(times), device="cpu", isa="avx2", load=0.1, commit="abc",
            )
        )  # fmt: skip
    return rows


def test_a_slower_machine_is_no_regression_a_slower_engine_is(tmp_path, monkeypatch, capsys):
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
    assert "3 of 3 ratios agree within 10 %" in capsys.readouterr().out
    assert suite.show_changes(paths[0], paths[2]) == 1


def test_tables_fit_a_terminal_of_80_columns():
    rows = [replace(row, case="passage-96x10082") for row in rows_of()]
    rows += [replace(row, backend="sentence-transformers-bf16", times_low=1.0, times_base=13.33) for row in rows]
    told = io.StringIO()
    Console(file=told, width=80).print(encoder.tables(rows))
    lines = told.getvalue().splitlines()
    assert "passage, throughput: 96 texts of 105 tokens" in lines[0]
    assert "sentence-transformers-bf16" in told.getvalue()
    assert "~13.33" in told.getvalue()
    assert "\N{HORIZONTAL ELLIPSIS}" not in told.getvalue()
    assert max(map(len, lines)) <= 80


def test_a_slower_list_is_found_among_hundreds_of_rows():
    rng = np.random.default_rng(0)
    keys = [("encode", f"list-{i}", "fastbert", "throughput", "int8") for i in range(200)]
    old, new = ({key: (5 * (1 + 0.02 * rng.standard_normal(4))).tolist() for key in keys} for _ in range(2))
    assert not any(change.regressed for change in compare.compare(old, new))
    new[keys[7]] = [1.3 * ms for ms in new[keys[7]]]
    assert [change.key for change in compare.compare(old, new) if change.regressed] == [keys[7]]


def test_what_is_no_file_of_rows_is_said(tmp_path):
    with pytest.raises(typer.BadParameter, match=r"there is no file .*absent\.csv"):
        suite.show_changes(tmp_path / "absent.csv", tmp_path / "absent.csv")


def test_a_run_that_was_more_often_slow_is_no_regression():
    key = ("gelu", "here", "native", "training", "float32")
    fast, slow = np.linspace(1.0, 1.02, 20).tolist(), np.linspace(1.3, 1.32, 20).tolist()
    (change,) = compare.compare({key: fast + slow[:10]}, {key: fast[:10] + slow})
    assert change.times < 1.05
    assert not change.regressed
    (change,) = compare.compare({key: fast}, {key: slow})
    assert change.regressed


def test_few_rounds_or_noise_prove_nothing():
    key = ("encode", "query-1x9", "fastbert", "batch1", "float32")
    (change,) = compare.compare({key: [1.0, 1.3, 1.2]}, {key: [1.4, 1.6, 1.3]})
    assert not change.regressed
    (change,) = compare.compare({key: [1.0, 1.0]}, {key: [1.5, 1.5]})
    assert not change.regressed, "two samples know no spread"
    assert compare.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_rows_without_samples_say_what_to_do(tmp_path):
    with next(harness.COMMITTED.glob("ops-*.csv")).open(newline="") as file:
        rows = [{**row, "samples": ""} for row in csv.DictReader(file)]
    old = tmp_path / "old.csv"
    with old.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(ValueError, match="samples"):
        compare.read(old)


def test_slow_minutes_leave_ratios_as_they_are():
    fast, slow = [2.0] * 8, [2.0, 2.0, 2.0, 9.0] * 2  # slow for one of the two alone
    assert harness.times_base(slow * 3, [1.0] * 24) == (2.0, 2.0, 2.0)
    found = harness.times_base([*fast, *fast, *slow], [0.5 if i < 8 else 1.0 for i in range(24)])
    assert found == (round(2.0 * 2 ** (8 / 12), 3), 2.0, 4.0)
    assert np.isnan(harness.times_base(None, [1.0])).all()
    assert np.isnan(harness.times_base([2.0], [1.0])).tolist() == [False, True, True]


def test_a_state_that_few_rounds_saw_does_not_decide_a_ratio():
    """A machine that is fast now and then, by more for one of the two."""
    always = ([1.0] * 24, [0.5] * 24)
    seldom = ([0.9 if i % 12 == 4 else 1.0 for i in range(24)], [0.35 if i % 12 == 4 else 0.5 for i in range(24)])
    (old, *_), (new, *_) = (harness.times_base(*sides) for sides in (always, seldom))
    assert 1.0 < new / old < harness.AGREE
    assert harness.fast_half([3.0]) == pytest.approx(3.0)
    assert harness.fast_half([8.0, 2.0, 50.0, 60.0]) == pytest.approx(4.0)
    assert harness.fast_half([2.0, 50.0, 60.0]) == pytest.approx(2.0)


def test_unsteady_ratios_are_marked_not_hidden():
    assert [harness.mark(2.0, 2.1), harness.mark(2.0, 2.3), harness.mark(np.nan, np.nan)] == ["", "~", ""]
    key = ("encode", "query-1x9", "fastbert", "batch1", "float32")
    base = ("encode", "query-1x9", "sentence-transformers", "batch1", "float32")
    steady = {key: [1.0] * 9, base: [6.0] * 9}
    moving = {key: [1.0] * 5 + [1.3] * 4, base: [7.2] * 9}
    (ratio,) = compare.ratios(steady, moving)
    assert (ratio.old, ratio.new, ratio.steady) == (6.0, 7.2, False)
    told = compare.agreement([ratio])
    assert told.startswith("0 of 1 ratios agree within 10 %\n")
    assert "query-1x9 fastbert batch1 float32: 6.00 then, 7.20 now (~: unsteady within a run)" in told
    assert compare.agreement(compare.ratios(steady, steady)) == "1 of 1 ratios agree within 10 %"


def test_short_calls_fill_the_clock():
    calls = []
    harness.interleave({"a": lambda: calls.append(0)}, rounds=1, warmup=1, least_ms=0.05)
    assert len(calls) > 3


def test_the_page_says_where_a_peer_wins_and_needs_no_other_file(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    harness.write(rows_of(), "encoder-x")
    rows = page.read(tmp_path)
    assert suite.report(tmp_path)
    text = (tmp_path / "index.html").read_text("utf-8")
    assert "float32, throughput, query texts, 64 of 14 tokens: ctranslate2 is 1.2" in text
    assert "bfloat16, throughput" not in text
    slow = {"op": "gelu", "case": "mix", "mode": "forward", "dtype": "float32"}
    pair = [{**slow, "backend": "native", "ms_p50": "3"}, {**slow, "backend": "reference", "ms_p50": "2"}]
    assert page.peer_wins(pair) == ["float32, forward, gelu mix: reference is 1.50 times as fast as native"]
    assert text.count("data:image/svg+xml;base64,") >= 4
    assert not re.search(r"(src|href|srcset)=.?(http|[a-z]+\.)", text)
    assert (tmp_path / "peers.svg").exists()
    assert len(plots.roofline(rows, plots.THEMES["dark"]).axes) == 1, "no empty panel where no op was measured"
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
    names = providers.chosen("openvino,ctranslate2-int8")
    assert names[:4] == [*providers.OWN, providers.BASE]
    assert {"openvino", "openvino-int8", "openvino-tuned-bf16", "ctranslate2-int8"} <= set(names)
    assert "ctranslate2" not in names
    with pytest.raises(SystemExit, match="no peer 'openvin'"):
        providers.chosen("openvin")


def test_command(tmp_path):
    run = subprocess.run([sys.executable, "-m", "fastbert", "bench", "--help"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "--compare" in run.stdout
    wrong = [sys.executable, "-m", "fastbert", "bench", "opps", "--out", str(tmp_path)]
    run = subprocess.run(wrong, capture_output=True, text=True)
    assert run.returncode == 2
    assert "no suite 'opps'" in run.stderr
