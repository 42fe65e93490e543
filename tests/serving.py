"""Servers for tests: tiny models of every kind, and a live server in a thread on a free port."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import fastbert
from fastbert.models.auto import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from fastbert.serve.launch import build_state
from fastbert.serve.server import Server
from fastbert.serve.settings import Settings

SHAPE = {
    "vocab_size": 30522,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
ENTITIES = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}
HEADS = {
    "reranker": (AutoModelForSequenceClassification, {"num_labels": 1}),
    "classifier": (AutoModelForSequenceClassification, {"id2label": {0: "bad", 1: "so-so", 2: "good"}}),
    "token-classification": (AutoModelForTokenClassification, {"id2label": ENTITIES}),
    "fill-mask": (AutoModelForMaskedLM, {}),
}


def tiny_model(kind: str, folder: Path, tokenizer: Path) -> Path:
    """A random model of a kind with MiniLM's tokenizer, saved in `folder`."""
    head, options = HEADS["fill-mask" if kind == "splade" else kind]
    torch.manual_seed(len(kind))
    model = head.from_config(fastbert.BertConfig(**SHAPE, **options)).eval()
    if kind == "token-classification":  # else one label wins everywhere
        with torch.no_grad():
            model.classifier.bias -= model(torch.randint(1000, 30000, (8, 60))).logits.mean((0, 1))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, folder)
    if kind == "splade":
        package = "sentence_transformers.sparse_encoder.models"
        rows = [
            {"idx": 0, "name": "0", "path": "", "type": f"{package}.MLMTransformer"},
            {"idx": 1, "name": "1", "path": "1_SpladePooling", "type": f"{package}.SpladePooling"},
        ]
        (folder / "modules.json").write_text(json.dumps(rows))
        (folder / "1_SpladePooling").mkdir()
        (folder / "1_SpladePooling" / "config.json").write_text(json.dumps({"pooling_strategy": "max"}))
    return folder


@contextmanager
def live(folders: dict[str, Path], *keys: str, tracer: Any = None, **settings: object) -> Iterator[Server]:
    """A server that listens on a free port of this machine; `.address` is its URL, `.state` what it knows."""
    options = {"port": 0, "drain_grace_s": 0.0, "drain_timeout_s": 10.0, **settings}
    server = Server(build_state(folders, Settings(**options), keys), tracer)  # type: ignore[arg-type]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive(), "the server died at start"
        assert time.monotonic() < end, "the server did not start"
        time.sleep(0.01)
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
