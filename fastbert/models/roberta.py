"""RoBERTa (Liu et al. 2019, arXiv 1907.11692): BERT with positions counted from the padding id and other heads.

XLM-RoBERTa (Conneau et al. 2019, arXiv 1911.02116) and CamemBERT (Martin et al. 2019, arXiv 1911.03894) are the same
architecture on other texts: their classes differ in `model_type` and default vocabulary only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from fastbert.models.bert import NAMES, classifier_dropout
from fastbert.models.config import EncoderConfig
from fastbert.models.encoder import AddLayerNorm, Dropout, Embeddings, Encoded, Encoder, EncoderModel, Pooler
from fastbert.models.heads import (
    ClassificationHead,
    HeadModel,
    MaskedLM,
    MultipleChoice,
    QuestionAnswering,
    SequenceClassification,
    TokenClassification,
)
from fastbert.models.outputs import MultipleChoiceModelOutput
from fastbert.ops import gelu
from fastbert.weights import speak_hf_names


@dataclass(kw_only=True)
class RobertaConfig(EncoderConfig):
    """The class's defaults; published checkpoints have 514 positions, 1 segment type and a layer-norm eps of 1e-5."""

    model_type: ClassVar[str] = "roberta"

    vocab_size: int = 50265
    type_vocab_size: int = 2
    pad_token_id: int | None = 1
    classifier_dropout: float | None = None

    def validate(self) -> None:
        super().validate()
        if self.pad_token_id is None:
            raise ValueError("pad_token_id is None, but this family counts positions from pad_token_id + 1")


class RobertaModel(EncoderModel):
    """The encoder and its pooler."""

    config_class = RobertaConfig
    base_model_prefix = "roberta"
    head_roots = ("pooler", "lm_head", "classifier", "qa_outputs")

    def __init__(self, config: RobertaConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        pad = config.pad_token_id
        assert pad is not None
        self.position_offset = pad + 1
        self.embeddings = Embeddings(config, config.hidden_size, config.type_vocab_size, pad, pad)
        self.encoder = Encoder(config)
        self.pooler = Pooler(config) if add_pooling_layer else None
        self.init_weights()
        speak_hf_names(self, NAMES)


class LMHead(nn.Module):
    """W LN(gelu(dense h)) + b; gelu is the erf form whatever `hidden_act` says."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = AddLayerNorm(config.hidden_size, config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, V)."""
        return self.decoder(self.layer_norm(gelu(self.dense(hidden))))


class RobertaHead(HeadModel):
    """What RoBERTa's heads share: their base model."""

    config_class = RobertaConfig
    base_model_prefix = "roberta"
    head_roots = RobertaModel.head_roots
    roberta: RobertaModel


class RobertaForMaskedLM(RobertaHead, MaskedLM):
    """Masked language modelling, the only pretraining task (sec. 4)."""

    tied_keys: ClassVar[dict[str, str]] = {
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    }

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config, RobertaModel(config, add_pooling_layer=False))
        self.lm_head = LMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head.decoder

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden)


class RobertaForSequenceClassification(RobertaHead, SequenceClassification):
    """Two linears with tanh between on the first token; not BERT's pretrained pooler."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config, RobertaModel(config, add_pooling_layer=False))
        self.classifier = ClassificationHead(config, torch.tanh, classifier_dropout(config))
        self.post_init()

    def logits(self, encoded: Encoded) -> torch.Tensor:
        return self.classifier(encoded.first_token)


class RobertaForTokenClassification(RobertaHead, TokenClassification):
    """A linear on every token."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config, RobertaModel(config, add_pooling_layer=False))
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def logits(self, encoded: Encoded) -> torch.Tensor:
        return self.classifier(self.dropout(encoded.hidden_TD))


class RobertaForQuestionAnswering(RobertaHead, QuestionAnswering):
    """Start and end scores for every token."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config, RobertaModel(config, add_pooling_layer=False))
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def logits(self, encoded: Encoded) -> torch.Tensor:
        return self.qa_outputs(encoded.hidden_TD)


class RobertaForMultipleChoice(RobertaHead, MultipleChoice):
    """One score for the pooled first token of each choice; `classifier_dropout` does not count here."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config, RobertaModel(config))
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(  # type: ignore[override]  # Hugging Face orders the arguments of this one class differently
        self,
        input_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **options: Any,
    ) -> MultipleChoiceModelOutput | tuple[Any, ...]:
        """As `MultipleChoice.forward`, with Hugging Face's order of arguments for this class."""
        return super().forward(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, labels, **options
        )

    def logits(self, encoded: Encoded) -> torch.Tensor:
        assert self.roberta.pooler is not None
        return self.classifier(self.dropout(self.roberta.pooler(encoded.hidden_TD, encoded.batch)))


@dataclass(kw_only=True)
class XLMRobertaConfig(RobertaConfig):
    """XLM-RoBERTa; published checkpoints have a vocabulary of 250002."""

    model_type: ClassVar[str] = "xlm-roberta"

    vocab_size: int = 30522


class XLMRobertaModel(RobertaModel):
    """See `RobertaModel`."""

    config_class = XLMRobertaConfig


class XLMRobertaForMaskedLM(RobertaForMaskedLM):
    """See `RobertaForMaskedLM`."""

    config_class = XLMRobertaConfig


class XLMRobertaForSequenceClassification(RobertaForSequenceClassification):
    """See `RobertaForSequenceClassification`."""

    config_class = XLMRobertaConfig


class XLMRobertaForTokenClassification(RobertaForTokenClassification):
    """See `RobertaForTokenClassification`."""

    config_class = XLMRobertaConfig


class XLMRobertaForQuestionAnswering(RobertaForQuestionAnswering):
    """See `RobertaForQuestionAnswering`."""

    config_class = XLMRobertaConfig


class XLMRobertaForMultipleChoice(RobertaForMultipleChoice):
    """See `RobertaForMultipleChoice`."""

    config_class = XLMRobertaConfig


@dataclass(kw_only=True)
class CamembertConfig(RobertaConfig):
    """CamemBERT; published checkpoints have a vocabulary of 32005."""

    model_type: ClassVar[str] = "camembert"

    vocab_size: int = 30522


class CamembertModel(RobertaModel):
    """See `RobertaModel`."""

    config_class = CamembertConfig


class CamembertForMaskedLM(RobertaForMaskedLM):
    """See `RobertaForMaskedLM`."""

    config_class = CamembertConfig


class CamembertForSequenceClassification(RobertaForSequenceClassification):
    """See `RobertaForSequenceClassification`."""

    config_class = CamembertConfig


class CamembertForTokenClassification(RobertaForTokenClassification):
    """See `RobertaForTokenClassification`."""

    config_class = CamembertConfig


class CamembertForQuestionAnswering(RobertaForQuestionAnswering):
    """See `RobertaForQuestionAnswering`."""

    config_class = CamembertConfig


class CamembertForMultipleChoice(RobertaForMultipleChoice):
    """See `RobertaForMultipleChoice`."""

    config_class = CamembertConfig
