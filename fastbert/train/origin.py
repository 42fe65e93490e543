"""Where the model and the tokenizer of a pretraining run come from, and which objective is meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastbert.hub import resolve
from fastbert.models import AutoConfig, AutoModelForMaskedLM, AutoModelForPreTraining
from fastbert.models.auto import AutoModel
from fastbert.models.config import Config
from fastbert.models.electra_pair import ElectraPair
from fastbert.tokenizer import Tokenizer
from fastbert.train.families import build_config
from fastbert.train.pairs import Task
from fastbert.train.pretrain_arguments import FAMILY_OBJECTIVES, PretrainArguments
from fastbert.train.student import student_of
from fastbert.weights import read_json

PAIRS: dict[str, Task] = {"mlm+nsp": "nsp", "mlm+sop": "sop"}  # objectives whose items are pairs


class Origin:
    """A checkpoint, a teacher, a configuration file, or a family and a size.

    Attributes:
        model_type: family of the model.
        objective: name of what is minimised.

    Raises:
        ValueError: a family without the objective's head, or a distillation without a teacher.
    """

    def __init__(self, arguments: PretrainArguments) -> None:
        self.arguments = arguments
        start = arguments.teacher or arguments.model
        self.folder = None if start is None else resolve(start)
        self.config: Config | None = None
        if self.folder is not None:
            self.config = AutoConfig.from_pretrained(self.folder)
        elif arguments.config_json is not None:
            values = read_json(Path(arguments.config_json))
            self.config = AutoModel.class_of(values.get("model_type")).config_class.from_dict(values)
        self.model_type: str = arguments.model_type if self.config is None else self.config.model_type
        self.objective: str = arguments.objective
        if self.objective == "auto":
            fallback = FAMILY_OBJECTIVES.get(self.model_type, "mlm")
            self.objective = "distil" if arguments.teacher is not None else fallback
        self._check()

    def _check(self) -> None:
        if self.objective == "distil" and self.arguments.teacher is None:
            raise ValueError("the objective distil needs a teacher: --teacher DIR, a masked language model")
        if self.objective == "electra" and self.model_type != "electra":
            raise ValueError(f"the objective electra trains an electra, but the model is a {self.model_type}")
        if self.objective in PAIRS:
            able = [c.config_class.model_type for c in AutoModelForPreTraining.classes if hasattr(c, "pair_logits")]
            if self.model_type not in able:
                raise ValueError(
                    f"{self.objective} needs a head for pairs; {', '.join(able)} have one, {self.model_type} has not"
                )

    def tokenizer(self) -> Tokenizer:
        """The one that was named, or the checkpoint's.

        Raises:
            ValueError: neither.
        """
        source = self.folder if self.arguments.tokenizer is None else resolve(self.arguments.tokenizer)
        if source is None:
            raise ValueError(
                "there is no tokenizer: give one (--tokenizer), or learn one from the texts (--vocab-size)"
            )
        return Tokenizer.from_folder(source, self.arguments.seq_length, self.arguments.seq_length)

    def model(self, tokenizer: Tokenizer) -> tuple[Any, Any]:
        """(model, teacher): a new one or the checkpoint's; or a student and its teacher.

        Raises:
            ValueError: a model with fewer ids or positions than are needed.
        """
        told, length = self.arguments, self.arguments.seq_length
        config = self.config or build_config(
            self.model_type, told.size, tokenizer, length, told.dropout, told.initializer_range
        )
        if tokenizer.num_ids > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.num_ids} ids but the model a vocabulary of {config.vocab_size}"
            )
        model, teacher = self._build(config)
        if length > (positions := num_positions(model)):
            raise ValueError(f"seq_length is {length} but the model has positions for {positions} tokens")
        return model, teacher

    def _build(self, config: Config) -> tuple[Any, Any]:
        if self.objective == "distil":
            assert self.folder is not None
            teacher = AutoModelForMaskedLM.from_pretrained(self.folder)
            return student_of(teacher, self.arguments.student_layers), teacher
        if self.objective == "electra":
            if self.folder is not None:
                return ElectraPair.from_pretrained(self.folder), None
            return ElectraPair.from_config(config, self.arguments.generator_size), None  # type: ignore[arg-type]
        heads: Any = AutoModelForPreTraining if self.objective in PAIRS else AutoModelForMaskedLM
        model_class = heads.class_of(self.model_type)
        return (model_class(config) if self.folder is None else model_class.from_pretrained(self.folder)), None


def num_positions(model: Any) -> int:
    """Longest sequence, special tokens included, that a model has positions for."""
    return model.config.max_position_embeddings - model.base_model.position_offset
