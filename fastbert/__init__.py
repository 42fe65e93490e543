"""fastbert: BERT-class encoders on packed batches, without padding.

Names are imported on first use, so that `import fastbert` and the command line start without loading torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastbert.embedder import Embedder
    from fastbert.engine import release_weights, use_engine
    from fastbert.models import *  # noqa: F403
    from fastbert.ops import use_backend
    from fastbert.packing import PackedBatch, pack, pack_padded
    from fastbert.swap import FastbertFallbackWarning, accelerate, accelerated, restore
    from fastbert.train.finetune import finetune
    from fastbert.train.pretrain import pretrain

__version__ = "0.1.0"

# Where each name lives; what is not listed is looked for in fastbert.models, the families and heads.
_HOMES = {
    "Embedder": "embedder",
    "FastbertFallbackWarning": "swap",
    "PackedBatch": "packing",
    "accelerate": "swap",
    "accelerated": "swap",
    "finetune": "train.finetune",
    "pack": "packing",
    "pack_padded": "packing",
    "pretrain": "train.pretrain",
    "release_weights": "engine",
    "restore": "swap",
    "use_backend": "ops",
    "use_engine": "engine",
}

__all__ = [
    "Embedder",
    "FastbertFallbackWarning",
    "PackedBatch",
    "accelerate",
    "accelerated",
    "finetune",
    "pack",
    "pack_padded",
    "pretrain",
    "release_weights",
    "restore",
    "use_backend",
    "use_engine",
]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(import_module(f"fastbert.{_HOMES.get(name, 'models')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, *import_module("fastbert.models").__all__])
