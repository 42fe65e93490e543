"""BERT (Devlin et al. 2018, arXiv 1810.04805)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from fastbert.models.activations import activation
from fastbert.models.config import EncoderConfig
from fastbert.models.encoder import AddLayerNorm, Dropout, Embeddings, Encoded, Encoder, EncoderModel, Layers, Pooler
from fastbert.models.heads import (
    HeadModel,
    MaskedLM,
    MultipleChoice,
    NextSentencePrediction,
    QuestionAnswering,
    SequenceClassification,
    TokenClassification,
    vocabulary_loss,
)
from fastbert.models.outputs import ModelOutput
from fastbert.ops import cross_entropy
from fastbert.weights import NameTable, speak_hf_names


@dataclass(kw_only=True)
class BertConfig(EncoderConfig):
    """BERT-base unless told otherwise; large is 1024 / 24 / 16 / 4096."""

    model_type: ClassVar[str] = "bert"

    type_vocab_size: int = 2
    classifier_dropout: float | None = None


NAMES = NameTable(
    {
        "encoder.layer.{}.attention.qkv": (
            "encoder.layer.{}.attention.self.query",
            "encoder.layer.{}.attention.self.key",
            "encoder.layer.{}.attention.self.value",
        ),
        "encoder.layer.{}.attention.dense": "encoder.layer.{}.attention.output.dense",
        "encoder.layer.{}.attention_LayerNorm": "encoder.layer.{}.attention.output.LayerNorm",
        "encoder.layer.{}.feed_forward.intermediate": "encoder.layer.{}.intermediate.dense",
        "encoder.layer.{}.feed_forward.output": "encoder.layer.{}.output.dense",
        "encoder.layer.{}.output_LayerNorm": "encoder.layer.{}.output.LayerNorm",
    }
)


class BertModel(EncoderModel):
    """The encoder and its pooler."""

    config_class = BertConfig
    base_model_prefix = "bert"
    head_roots = ("pooler", "cls", "classifier", "qa_outputs")

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config, config.hidden_size, config.type_vocab_size, config.pad_token_id, None)
        self.encoder = Encoder(config)
        self.pooler = Pooler(config) if add_pooling_layer else None
        self.init_weights()
        speak_hf_names(self, NAMES)


class PredictionTransform(nn.Module):
    """LN(act(W h + b)): the masked-LM head before the vocabulary."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act = activation(config.hidden_act)
        self.LayerNorm = AddLayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, D)."""
        return self.LayerNorm(self.act(self.dense(hidden)))


class LMPredictionHead(nn.Module):
    """Vocabulary logits; the decoder follows the word embeddings (`tied_keys` of the models)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.transform = PredictionTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, V)."""
        return self.decoder(self.transform(hidden))


class PreTrainingHeads(nn.Module):
    """What Hugging Face calls `cls`: the masked-LM head, the next-sentence head, or both."""

    def __init__(self, config: Any, predictions: bool = True, seq_relationship: bool = True) -> None:
        super().__init__()
        if predictions:
            self.predictions = LMPredictionHead(config)
        if seq_relationship:
            self.seq_relationship = nn.Linear(config.hidden_size, 2)


TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}


def classifier_dropout(config: Any) -> Dropout:
    """Dropout before a classifier: `classifier_dropout`, or the hidden states' where that is None."""
    return Dropout(config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout)


class BertHead(HeadModel):
    """What BERT's heads share: their base model."""

    config_class = BertConfig
    base_model_prefix = "bert"
    head_roots = BertModel.head_roots
    bert: BertModel

    def pooled(self, encoded: Encoded) -> torch.Tensor:
        """(S, D) pooler output."""
        assert self.bert.pooler is not None
        return self.bert.pooler(encoded.hidden_TD, encoded.batch)


class BertForMaskedLM(BertHead, MaskedLM):
    """Masked language modelling (sec. 3.1, task 1)."""

    tied_keys = TIED

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, BertModel(config, add_pooling_layer=False))
        self.cls = PreTrainingHeads(config, seq_relationship=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.cls.predictions.decoder

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.cls.predictions(hidden)


class BertForNextSentencePrediction(BertHead, NextSentencePrediction):
    """Next-sentence prediction (sec. 3.1, task 2)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, BertModel(config))
        self.cls = PreTrainingHeads(config, predictions=False)
        self.post_init()

    def logits(self, encoded: Encoded) -> torch.Tensor:
        return self.cls.seq_relationship(self.pooled(encoded))


@dataclass
class BertForPreTrainingOutput(ModelOutput):
    """`loss` scalar, `prediction_logits` (B, L, V), `seq_relationship_logits` (B, 2)."""

    loss: torch.Tensor | None = None
    prediction_logits: torch.Tensor | None = None
    seq_relationship_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    attentions: tuple[torch.Tensor | None, ...] | None = None


class BertForPreTraining(BertHead):
    """Both tasks of the paper: loss = masked LM + next sentence."""

    tied_keys = TIED

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, BertModel(config))
        self.cls = PreTrainingHeads(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.cls.predictions.decoder

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, V)."""
        return self.cls.predictions(hidden)

    def pair_logits(self, encoded: Encoded) -> torch.Tensor:
        """(S, 2): the second segment follows, or is a random one."""
        return self.cls.seq_relationship(self.pooled(encoded))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        next_sentence_label: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: Layers | None = None,
        return_dict: bool | None = None,
        output_logits: bool | None = None,
    ) -> BertForPreTrainingOutput | tuple[Any, ...]:
        """As `BertForMaskedLM`, with `next_sentence_label` (B); the loss needs both labels."""
        encoded = self.bert.encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            output_attentions, output_hidden_states,
        )  # fmt: skip
        both = labels is not None and next_sentence_label is not None
        with_logits = not (both and self.training) if output_logits is None else output_logits
        labels_T = encoded.pack(labels) if both and labels is not None else None
        mlm_loss, logits = vocabulary_loss(self.logits, encoded.hidden_TD, labels_T, with_logits)
        relationship = self.pair_logits(encoded)
        loss = None
        if mlm_loss is not None and next_sentence_label is not None:
            loss = mlm_loss + cross_entropy(relationship, next_sentence_label.reshape(-1))
        output = BertForPreTrainingOutput(
            loss,
            None if logits is None else encoded.unpack(logits),
            relationship,
            encoded.hidden_states,
            encoded.attentions,
        )
        return self.finish(output, return_dict)


class BertForSequenceClassification(BertHead, SequenceClassification):
    """A linear on the pooled [CLS] (fig. 4 a, b)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, BertModel(config))
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def logits(self, encoded: Encoded) -> torch.Tensor:
        return self.classifier(self.dropout(self.pooled(encoded)))


class BertForTokenClassification(BertHead, TokenClassification):
    """A linear on every token (fig. 4 d)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, BertModel(config, add_pooling_layer=False))
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def logits(self, encoded: Encoded) -> torch.Tensor:
        return self.classifier(self.dropout(encoded.hidden_TD))


class BertForQuestionAnswering(BertHead, QuestionAnswering):
    """Start and end scores for every token (fig. 4 c)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, BertModel(config, add_pooling_layer=False))
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def logits(self, encoded: Encoded) -> torch.Tensor:
        return self.qa_outputs(encoded.hidden_TD)


class BertForMultipleChoice(BertHead, MultipleChoice):
    """One score for the pooled [CLS] of each choice (sec. 4.4)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, BertModel(config))
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def logits(self, encoded: Encoded) -> torch.Tensor:
        return self.classifier(self.dropout(self.pooled(encoded)))
