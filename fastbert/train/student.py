"""A student for distillation: a shallower model that begins with some of its teacher's layers."""

from __future__ import annotations

import re
from typing import Any

import torch

from fastbert.models import AlbertForMaskedLM, BertForMaskedLM, DistilBertConfig, DistilBertForMaskedLM
from fastbert.models.heads import MaskedLM

_LAYER = re.compile(r"^encoder\.layer\.(\d+)\.")
# DistilBERT's names for the modules of BERT's vocabulary head.
_DISTILBERT_HEAD = {
    "vocab_transform": "cls.predictions.transform.dense",
    "vocab_layer_norm": "cls.predictions.transform.LayerNorm",
    "vocab_projector": "cls.predictions.decoder",
}


def teacher_layers(num_teacher: int, num_student: int) -> list[int]:
    """Which of the teacher's layers the student begins with: first, last and evenly between, 12 to 6 is 0 2 4 7 9 11.

    Raises:
        ValueError: a student that is deeper than its teacher, or has no layer.
    """
    if not 1 <= num_student <= num_teacher:
        raise ValueError(f"a student of {num_teacher} layers can have 1 to {num_teacher}, not {num_student}")
    if num_student == 1:
        return [0]
    gaps = num_student - 1
    return [(2 * i * (num_teacher - 1) + gaps) // (2 * gaps) for i in range(num_student)]


def student_of(teacher: MaskedLM, num_layers: int | None = None, distilbert: bool | None = None) -> MaskedLM:
    """A student with weights of its teacher (Sanh et al. 2019, arXiv 1910.01108, sec. 3), in `train()` mode.

    Args:
        teacher: a masked language model of any family whose layers have weights of their own.
        num_layers: None = half of the teacher's.
        distilbert: make a DistilBERT, which a BERT teacher allows; None = where it does, else the teacher's family.

    Raises:
        ValueError: a number of layers that does not fit, an ALBERT teacher, or a DistilBERT of another than a BERT.
    """
    depth = teacher.config.num_hidden_layers
    num_layers = max(1, depth // 2) if num_layers is None else num_layers
    is_bert = isinstance(teacher, BertForMaskedLM)
    if isinstance(teacher, AlbertForMaskedLM):
        raise ValueError("ALBERT's layers share their weights: there are none to choose for a student")
    if distilbert and not is_bert:
        raise ValueError(f"a DistilBERT begins with a BERT's weights, the teacher is a {type(teacher).__name__}")
    layers = teacher_layers(depth, num_layers)
    if is_bert and distilbert is not False:
        student: Any = DistilBertForMaskedLM(_distilbert_config(teacher.config, num_layers))
    else:
        field = "n_layers" if isinstance(teacher, DistilBertForMaskedLM) else "num_hidden_layers"
        family: Any = type(teacher)
        student = family(teacher.config.replace(**{field: num_layers}))
    copy_weights(student, teacher, layers)
    return student.to(device=teacher.device, dtype=teacher.dtype).train()


def _distilbert_config(config: Any, num_layers: int) -> DistilBertConfig:
    if config.layer_norm_eps != DistilBertConfig.layer_norm_eps:
        raise ValueError(
            f"the teacher's layer_norm_eps is {config.layer_norm_eps} but DistilBERT's is always "
            f"{DistilBertConfig.layer_norm_eps}: make a student of the teacher's family (distilbert=False)"
        )
    return DistilBertConfig(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        n_layers=num_layers,
        n_heads=config.num_attention_heads,
        dim=config.hidden_size,
        hidden_dim=config.intermediate_size,
        dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob,
        activation=config.hidden_act,
        initializer_range=config.initializer_range,
        pad_token_id=config.pad_token_id,
        tie_word_embeddings=config.tie_word_embeddings,
    )


@torch.no_grad()
def copy_weights(student: MaskedLM, teacher: MaskedLM, layers: list[int]) -> None:
    """Copy embeddings, the teacher's `layers` and the vocabulary head, in place.

    A DistilBERT has no segments: BERT's embedding of segment 0 is added to its positions (the authors' code drops it),
    so that a text of one segment is embedded as by the teacher.
    """
    base, head = f"{student.base_model_prefix}.", _DISTILBERT_HEAD
    distilled = isinstance(student, DistilBertForMaskedLM) and not isinstance(teacher, DistilBertForMaskedLM)
    for name, parameter in student.named_parameters():
        inner = name.removeprefix(base)
        if inner != name:
            inner = _LAYER.sub(lambda match: f"encoder.layer.{layers[int(match[1])]}.", inner)
            source = teacher.base_model.get_parameter(inner)
        else:
            root, _, leaf = name.rpartition(".")
            source = teacher.get_parameter(f"{head[root]}.{leaf}" if distilled else name)
        parameter.copy_(source)
    if distilled:
        types = teacher.base_model.embeddings.token_type_embeddings
        if types is not None:
            student.base_model.embeddings.position_embeddings.weight.add_(types.weight[0])
