"""ELECTRA (Clark et al. 2020, arXiv 2003.10555): BERT's encoder, trained to tell replaced tokens from original ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from fastbert.models.activations import activation
from fastbert.models.bert import NAMES, classifier_dropout
from fastbert.models.config import EncoderConfig
from fastbert.models.encoder import (
    AddLayerNorm,
    Dropout,
    Embeddings,
    Encoded,
    Encoder,
    EncoderModel,
    Layers,
)
from fastbert.models.heads import (
    ClassificationHead,
    HeadModel,
    MaskedLM,
    MultipleChoice,
    QuestionAnswering,
    SequenceClassification,
    TokenClassification,
)
from fastbert.models.outputs import BaseModelOutput, ModelOutput
from fastbert.ops import gelu, pool
from fastbert.packing import PackedBatch
from fastbert.weights import nearest, speak_hf_names

# `summary_type` -> mode of `pool`; without a given index, "cls_index" is the last token.
SUMMARIES = {"first": "cls", "last": "lasttoken", "mean": "mean", "cls_index": "lasttoken"}


@dataclass(kw_only=True)
class ElectraConfig(EncoderConfig):
    """ELECTRA-small's discriminator unless told otherwise. The `summary_*` fields are multiple choice's alone."""

    model_type: ClassVar[str] = "electra"

    embedding_size: int = 128
    hidden_size: int = 256
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    type_vocab_size: int = 2
    classifier_dropout: float | None = None
    summary_type: str = "first"
    summary_use_proj: bool = True
    summary_activation: str = "gelu"
    summary_first_dropout: float = 0.0
    summary_last_dropout: float = 0.1

    def validate(self) -> None:
        super().validate()
        if self.summary_type not in SUMMARIES:
            raise ValueError(
                f"summary_type is {self.summary_type!r}{nearest(self.summary_type, SUMMARIES)}; "
                f"it must be one of {', '.join(SUMMARIES)}"
            )
        activation(self.summary_activation or "linear")


class ElectraModel(EncoderModel):
    """Generator or discriminator: an encoder whose embeddings may be narrower than its layers (sec. 3.2)."""

    config_class = ElectraConfig
    base_model_prefix = "electra"
    head_roots = (
        "discriminator_predictions", "generator_predictions", "generator_lm_head", "sequence_summary",
        "classifier", "qa_outputs",
    )  # fmt: skip

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__(config)
        E, D = config.embedding_size, config.hidden_size
        self.embeddings = Embeddings(config, E, config.type_vocab_size, config.pad_token_id, None)
        self.embeddings_project = nn.Linear(E, D) if E != D else nn.Identity()
        self.encoder = Encoder(config)
        self.pooler = None
        self.init_weights()
        speak_hf_names(self, NAMES)

    def embed(self, batch: PackedBatch, inputs_embeds: torch.Tensor | None = None) -> torch.Tensor:
        """See `EncoderModel.embed`; the first hidden state is the projected one."""
        return self.embeddings_project(super().embed(batch, inputs_embeds))

    def output(self, encoded: Encoded) -> BaseModelOutput:
        """Without a pooler."""
        return BaseModelOutput(encoded.unpack(encoded.hidden_TD), encoded.hidden_states, encoded.attentions)


class DiscriminatorPredictions(nn.Module):
    """One score a token: is it replaced?"""

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dense_prediction = nn.Linear(config.hidden_size, 1)
        self.act = activation(config.hidden_act)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N)."""
        return self.dense_prediction(self.act(self.dense(hidden))).squeeze(-1)


class GeneratorPredictions(nn.Module):
    """LN(gelu(dense h)): back to the embeddings' size; gelu is the erf form whatever `hidden_act` says."""

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.embedding_size)
        self.LayerNorm = AddLayerNorm(config.embedding_size, config.layer_norm_eps)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, E)."""
        return self.LayerNorm(gelu(self.dense(hidden)))


class SequenceSummary(nn.Module):
    """One vector a sequence, as the `summary_*` fields say. Only real tokens count, whatever the padding."""

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.mode = SUMMARIES[config.summary_type]
        self.summary = nn.Linear(D, D) if config.summary_use_proj else nn.Identity()
        self.act = activation(config.summary_activation or "linear")
        self.first_dropout = Dropout(config.summary_first_dropout)
        self.last_dropout = Dropout(config.summary_last_dropout)

    def forward(self, encoded: Encoded) -> torch.Tensor:
        """(S, D)."""
        x = self.first_dropout(pool(encoded.hidden_TD, encoded.batch.cu_seqlens, self.mode))
        return self.last_dropout(self.act(self.summary(x)))


class ElectraHead(HeadModel):
    """What ELECTRA's heads share: their base model."""

    config_class = ElectraConfig
    base_model_prefix = "electra"
    head_roots = ElectraModel.head_roots
    electra: ElectraModel


@dataclass
class ElectraForPreTrainingOutput(ModelOutput):
    """`loss` scalar, `logits` (B, L): above 0 = replaced; zeros at padding."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    attentions: tuple[torch.Tensor | None, ...] | None = None


class ElectraForPreTraining(ElectraHead):
    """The discriminator: replaced-token detection (sec. 2)."""

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__(config, ElectraModel(config))
        self.discriminator_predictions = DiscriminatorPredictions(config)
        self.post_init()

    def logits(self, encoded: Encoded) -> torch.Tensor:
        """(T): above 0 = replaced."""
        return self.discriminator_predictions(encoded.hidden_TD)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: Layers | None = None,
        return_dict: bool | None = None,
    ) -> ElectraForPreTrainingOutput | tuple[Any, ...]:
        """As the base model, with `labels` (B, L): 1 = replaced. The loss is the mean over kept tokens."""
        encoded = self.electra.encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            output_attentions, output_hidden_states,
        )  # fmt: skip
        logits = self.logits(encoded)
        loss = None
        if labels is not None:
            scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = F.binary_cross_entropy_with_logits(scores, encoded.pack(labels).to(scores.dtype))
        output = ElectraForPreTrainingOutput(loss, encoded.unpack(logits), encoded.hidden_states, encoded.attentions)
        return self.finish(output, return_dict)


class ElectraForMaskedLM(ElectraHead, MaskedLM):
    """The generator: masked language modelling."""

    tied_keys: ClassVar[dict[str, str]] = {"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"}

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__(config, ElectraModel(config))
        self.generator_predictions = GeneratorPredictions(config)
        self.generator_lm_head = nn.Linear(config.embedding_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.generator_lm_head

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.generator_lm_head(self.generator_predictions(hidden))


class ElectraForSequenceClassification(ElectraHead, SequenceClassification):
    """Two linears with gelu between on the first token."""

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__(config, ElectraModel(config))
        self.classifier = ClassificationHead(config, gelu, classifier_dropout(config))
        self.post_init()

    def logits(self, encoded: Encoded) -> torch.Tensor:
        return self.classifier(encoded.first_token)


class ElectraForTokenClassification(ElectraHead, TokenClassification):
    """A linear on every token."""

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__(config, ElectraModel(config))
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def logits(self, encoded: Encoded) -> torch.Tensor:
        return self.classifier(self.dropout(encoded.hidden_TD))


class ElectraForQuestionAnswering(ElectraHead, QuestionAnswering):
    """Start and end scores for every token."""

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__(config, ElectraModel(config))
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def logits(self, encoded: Encoded) -> torch.Tensor:
        return self.qa_outputs(encoded.hidden_TD)


class ElectraForMultipleChoice(ElectraHead, MultipleChoice):
    """One score for the summary of each choice."""

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__(config, ElectraModel(config))
        self.sequence_summary = SequenceSummary(config)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def logits(self, encoded: Encoded) -> torch.Tensor:
        return self.classifier(self.sequence_summary(encoded))
