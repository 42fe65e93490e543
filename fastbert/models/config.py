"""What the configurations of all families share: reading, writing, validation, labels."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

from fastbert.hub import resolve
from fastbert.models.activations import activation
from fastbert.typed import is_a, spell
from fastbert.weights import nearest, read_json

C = TypeVar("C", bound="Config")

_LABELS = ("id2label", "label2id")  # JSON knows no integer keys: `_set_labels` reads them
_MAY_BE_ZERO = ("type_vocab_size", "pad_token_id", "num_labels", "num_hidden_layers", "n_layers")
_NOT_NEGATIVE = ("initializer_range", "layer_norm_eps")  # not negative, and no one means 1000
_MOST_LAYERS = 4096  # a number beyond is a broken file, and would be built for hours


# What a task or a training loop may set on a live configuration. Everything else is the architecture.
_SETTABLE = frozenset(
    ("id2label", "label2id", "num_labels", "problem_type", "output_hidden_states", "output_attentions", "return_dict")
)


@dataclass(kw_only=True)
class Config:
    """Architecture of a checkpoint, with Hugging Face's field names and defaults.

    The architecture is immutable (see `replace`); labels and outputs may be set. A name that is no field, such as
    `use_cache`, lives in `extra` with the keys of a `config.json` that mean nothing here: saving loses none of them.
    """

    model_type: ClassVar[str] = ""

    num_labels: int = 2
    id2label: Mapping[int, str] | None = None
    label2id: Mapping[str, int] | None = None
    problem_type: str | None = None
    tie_word_embeddings: bool = True
    output_hidden_states: bool = False
    output_attentions: bool = False
    return_dict: bool = True
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._set_labels(self.id2label, self.num_labels)
        self.validate()
        vars(self)["_sealed"] = True

    def __setattr__(self, name: str, value: Any) -> None:
        if "_sealed" not in vars(self):
            vars(self)[name] = value
        elif name in ("id2label", "num_labels"):
            vars(self)["label2id"] = None
            self._set_labels(*((value, 0) if name == "id2label" else (None, value)))
        elif name in _SETTABLE:
            vars(self)[name] = value
        elif name in self.__dataclass_fields__:
            raise AttributeError(
                f"{name} is part of the architecture: use config.replace({name}={value!r}) before building a model, "
                "or model.resize_token_embeddings for another vocabulary"
            )
        else:
            self.extra[name] = value

    def __getattr__(self, name: str) -> Any:
        extra = vars(self).get("extra", {})
        if name not in extra:
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        return extra[name]

    def _set_labels(self, id2label: Mapping[int, str] | None, num_labels: int) -> None:
        """Bring number, names and ids of labels in line."""
        if id2label is None:
            names = {i: f"LABEL_{i}" for i in range(num_labels)}
        else:
            try:
                names = {int(i): str(label) for i, label in id2label.items()}
            except (AttributeError, TypeError, ValueError) as error:
                raise ValueError(f"id2label is {id2label!r:.80}; it must map ids to names") from error
        label2id = vars(self).get("label2id")
        if label2id is not None and not is_a(label2id, Mapping[str, int]):
            raise ValueError(f"label2id is {label2id!r:.80}; it must map names to ids")
        if label2id is None or len(label2id) != len(names):
            label2id = {label: i for i, label in names.items()}
        vars(self).update(id2label=names, num_labels=len(names), label2id=label2id)

    def validate(self) -> None:
        """Raise ValueError on an architecture this package does not compute, or that cannot be."""
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name, None)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if is_a(1, kind) and not is_a(0.5, kind) and value < (0 if name in _MAY_BE_ZERO else 1):
                raise ValueError(f"{name} is {value}; it must be {0 if name in _MAY_BE_ZERO else 1} or more")
            if name in _NOT_NEGATIVE and not 0 <= value < 1000:
                raise ValueError(f"{name} is {value}; it must be at least 0 and below 1000")
            if "layers" in name and value > _MOST_LAYERS:
                raise ValueError(f"{name} is {value}; more than {_MOST_LAYERS} layers cannot be meant")
            if ("dropout" in name or name.endswith("_prob")) and not 0 <= value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 0 and below 1")
        pad, rows = getattr(self, "pad_token_id", None), getattr(self, "vocab_size", None)
        if isinstance(pad, int) and isinstance(rows, int) and pad >= rows:
            raise ValueError(f"pad_token_id is {pad} but vocab_size is {rows}; it must be one of the vocabulary's ids")
        position = self.extra.get("position_embedding_type", "absolute")
        if position != "absolute":
            raise ValueError(
                f"position_embedding_type is {position!r}; only 'absolute' is computed here. "
                "Relative-key checkpoints would give wrong results."
            )
        for flag in ("is_decoder", "add_cross_attention"):
            if self.extra.get(flag):
                raise ValueError(f"{flag} is true, but this package computes encoders only")

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, Any], **overrides: Any) -> C:
        """From a `config.json`'s content; keyword arguments win over it.

        Raises:
            ValueError: another `model_type`, or a value of the wrong type.
            TypeError: an override that no field has, with the nearest names.
        """
        values = dict(values)
        model_type = values.pop("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(f"config.json says model_type {model_type!r} but {cls.__name__} reads {cls.model_type!r}")
        names = {f.name: f for f in dataclasses.fields(cls) if f.name != "extra"}
        for name in overrides:
            if name not in names:
                raise TypeError(f"{cls.__name__} has no field {name!r}{nearest(name, names)}")
        if "num_labels" in overrides and overrides["num_labels"] != len(values.get("id2label") or {}):
            values.pop("id2label", None)
            values.pop("label2id", None)
        kinds = get_type_hints(cls)
        known = {k: v for k, v in values.items() if k in names and (v is not None or is_a(None, kinds[k]))}
        for name, value in known.items():
            if name not in _LABELS and not is_a(value, kinds[name]):
                raise ValueError(f"config.json: {name} is {value!r:.80}; it must be {spell(kinds[name])}")
        extra = {name: value for name, value in values.items() if name not in names}
        return cls(**{**known, **overrides}, extra=extra)

    @classmethod
    def from_pretrained(cls: type[C], name: str | os.PathLike[str], **options: Any) -> C:
        """From a folder or hub id; `resolve`'s options, and any field to override."""
        hub = {k: options.pop(k) for k in ("revision", "cache_dir", "token", "local_files_only") if k in options}
        return cls.from_dict(read_json(resolve(name, **hub) / "config.json"), **options)

    def replace(self: C, **changes: Any) -> C:
        """A copy with some fields changed."""
        if "num_labels" in changes and changes["num_labels"] != self.num_labels:
            changes = {"id2label": None, "label2id": None, **changes}
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The content of a `config.json` that `transformers` reads."""
        values = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("extra", "num_labels")
        }
        if self.problem_type is None:
            del values["problem_type"]
        if len(self.id2label or {}) == 2 and all(str(v).startswith("LABEL_") for v in (self.id2label or {}).values()):
            del values["id2label"], values["label2id"]
        return {**self.extra, **values, "model_type": self.model_type}

    def save_pretrained(self, folder: str | os.PathLike[str], **more: Any) -> None:
        """Write `config.json` into `folder`; `more` adds keys such as `architectures`."""
        path = Path(folder) / "config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".json.saving")
        scratch.write_text(json.dumps({**self.to_dict(), **more}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(scratch, path)


@dataclass(kw_only=True)
class EncoderConfig(Config):
    """The fields that most families share, with BERT-base's values."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0

    def validate(self) -> None:
        super().validate()
        activation(self.hidden_act)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
