"""The model families, one file each."""

from fastbert.models.bert import BertConfig, BertModel

__all__ = ["BertConfig", "BertModel"]
