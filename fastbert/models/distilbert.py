"""DistilBERT (Sanh et al. 2019, arXiv 1910.01108): half of BERT's layers, without segments and without a pooler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from fastbert.models.activations import activation
from fastbert.models.config import Config
from fastbert.models.encoder import AddLayerNorm, Dropout, Embeddings, Encoded, Encoder, EncoderModel, Layer, Layers
from fastbert.models.heads import (
    HeadModel,
    MaskedLM,
    MultipleChoice,
    QuestionAnswering,
    SequenceClassification,
    TokenClassification,
)
from fastbert.models.outputs import BaseModelOutput, QuestionAnsweringModelOutput
from fastbert.models.pretrained import PreTrainedModel
from fastbert.weights import NameTable, speak_hf_names

Tensor = torch.Tensor


@dataclass(kw_only=True)
class DistilBertConfig(Config):
    """DistilBERT-base unless told otherwise. The properties give its fields the names that the layers read."""

    model_type: ClassVar[str] = "distilbert"

    vocab_size: int = 30522
    max_position_embeddings: int = 512
    sinusoidal_pos_embds: bool = False
    n_layers: int = 6
    n_heads: int = 12
    dim: int = 768
    hidden_dim: int = 3072
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation: str = "gelu"
    initializer_range: float = 0.02
    qa_dropout: float = 0.1
    seq_classif_dropout: float = 0.2
    pad_token_id: int | None = 0

    layer_norm_eps: ClassVar[float] = 1e-12

    @property
    def num_hidden_layers(self) -> int:
        """`n_layers`."""
        return self.n_layers

    @property
    def num_attention_heads(self) -> int:
        """`n_heads`."""
        return self.n_heads

    @property
    def hidden_size(self) -> int:
        """`dim`."""
        return self.dim

    @property
    def intermediate_size(self) -> int:
        """`hidden_dim`."""
        return self.hidden_dim

    @property
    def hidden_act(self) -> str:
        """`activation`."""
        return self.activation

    @property
    def hidden_dropout_prob(self) -> float:
        """`dropout`."""
        return self.dropout

    @property
    def attention_probs_dropout_prob(self) -> float:
        """`attention_dropout`."""
        return self.attention_dropout

    def validate(self) -> None:
        super().validate()
        activation(self.activation)
        if self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}")


NAMES = NameTable(
    {
        "encoder.layer.{}.attention.qkv": (
            "transformer.layer.{}.attention.q_lin",
            "transformer.layer.{}.attention.k_lin",
            "transformer.layer.{}.attention.v_lin",
        ),
        "encoder.layer.{}.attention.dense": "transformer.layer.{}.attention.out_lin",
        "encoder.layer.{}.attention_LayerNorm": "transformer.layer.{}.sa_layer_norm",
        "encoder.layer.{}.feed_forward.intermediate": "transformer.layer.{}.ffn.lin1",
        "encoder.layer.{}.feed_forward.output": "transformer.layer.{}.ffn.lin2",
        "encoder.layer.{}.output_LayerNorm": "transformer.layer.{}.output_layer_norm",
    }
)


class DistilBertPreTrainedModel(PreTrainedModel):
    """What the base model and the heads share: how a sinusoidal position table starts out."""

    config_class = DistilBertConfig
    base_model_prefix = "distilbert"
    head_roots = (
        "vocab_transform", "vocab_layer_norm", "vocab_projector", "pre_classifier", "classifier", "qa_outputs",
    )  # fmt: skip

    @torch.no_grad()
    def init_parameter(self, name: str, parameter: Tensor) -> None:
        """As usual, but a sinusoidal table of positions starts out as one."""
        super().init_parameter(name, parameter)
        if self.config.sinusoidal_pos_embds and name.endswith("position_embeddings.weight"):
            parameter.copy_(sinusoids(*parameter.shape))


def sinusoids(num_positions: int, size: int) -> Tensor:
    """(P, D): sin and cos of position / 10000^(2i / D) in columns 2i and 2i + 1 (arXiv 1706.03762, sec. 3.5)."""
    frequency = 10000 ** -(torch.arange(size, dtype=torch.float64) // 2 * 2 / size)
    angle = torch.arange(num_positions, dtype=torch.float64)[:, None] * frequency
    return torch.where(torch.arange(size) % 2 == 0, angle.sin(), angle.cos())


class DistilBertModel(DistilBertPreTrainedModel, EncoderModel):
    """The encoder. `token_type_ids` are accepted and mean nothing."""

    def __init__(self, config: DistilBertConfig) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config, config.dim, 0, config.pad_token_id, None)
        encoder = Encoder(config)
        for layer in encoder.layer:
            assert isinstance(layer, Layer)
            layer.attention_LayerNorm.dropout_p = 0.0  # unlike BERT, nothing is dropped between out_lin and the sum
        self.encoder = encoder
        self.pooler = None
        self.init_weights()
        speak_hf_names(self, NAMES)

    def get_position_embeddings(self) -> nn.Embedding:
        """The table of position embeddings."""
        return self.embeddings.position_embeddings

    def resize_position_embeddings(self, new_num_position_embeddings: int) -> None:
        """Take texts of up to so many tokens: first rows are kept, new ones are fresh (or the sinusoid's).

        Raises:
            ValueError: a number below 1.
        """
        if new_num_position_embeddings < 1:
            raise ValueError(f"there must be at least 1 position, got {new_num_position_embeddings}")
        old = self.embeddings.position_embeddings.weight
        table = nn.Embedding(new_num_position_embeddings, old.shape[1], device=old.device, dtype=old.dtype)
        self.init_parameter("embeddings.position_embeddings.weight", table.weight)
        kept = min(old.shape[0], new_num_position_embeddings)
        with torch.no_grad():
            table.weight[:kept] = old[:kept]
        self.embeddings.position_embeddings = table
        self.config = self.config.replace(max_position_embeddings=new_num_position_embeddings)

    def forward(  # type: ignore[override]  # Hugging Face orders this family's arguments differently
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: Layers | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """As `EncoderModel.forward`, without a `pooler_output`; the third argument is `inputs_embeds`."""
        encoded = self.encode(
            input_ids, attention_mask, None, position_ids, inputs_embeds, output_attentions, output_hidden_states
        )
        return self.finish(self.output(encoded), return_dict)

    def output(self, encoded: Encoded) -> BaseModelOutput:
        """Without a pooler."""
        return BaseModelOutput(encoded.unpack(encoded.hidden_TD), encoded.hidden_states, encoded.attentions)


class DistilBertHead(DistilBertPreTrainedModel, HeadModel):
    """What DistilBERT's heads share: their base model, and the order of arguments."""

    distilbert: DistilBertModel

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """As the task's `forward`, with this family's order of arguments; `token_type_ids` mean nothing."""
        return super().forward(input_ids, attention_mask, None, position_ids, inputs_embeds, labels, **options)


class DistilBertForMaskedLM(DistilBertHead, MaskedLM):  # type: ignore[misc]
    """Masked language modelling, with the modules of the head at the top level."""

    tied_keys: ClassVar[dict[str, str]] = {"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"}

    def __init__(self, config: DistilBertConfig) -> None:
        super().__init__(config, DistilBertModel(config))
        self.vocab_transform = nn.Linear(config.dim, config.dim)
        self.vocab_layer_norm = AddLayerNorm(config.dim, config.layer_norm_eps)
        self.vocab_projector = nn.Linear(config.dim, config.vocab_size)
        self.act = activation(config.activation)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.vocab_projector

    def logits(self, hidden: Tensor) -> Tensor:
        return self.vocab_projector(self.vocab_layer_norm(self.act(self.vocab_transform(hidden))))


class DistilBertForSequenceClassification(DistilBertHead, SequenceClassification):  # type: ignore[misc]
    """Two linears with ReLU between on the first token."""

    def __init__(self, config: DistilBertConfig) -> None:
        super().__init__(config, DistilBertModel(config))
        self.pre_classifier = nn.Linear(config.dim, config.dim)
        self.classifier = nn.Linear(config.dim, config.num_labels)
        self.dropout = Dropout(config.seq_classif_dropout)
        self.post_init()

    def logits(self, encoded: Encoded) -> Tensor:
        return self.classifier(self.dropout(F.relu(self.pre_classifier(encoded.first_token))))


class DistilBertForTokenClassification(DistilBertHead, TokenClassification):  # type: ignore[misc]
    """A linear on every token."""

    def __init__(self, config: DistilBertConfig) -> None:
        super().__init__(config, DistilBertModel(config))
        self.dropout = Dropout(config.dropout)
        self.classifier = nn.Linear(config.dim, config.num_labels)
        self.post_init()

    def logits(self, encoded: Encoded) -> Tensor:
        return self.classifier(self.dropout(encoded.hidden_TD))


class DistilBertForQuestionAnswering(DistilBertHead, QuestionAnswering):
    """Start and end scores for every token."""

    def __init__(self, config: DistilBertConfig) -> None:
        super().__init__(config, DistilBertModel(config))
        self.dropout = Dropout(config.qa_dropout)
        self.qa_outputs = nn.Linear(config.dim, 2)
        self.post_init()

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **options: Any,
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]:
        """As `QuestionAnswering.forward`, with this family's order of arguments."""
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

    def logits(self, encoded: Encoded) -> Tensor:
        return self.qa_outputs(self.dropout(encoded.hidden_TD))


class DistilBertForMultipleChoice(DistilBertHead, MultipleChoice):  # type: ignore[misc]
    """Two linears with ReLU between on the first token of each choice."""

    def __init__(self, config: DistilBertConfig) -> None:
        super().__init__(config, DistilBertModel(config))
        self.pre_classifier = nn.Linear(config.dim, config.dim)
        self.classifier = nn.Linear(config.dim, 1)
        self.dropout = Dropout(config.seq_classif_dropout)
        self.post_init()

    def logits(self, encoded: Encoded) -> Tensor:
        return self.classifier(self.dropout(F.relu(self.pre_classifier(encoded.first_token))))
