"""Every example runs, at small size, and its result is looked at."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: object) -> str:
    """What an example prints."""
    command = [sys.executable, str(FOLDER / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_semantic_search(tmp_path):
    corpus = tmp_path / "corpus.txt"
    boat = "The ferry to the island was cancelled because of the storm."
    corpus.write_text(f"Knead the dough for ten minutes, then let it rise.\n\n{boat}\n")
    out = run("semantic_search.py", "--corpus", corpus, "--top", 1, "why did the boat not sail?")
    assert boat in out
    out = run("semantic_search.py", "--limit", 40, "--save", tmp_path / "v.npy", "assert statements")
    assert "40 paragraphs" in out
    assert (tmp_path / "v.npy").exists()


def test_classifier(tmp_path):
    out = run("classifier.py", "--out", tmp_path / "m", "--examples", 40, "--epochs", 2)
    assert float(re.search(r"held-out texts: ([\d.]+)", out)[1]) > 0.6
    assert len(re.findall(r"^ *(?:python|torch): ", out, re.MULTILINE)) == 2


def test_ner(tmp_path):
    out = run("ner.py", "--out", tmp_path / "m", "--examples", 60, "--epochs", 2)
    assert re.search(r"eval_f1: [\d.]+", out), out
    assert (tmp_path / "m" / "model.safetensors").exists()


def test_pretraining(tmp_path):
    out = run(
        "pretrain_from_scratch.py", "--out", tmp_path / "m", "--steps", 30, "--batch-tokens", 1024, "--vocab-size", 1000
    )
    first, last = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", out).groups())
    assert last < first - 0.2


def test_service():
    pytest.importorskip("fastapi")
    out = run("accelerated_service.py", "--check")
    assert float(re.search(r"component: (\S+)", out)[1]) < 1e-5
