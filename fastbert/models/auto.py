"""From a checkpoint's `model_type` to the class that reads it, under the names of `transformers`' Auto classes.

It knows which classes there are, and nothing of what they compute.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

from fastbert.hub import resolve
from fastbert.models import albert, bert, distilbert, electra, mpnet, roberta
from fastbert.models.config import Config
from fastbert.models.pretrained import PreTrainedModel
from fastbert.weights import read_json

_HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only")


def _folder(name: str | os.PathLike[str], options: dict[str, Any]) -> Any:
    """The folder of a model; the options of `resolve` are taken out of `options`."""
    return resolve(name, **{k: options.pop(k) for k in _HUB_OPTIONS if k in options})


class AutoClass:
    """Picks one of `classes` by `model_type`."""

    classes: ClassVar[tuple[type[PreTrainedModel], ...]]

    @classmethod
    def class_of(cls, model_type: str | None) -> type[PreTrainedModel]:
        """The class of a model type.

        Raises:
            ValueError: the type is None or has no such class; the message lists those that have.
        """
        table = {c.config_class.model_type: c for c in cls.classes}
        if not isinstance(model_type, str) or model_type not in table:
            raise ValueError(f"{cls.__name__} knows no model_type {model_type!r}; it knows {', '.join(table)}")
        return table[model_type]

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], *, config: Config | None = None, **options: Any) -> Any:
        """Load a checkpoint with the class of its `model_type`; arguments as in `PreTrainedModel.from_pretrained`."""
        folder = _folder(name, options)
        model_type = read_json(folder / "config.json").get("model_type") if config is None else config.model_type
        return cls.class_of(model_type).from_pretrained(folder, config=config, **options)

    @classmethod
    def from_config(cls, config: Config) -> Any:
        """A model with fresh weights."""
        return cls.class_of(config.model_type)(config)


class AutoModel(AutoClass):
    """Base models."""

    classes = (
        albert.AlbertModel,
        bert.BertModel,
        roberta.CamembertModel,
        distilbert.DistilBertModel,
        electra.ElectraModel,
        mpnet.MPNetModel,
        roberta.RobertaModel,
        roberta.XLMRobertaModel,
    )


class AutoConfig:
    """Configurations."""

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **options: Any) -> Config:
        """The configuration of a checkpoint; arguments and errors as in `AutoModel` and `Config.from_pretrained`."""
        values = read_json(_folder(name, options) / "config.json")
        return AutoModel.class_of(values.get("model_type")).config_class.from_dict(values, **options)


class AutoModelForPreTraining(AutoClass):
    """All tasks that a family was pretrained on."""

    classes = (
        albert.AlbertForPreTraining,
        bert.BertForPreTraining,
        roberta.CamembertForMaskedLM,
        distilbert.DistilBertForMaskedLM,
        electra.ElectraForPreTraining,
        mpnet.MPNetForMaskedLM,
        roberta.RobertaForMaskedLM,
        roberta.XLMRobertaForMaskedLM,
    )


class AutoModelForMaskedLM(AutoClass):
    """Masked language modelling."""

    classes = (
        albert.AlbertForMaskedLM,
        bert.BertForMaskedLM,
        roberta.CamembertForMaskedLM,
        distilbert.DistilBertForMaskedLM,
        electra.ElectraForMaskedLM,
        mpnet.MPNetForMaskedLM,
        roberta.RobertaForMaskedLM,
        roberta.XLMRobertaForMaskedLM,
    )


class AutoModelForNextSentencePrediction(AutoClass):
    """Next-sentence prediction."""

    classes = (bert.BertForNextSentencePrediction,)


class AutoModelForSequenceClassification(AutoClass):
    """One label, or several, or a number, for a sequence."""

    classes = (
        albert.AlbertForSequenceClassification,
        bert.BertForSequenceClassification,
        roberta.CamembertForSequenceClassification,
        distilbert.DistilBertForSequenceClassification,
        electra.ElectraForSequenceClassification,
        mpnet.MPNetForSequenceClassification,
        roberta.RobertaForSequenceClassification,
        roberta.XLMRobertaForSequenceClassification,
    )


class AutoModelForTokenClassification(AutoClass):
    """One label a token."""

    classes = (
        albert.AlbertForTokenClassification,
        bert.BertForTokenClassification,
        roberta.CamembertForTokenClassification,
        distilbert.DistilBertForTokenClassification,
        electra.ElectraForTokenClassification,
        mpnet.MPNetForTokenClassification,
        roberta.RobertaForTokenClassification,
        roberta.XLMRobertaForTokenClassification,
    )


class AutoModelForQuestionAnswering(AutoClass):
    """Start and end of the answer."""

    classes = (
        albert.AlbertForQuestionAnswering,
        bert.BertForQuestionAnswering,
        roberta.CamembertForQuestionAnswering,
        distilbert.DistilBertForQuestionAnswering,
        electra.ElectraForQuestionAnswering,
        mpnet.MPNetForQuestionAnswering,
        roberta.RobertaForQuestionAnswering,
        roberta.XLMRobertaForQuestionAnswering,
    )


class AutoModelForMultipleChoice(AutoClass):
    """The right one of several choices."""

    classes = (
        albert.AlbertForMultipleChoice,
        bert.BertForMultipleChoice,
        roberta.CamembertForMultipleChoice,
        distilbert.DistilBertForMultipleChoice,
        electra.ElectraForMultipleChoice,
        mpnet.MPNetForMultipleChoice,
        roberta.RobertaForMultipleChoice,
        roberta.XLMRobertaForMultipleChoice,
    )
