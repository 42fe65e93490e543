"""MPNet (Song et al. 2020, arXiv 2004.09297): RoBERTa's encoder with a bias for relative positions, as T5 has it.

The bias counts tokens between query and key. Where padding lies between them Hugging Face counts it too, which packed
sequences cannot know: such masks are refused. Padding on the left or right is not between tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from fastbert.models.config import EncoderConfig
from fastbert.models.encoder import Dropout, Embeddings, Encoded, Encoder, EncoderModel, Pooler, Trace
from fastbert.models.heads import (
    ClassificationHead,
    HeadModel,
    MaskedLM,
    MultipleChoice,
    QuestionAnswering,
    SequenceClassification,
    TokenClassification,
)
from fastbert.models.roberta import LMHead
from fastbert.packing import PackedBatch
from fastbert.weights import NameTable, speak_hf_names

PADDING_IDX = 1  # fixed, whatever `pad_token_id` says
NUM_BUCKETS = 32  # fixed, whatever `relative_attention_num_buckets` says: that only sizes the table
MAX_DISTANCE = 128


@dataclass(kw_only=True)
class MPNetConfig(EncoderConfig):
    """MPNet-base unless told otherwise; its checkpoints have 514 positions and an eps of 1e-5."""

    model_type: ClassVar[str] = "mpnet"

    vocab_size: int = 30527
    relative_attention_num_buckets: int = 32
    pad_token_id: int | None = 1

    def validate(self) -> None:
        super().validate()
        if self.relative_attention_num_buckets < NUM_BUCKETS:
            raise ValueError(
                f"relative_attention_num_buckets is {self.relative_attention_num_buckets}, but MPNet sorts offsets "
                f"into {NUM_BUCKETS} buckets whatever the configuration says: the table needs at least as many rows"
            )


NAMES = NameTable(
    {
        "encoder.layer.{}.attention.qkv": (
            "encoder.layer.{}.attention.attn.q",
            "encoder.layer.{}.attention.attn.k",
            "encoder.layer.{}.attention.attn.v",
        ),
        "encoder.layer.{}.attention.dense": "encoder.layer.{}.attention.attn.o",
        "encoder.layer.{}.attention_LayerNorm": "encoder.layer.{}.attention.LayerNorm",
        "encoder.layer.{}.feed_forward.intermediate": "encoder.layer.{}.intermediate.dense",
        "encoder.layer.{}.feed_forward.output": "encoder.layer.{}.output.dense",
        "encoder.layer.{}.output_LayerNorm": "encoder.layer.{}.output.LayerNorm",
    }
)


def relative_buckets(device: torch.device) -> torch.Tensor:
    """(2 * MAX_DISTANCE - 1) int64: the bucket of each offset key - query, from -(MAX_DISTANCE - 1) up.

    Half of the buckets for keys behind the query, half for keys ahead; in each half the first ones hold one distance,
    the others logarithmically more (Raffel et al. 2019, arXiv 1910.10683, sec. 2.1). Larger offsets share the last one.
    """
    offset = torch.arange(1 - MAX_DISTANCE, MAX_DISTANCE, device=device)
    half, exact, distance = NUM_BUCKETS // 2, NUM_BUCKETS // 4, offset.abs()
    # In fp32 for every model, as the table was trained: another precision could move a boundary.
    log = torch.log(distance.float() / exact) / math.log(MAX_DISTANCE / exact) * (half - exact)
    far = (exact + log.clamp(min=0).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (offset > 0)


class MPNetEncoder(Encoder):
    """The stack of layers, and the bias that all of them share."""

    def __init__(self, config: MPNetConfig) -> None:
        super().__init__(config)
        self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_attention_heads)

    def forward(self, x: torch.Tensor, batch: PackedBatch, trace: Trace) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        table = self.relative_attention_bias.weight
        rel_bias = F.embedding(relative_buckets(table.device), table).mT  # (H, 2 * MAX_DISTANCE - 1)
        return self.run(self.layer, x, batch, trace, rel_bias)


class MPNetModel(EncoderModel):
    """The encoder and its pooler."""

    config_class = MPNetConfig
    base_model_prefix = "mpnet"
    head_roots = ("pooler", "lm_head", "classifier", "qa_outputs")
    position_offset = PADDING_IDX + 1

    def __init__(self, config: MPNetConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config, config.hidden_size, 0, PADDING_IDX, PADDING_IDX)
        self.encoder = MPNetEncoder(config)
        self.pooler = Pooler(config) if add_pooling_layer else None
        self.init_weights()
        speak_hf_names(self, NAMES)

    def encode(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        **options: Any,
    ) -> Encoded:
        """See `EncoderModel.encode`.

        Raises:
            ValueError: also for a mask with padding between the tokens of a row.
        """
        encoded = super().encode(input_ids, attention_mask, *args, **options)
        if attention_mask is not None and encoded.padding is not None:
            index, row = encoded.padding.indices, encoded.padding.indices // max(encoded.padding.shape[1], 1)
            if bool(((index.diff() > 1) & (row.diff() == 0)).any()):
                raise ValueError(
                    "attention_mask drops tokens between others of a row: Hugging Face's MPNet counts them in its "
                    "relative positions, packed sequences do not hold them. Move the padding to the left or right."
                )
        return encoded

    def forward(  # type: ignore[override]  # Hugging Face orders this family's arguments differently
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        *rest: Any,
        token_type_ids: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        """As `EncoderModel.forward`, in this family's order; `token_type_ids` are accepted and mean nothing."""
        return super().forward(input_ids, attention_mask, None, position_ids, inputs_embeds, *rest, **options)


class MPNetHead(HeadModel):
    """What MPNet's heads share: their base model, and the order of arguments."""

    config_class = MPNetConfig
    base_model_prefix = "mpnet"
    head_roots = MPNetModel.head_roots
    mpnet: MPNetModel

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        token_type_ids: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        """As the task's `forward`, in this family's order; `token_type_ids` are accepted and mean nothing."""
        return super().forward(input_ids, attention_mask, None, position_ids, inputs_embeds, labels, **options)


class MPNetForMaskedLM(MPNetHead, MaskedLM):  # type: ignore[misc]
    """The vocabulary head of masked and permuted pre-training."""

    tied_keys: ClassVar[dict[str, str]] = {
        "lm_head.decoder.weight": "mpnet.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    }

    def __init__(self, config: MPNetConfig) -> None:
        super().__init__(config, MPNetModel(config, add_pooling_layer=False))
        self.lm_head = LMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head.decoder

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden)


class MPNetForSequenceClassification(MPNetHead, SequenceClassification):  # type: ignore[misc]
    """Two linears on the first token."""

    def __init__(self, config: MPNetConfig) -> None:
        super().__init__(config, MPNetModel(config, add_pooling_layer=False))
        self.classifier = ClassificationHead(config, torch.tanh, Dropout(config.hidden_dropout_prob))
        self.post_init()

    def logits(self, encoded: Encoded) -> torch.Tensor:
        return self.classifier(encoded.first_token)


class MPNetForTokenClassification(MPNetHead, TokenClassification):  # type: ignore[misc]
    """A linear on every token."""

    def __init__(self, config: MPNetConfig) -> None:
        super().__init__(config, MPNetModel(config, add_pooling_layer=False))
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def logits(self, encoded: Encoded) -> torch.Tensor:
        return self.classifier(self.dropout(encoded.hidden_TD))


class MPNetForQuestionAnswering(MPNetHead, QuestionAnswering):
    """Start and end scores for every token."""

    def __init__(self, config: MPNetConfig) -> None:
        super().__init__(config, MPNetModel(config, add_pooling_layer=False))
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        *,
        token_type_ids: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        """As `QuestionAnswering.forward`, in this family's order."""
        return QuestionAnswering.forward(
            self,
            input_ids,
            attention_mask,
            None,
            position_ids,
            inputs_embeds,
            start_positions,
            end_positions,
            **options,
        )

    def logits(self, encoded: Encoded) -> torch.Tensor:
        return self.qa_outputs(encoded.hidden_TD)


class MPNetForMultipleChoice(MPNetHead, MultipleChoice):  # type: ignore[misc]
    """One score for the pooled first token of each choice."""

    def __init__(self, config: MPNetConfig) -> None:
        super().__init__(config, MPNetModel(config))
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def logits(self, encoded: Encoded) -> torch.Tensor:
        assert self.mpnet.pooler is not None
        return self.classifier(self.dropout(self.mpnet.pooler(encoded.hidden_TD, encoded.batch)))
