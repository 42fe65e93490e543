"""Task heads on packed hidden states: one class a task, which knows the call, the loss and the output.

A family's class builds the modules (with Hugging Face's names) and says how logits come out of packed hidden states.
Labels at padded positions do not count: their hidden states are never computed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastbert.models.activations import Activation
from fastbert.models.encoder import Dropout, Encoded, EncoderModel, Layers
from fastbert.models.outputs import (
    MaskedLMOutput,
    ModelOutput,
    MultipleChoiceModelOutput,
    NextSentencePredictorOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from fastbert.models.pretrained import PreTrainedModel
from fastbert.ops import cross_entropy

Tensor = torch.Tensor
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


class HeadModel(PreTrainedModel):
    """A base model, kept under the family's attribute name, and a head."""

    def __init__(self, config: Any, base: EncoderModel) -> None:
        super().__init__(config)
        setattr(self, self.base_model_prefix, base)

    @property
    def base_model(self) -> EncoderModel:
        """The encoder."""
        return getattr(self, self.base_model_prefix)

    def execution_plan(self) -> str:
        """What the encoder would run on now; see `EncoderModel.execution_plan`."""
        return self.base_model.execution_plan()

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of word embeddings."""
        return self.base_model.get_input_embeddings()

    def set_input_embeddings(self, table: nn.Embedding) -> None:
        """Replace the table of word embeddings."""
        self.base_model.set_input_embeddings(table)


def problem_type(logits: Tensor, labels: Tensor) -> str:
    """What the number of labels and the labels' dtype imply: one number, one class, or any number of classes."""
    if logits.shape[-1] == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def classification_loss(logits: Tensor, labels: Tensor, kind: str | None, reduction: str = "mean") -> Tensor:
    """The loss of a problem type, or of the one that the number of labels and the labels' dtype imply.

    Args:
        logits: (S, N).
        labels: (S) int64 for single-label, (S) or (S, N) floats for regression, (S, N) floats for multi-label.
        kind: one of `PROBLEM_TYPES`, or None.
        reduction: `"mean"` or `"sum"`, over labelled sequences or over all S * N numbers.

    Raises:
        ValueError: an unknown problem type, or labels whose shape does not fit it.
    """
    kind = problem_type(logits, labels) if kind is None else kind
    if kind not in PROBLEM_TYPES:
        raise ValueError(f"problem_type is {kind!r}; it must be one of {PROBLEM_TYPES}")
    if kind == "single_label_classification":
        return cross_entropy(logits, labels.reshape(-1), reduction=reduction)
    if kind == "regression" and logits.shape[-1] == 1:
        logits, labels = logits.reshape(-1), labels.reshape(-1)
    if logits.shape != labels.shape:
        raise ValueError(f"{kind}: labels have shape {tuple(labels.shape)} but logits {tuple(logits.shape)}")
    if kind == "regression":
        return F.mse_loss(logits, labels, reduction=reduction)
    return F.binary_cross_entropy_with_logits(logits, labels, reduction=reduction)


class ClassificationHead(nn.Module):
    """out_proj(dropout(act(dense(dropout(h))))): the two-layer classifier of RoBERTa and its kin."""

    def __init__(self, config: Any, act: Activation, dropout: Dropout) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)
        self.act = act
        self.dropout = dropout

    def forward(self, hidden: Tensor) -> Tensor:
        """(S, D) -> (S, num_labels)."""
        return self.out_proj(self.dropout(self.act(self.dense(self.dropout(hidden)))))


class LabelledHead(HeadModel):
    """The call that most tasks share: the base model's, with `labels`."""

    def result(self, encoded: Encoded, labels: Tensor | None) -> ModelOutput:
        """The task's output."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: Layers | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """As the base model; with `labels`, as the class describes them, the output has a `loss`."""
        encoded = self.base_model.encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            output_attentions, output_hidden_states,
        )  # fmt: skip
        return self.finish(self.result(encoded, labels), return_dict)


class SequenceClassification(LabelledHead):
    """One row of logits a sequence. Labels as `config.problem_type` says; where that is None, as they themselves do."""

    def logits(self, encoded: Encoded) -> Tensor:
        """(S, num_labels)."""
        raise NotImplementedError

    def result(self, encoded: Encoded, labels: Tensor | None) -> SequenceClassifierOutput:
        logits = self.logits(encoded)
        loss = None if labels is None else classification_loss(logits, labels, self.config.problem_type)
        return SequenceClassifierOutput(loss, logits, encoded.hidden_states, encoded.attentions)


class TokenClassification(LabelledHead):
    """One row of logits a token. Labels (B, L): classes, -100 = none."""

    def logits(self, encoded: Encoded) -> Tensor:
        """(T, num_labels)."""
        raise NotImplementedError

    def result(self, encoded: Encoded, labels: Tensor | None) -> TokenClassifierOutput:
        logits = self.logits(encoded)
        loss = None if labels is None else cross_entropy(logits, encoded.pack(labels))
        return TokenClassifierOutput(loss, encoded.unpack(logits), encoded.hidden_states, encoded.attentions)


class NextSentencePrediction(LabelledHead):
    """Does the second segment follow the first? Labels (B): 0 = it does, 1 = it is a random one."""

    def logits(self, encoded: Encoded) -> Tensor:
        """(S, 2)."""
        raise NotImplementedError

    def result(self, encoded: Encoded, labels: Tensor | None) -> NextSentencePredictorOutput:
        logits = self.logits(encoded)
        loss = None if labels is None else cross_entropy(logits, labels.reshape(-1))
        return NextSentencePredictorOutput(loss, logits, encoded.hidden_states, encoded.attentions)


class QuestionAnswering(HeadModel):
    """Where in each sequence the answer starts and ends. Padding takes no probability."""

    def logits(self, encoded: Encoded) -> Tensor:
        """(T, 2)."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: Layers | None = None,
        return_dict: bool | None = None,
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]:
        """As the base model, with `start_positions` and `end_positions` (B); positions past the end do not count."""
        encoded = self.base_model.encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            output_attentions, output_hidden_states,
        )  # fmt: skip
        logits = self.logits(encoded)
        fill = torch.finfo(logits.dtype).min
        start, end = encoded.unpack(logits, fill=fill).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            L = start.shape[1]
            losses = [
                cross_entropy(scores, positions.reshape(-1).clamp(0, L), ignore_index=L)
                for scores, positions in ((start, start_positions), (end, end_positions))
            ]
            loss = sum(losses[1:], losses[0]) / 2
        output = QuestionAnsweringModelOutput(loss, start, end, encoded.hidden_states, encoded.attentions)
        return self.finish(output, return_dict)


class MultipleChoice(HeadModel):
    """One score a choice: inputs (B, C, L)."""

    def logits(self, encoded: Encoded) -> Tensor:
        """(S, 1)."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: Layers | None = None,
        return_dict: bool | None = None,
    ) -> MultipleChoiceModelOutput | tuple[Any, ...]:
        """As the base model on (B, C, L) inputs, with `labels` (B): the right choice."""
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        choices = given.shape[1]
        ids, mask, types, positions, embeds = (
            None if x is None else x.flatten(0, 1)
            for x in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        )
        encoded = self.base_model.encode(ids, mask, types, positions, embeds, output_attentions, output_hidden_states)
        logits = self.logits(encoded).view(-1, choices)
        loss = None if labels is None else cross_entropy(logits, labels)
        output = MultipleChoiceModelOutput(loss, logits, encoded.hidden_states, encoded.attentions)
        return self.finish(output, return_dict)


def vocabulary_loss(
    head: Any, hidden_TD: Tensor, labels: Tensor | None, with_logits: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(loss, logits (T, V)): without `with_logits` only the labelled rows go through the vocabulary head.

    Args:
        head: (N, D) -> (N, V).
        labels: (T) int64, -100 = none, or None for no loss.
    """
    if labels is not None and not with_logits:
        rows = (labels != -100).nonzero().flatten()
        return cross_entropy(head(hidden_TD[rows]), labels[rows]), None
    logits = head(hidden_TD)
    return None if labels is None else cross_entropy(logits, labels), logits


class MaskedLM(HeadModel):
    """The vocabulary head."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V)."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: Layers | None = None,
        return_dict: bool | None = None,
        output_logits: bool | None = None,
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """As the base model, with `labels` (B, L): token ids, -100 = none.

        `output_logits`: compute (B, L, V) logits. None = yes, except while training with labels: then only the
        labelled rows go through the vocabulary, and `logits` is None.
        """
        encoded = self.base_model.encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            output_attentions, output_hidden_states,
        )  # fmt: skip
        with_logits = (labels is None or not self.training) if output_logits is None else output_logits
        labels_T = None if labels is None else encoded.pack(labels)
        loss, logits = vocabulary_loss(self.logits, encoded.hidden_TD, labels_T, with_logits)
        output = MaskedLMOutput(
            loss, None if logits is None else encoded.unpack(logits), encoded.hidden_states, encoded.attentions
        )
        return self.finish(output, return_dict)
