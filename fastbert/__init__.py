"""fastbert: BERT-class encoders on packed batches, without padding."""

from fastbert.models import BertConfig, BertModel
from fastbert.ops import use_backend
from fastbert.packing import PackedBatch, pack, pack_padded

__version__ = "0.1.0"

__all__ = ["BertConfig", "BertModel", "PackedBatch", "pack", "pack_padded", "use_backend"]
