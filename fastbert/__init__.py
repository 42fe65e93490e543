"""fastbert: BERT-class encoders on packed batches, without padding."""

from fastbert import models
from fastbert.models import *  # noqa: F403  (models.__all__ is the list of families and heads)
from fastbert.ops import use_backend
from fastbert.packing import PackedBatch, pack, pack_padded

__version__ = "0.1.0"

__all__ = [*models.__all__, "PackedBatch", "pack", "pack_padded", "use_backend"]
