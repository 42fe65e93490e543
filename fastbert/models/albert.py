"""ALBERT (Lan et al. 2019, arXiv 1909.11942): small embeddings, and layers that share their weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from fastbert.models.activations import activation
from fastbert.models.config import EncoderConfig
from fastbert.models.encoder import (
    AddLayerNorm,
    Dropout,
    Embeddings,
    Encoded,
    EncoderModel,
    Layer,
    Layers,
    LayerStack,
    Pooler,
    Trace,
)
from fastbert.models.heads import (
    HeadModel,
    MaskedLM,
    MultipleChoice,
    QuestionAnswering,
    SequenceClassification,
    TokenClassification,
    vocabulary_loss,
)
from fastbert.models.outputs import ModelOutput
from fastbert.ops import cross_entropy
from fastbert.packing import PackedBatch
from fastbert.weights import NameTable, speak_hf_names


@dataclass(kw_only=True)
class AlbertConfig(EncoderConfig):
    """ALBERT-xxlarge unless told otherwise; base is 768 / 12 / 3072 (hidden, heads, feed-forward)."""

    model_type: ClassVar[str] = "albert"

    vocab_size: int = 30000
    embedding_size: int = 128
    hidden_size: int = 4096
    num_hidden_groups: int = 1
    num_attention_heads: int = 64
    intermediate_size: int = 16384
    inner_group_num: int = 1
    hidden_act: str = "gelu_new"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    type_vocab_size: int = 2
    classifier_dropout_prob: float = 0.1


_LAYER = "encoder.albert_layer_groups.{}.albert_layers.{}."

NAMES = NameTable(
    {
        _LAYER + "attention.qkv": (_LAYER + "attention.query", _LAYER + "attention.key", _LAYER + "attention.value"),
        _LAYER + "attention_LayerNorm": _LAYER + "attention.LayerNorm",
        _LAYER + "feed_forward.intermediate": _LAYER + "ffn",
        _LAYER + "feed_forward.output": _LAYER + "ffn_output",
        _LAYER + "output_LayerNorm": _LAYER + "full_layer_layer_norm",
        "pooler.dense": "pooler",
    }
)


class AlbertLayer(Layer):
    """BERT's layer without the dropout after the feed-forward network, which Hugging Face's ALBERT never applies."""

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__(config)
        self.output_LayerNorm.dropout_p = 0.0


class AlbertEncoder(LayerStack):
    """Embedding size to hidden size (sec. 3.1, factorised embeddings), then the groups, each many times over."""

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__()
        self.embedding_hidden_mapping_in = nn.Linear(config.embedding_size, config.hidden_size)
        self.albert_layer_groups = nn.ModuleList(
            nn.ModuleDict({"albert_layers": nn.ModuleList(AlbertLayer(config) for _ in range(config.inner_group_num))})
            for _ in range(config.num_hidden_groups)
        )
        per_group = config.num_hidden_layers / config.num_hidden_groups  # need not be whole
        self.group_of_layer = [int(i / per_group) for i in range(config.num_hidden_layers)]

    def forward(self, x: torch.Tensor, batch: PackedBatch, trace: Trace) -> torch.Tensor:
        """(T, E) -> (T, D)."""
        return self.run(self.layers(), self.embedding_hidden_mapping_in(x), batch, trace)

    def layers(self) -> Iterator[nn.Module]:
        """Layers in the order in which they run; shared ones come again."""
        for group in self.group_of_layer:
            yield from self.albert_layer_groups[group].get_submodule("albert_layers").children()


class AlbertModel(EncoderModel):
    """The encoder and its pooler."""

    config_class = AlbertConfig
    base_model_prefix = "albert"
    head_roots = ("pooler", "predictions", "sop_classifier", "classifier", "qa_outputs")

    def __init__(self, config: AlbertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config, config.embedding_size, config.type_vocab_size, config.pad_token_id, None)
        self.encoder = AlbertEncoder(config)
        self.pooler = Pooler(config) if add_pooling_layer else None
        self.init_weights()
        speak_hf_names(self, NAMES)


class AlbertMLMHead(nn.Module):
    """Vocabulary logits through the embedding size: the decoder follows the word embeddings."""

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.embedding_size)
        self.act = activation(config.hidden_act)
        self.LayerNorm = AddLayerNorm(config.embedding_size, config.layer_norm_eps)
        self.decoder = nn.Linear(config.embedding_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, V)."""
        return self.decoder(self.LayerNorm(self.act(self.dense(hidden))))


class AlbertSOPHead(nn.Module):
    """Are the two segments in order (sec. 3.1, inter-sentence coherence loss)? Label 0 = they are."""

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__()
        self.dropout = Dropout(config.classifier_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, 2)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """(S, D) -> (S, 2)."""
        return self.classifier(self.dropout(pooled))


TIED = {
    "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
    "predictions.decoder.bias": "predictions.bias",
}


class AlbertHead(HeadModel):
    """What ALBERT's heads share: their base model."""

    config_class = AlbertConfig
    base_model_prefix = "albert"
    head_roots = AlbertModel.head_roots
    albert: AlbertModel

    def pooled(self, encoded: Encoded) -> torch.Tensor:
        """(S, D) pooler output."""
        assert self.albert.pooler is not None
        return self.albert.pooler(encoded.hidden_TD, encoded.batch)


class AlbertForMaskedLM(AlbertHead, MaskedLM):
    """Masked language modelling."""

    tied_keys = TIED

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__(config, AlbertModel(config, add_pooling_layer=False))
        self.predictions = AlbertMLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.predictions.decoder

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.predictions(hidden)


@dataclass
class AlbertForPreTrainingOutput(ModelOutput):
    """`loss` scalar, `prediction_logits` (B, L, V), `sop_logits` (B, 2)."""

    loss: torch.Tensor | None = None
    prediction_logits: torch.Tensor | None = None
    sop_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    attentions: tuple[torch.Tensor | None, ...] | None = None


class AlbertForPreTraining(AlbertHead):
    """Both tasks of the paper: loss = masked LM + sentence order."""

    tied_keys = TIED

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__(config, AlbertModel(config))
        self.predictions = AlbertMLMHead(config)
        self.sop_classifier = AlbertSOPHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.predictions.decoder

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, V)."""
        return self.predictions(hidden)

    def pair_logits(self, encoded: Encoded) -> torch.Tensor:
        """(S, 2): the segments are in order, or swapped."""
        return self.sop_classifier(self.pooled(encoded))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        sentence_order_label: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: Layers | None = None,
        return_dict: bool | None = None,
        output_logits: bool | None = None,
    ) -> AlbertForPreTrainingOutput | tuple[Any, ...]:
        """As `AlbertForMaskedLM`, with `sentence_order_label` (B); the loss needs both labels."""
        encoded = self.albert.encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            output_attentions, output_hidden_states,
        )  # fmt: skip
        labels_T = None if labels is None or sentence_order_label is None else encoded.pack(labels)
        with_logits = (labels_T is None or not self.training) if output_logits is None else output_logits
        loss, logits = vocabulary_loss(self.logits, encoded.hidden_TD, labels_T, with_logits)
        order = self.pair_logits(encoded)
        if loss is not None and sentence_order_label is not None:
            loss = loss + cross_entropy(order, sentence_order_label.reshape(-1))
        unpacked = None if logits is None else encoded.unpack(logits)
        output = AlbertForPreTrainingOutput(loss, unpacked, order, encoded.hidden_states, encoded.attentions)
        return self.finish(output, return_dict)


class AlbertForSequenceClassification(AlbertHead, SequenceClassification):
    """A linear on the pooled [CLS]."""

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__(config, AlbertModel(config))
        self.dropout = Dropout(config.classifier_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def logits(self, encoded: Encoded) -> torch.Tensor:
        return self.classifier(self.dropout(self.pooled(encoded)))


class AlbertForTokenClassification(AlbertHead, TokenClassification):
    """A linear on every token."""

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__(config, AlbertModel(config, add_pooling_layer=False))
        self.dropout = Dropout(config.classifier_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def logits(self, encoded: Encoded) -> torch.Tensor:
        return self.classifier(self.dropout(encoded.hidden_TD))


class AlbertForQuestionAnswering(AlbertHead, QuestionAnswering):
    """Start and end scores for every token."""

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__(config, AlbertModel(config, add_pooling_layer=False))
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def logits(self, encoded: Encoded) -> torch.Tensor:
        return self.qa_outputs(encoded.hidden_TD)


class AlbertForMultipleChoice(AlbertHead, MultipleChoice):
    """One score for the pooled [CLS] of each choice."""

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__(config, AlbertModel(config))
        self.dropout = Dropout(config.classifier_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def logits(self, encoded: Encoded) -> torch.Tensor:
        return self.classifier(self.dropout(self.pooled(encoded)))
