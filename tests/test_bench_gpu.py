"""The GPU's benchmark, on the CPU: its first minute on a GPU must measure."""

from __future__ import annotations

import csv
import subprocess
import sys

import pytest
import torch

from benchmarks import __main__ as suite
from benchmarks import harness
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import report as gpu_report


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


def test_a_gpu_machine_may_have_torch_triton_and_numpy_alone(monkeypatch):
    """And no git, nor fastbert installed: a checkout."""
    absent = ("huggingface_hub", "safetensors", "tokenizers", "transformers", "rich", "typer")
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
