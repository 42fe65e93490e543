"""Everything that turns texts into vectors here, by name: ours, the libraries, the peers; and what is missing."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from benchmarks import peers
from fastbert import Embedder

OWN = {"fastbert": "float32", "fastbert-bf16": "bfloat16", "fastbert-int8": "int8"}
BASE = "sentence-transformers"  # in fp32: what most people run
LIBRARIES = {BASE: torch.float32, "sentence-transformers-bf16": torch.bfloat16}
NAMES = (*OWN, *LIBRARIES, *peers.PEERS)
LEFT_OUT = {
    "llama-cpp": "no row: `pip install llama-cpp-python` compiles it, but it reads GGUF files alone, and what makes "
    "one of a BERT checkpoint is a script in llama.cpp's repository that no package ships",
}


def reason_against(name: str) -> str | None:
    """Why a provider cannot be measured here, and what to do; None where it can.

    Raises:
        SystemExit: there is no such provider.
    """
    if name in OWN:
        return None
    if name in LEFT_OUT:
        return LEFT_OUT[name]
    if name in peers.PEERS:
        return peers.reason_against(peers.PEERS[name])
    if name not in LIBRARIES:
        raise SystemExit(f"no provider {name!r}; there are {', '.join(NAMES)}")
    if importlib.util.find_spec("sentence_transformers") is None:
        return "missing: pip install sentence-transformers"
    return peers.NO_BFLOAT16 if LIBRARIES[name] == torch.bfloat16 and not peers.has_bfloat16() else None


def make(name: str, folder: Path, scratch: Path) -> Callable[[list[str]], np.ndarray]:
    """What turns texts into unit vectors, by one provider.

    Args:
        folder: of the model.
        scratch: where peers keep what they convert it to, for each other.
    """
    if name in OWN:
        return partial(Embedder.from_pretrained(folder, OWN[name]).encode, normalize_embeddings=True)
    if name in peers.PEERS:
        return peers.make(name, folder, scratch)
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": LIBRARIES[name]})
    return partial(model.encode, normalize_embeddings=True, show_progress_bar=False)


def dtype_of(name: str) -> str:
    """In which a provider computes, by its name."""
    return {"bf16": "bfloat16", "int8": "int8"}.get(name.rpartition("-")[2], "float32")


def compiles(name: str) -> bool:
    """Whether its first call of a shape may compile."""
    return name in peers.PEERS and peers.PEERS[name].kind is peers.Compiled


def chosen(against: str | None) -> list[str]:
    """Names of providers for `--against`, all without it: ours, the base, and each peer that a word names, with its
    variants.

    Raises:
        SystemExit: a word names no peer.
    """
    if against is None:
        return [*NAMES, *LEFT_OUT]
    names = [*OWN, BASE]
    others = [*LIBRARIES, *peers.PEERS, *LEFT_OUT]
    for word in against.split(","):
        found = [n for n in others if n == word or n.startswith(f"{word}-")]
        if not found:
            always = f"{', '.join(OWN)} and {BASE} are measured in any case"
            raise SystemExit(f"no peer {word!r}; there are {', '.join(others)}; {always}")
        names += [name for name in found if name not in names]
    return names


def package_of(name: str) -> str:
    """A provider's package and its version."""
    stem = re.sub(r"(-tuned)?(-bf16|-int8)?$", "", name)
    package = {"fastbert": "fastbert-engine", "torch-compile": "torch"}.get(stem, stem)
    return f"{package} {version(package)}"


def padding_percent(name: str, ids: list[list[int]]) -> float:
    """The share of computed tokens that are padding, in a provider's batches."""
    if name in OWN or name.startswith("ctranslate2"):
        return 0.0
    size = peers.PEERS[name].kind.batch_size if name in peers.PEERS else peers.Padded.batch_size
    return round(100 * (1 - sum(map(len, ids)) / sum(mask.size for _, _, mask in peers.batches(ids, size))), 1)
