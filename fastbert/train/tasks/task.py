"""Task: what one kind of fine-tuning reads, trains, predicts and measures. Each kind is one file beside this one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch

from fastbert.models.auto import AutoClass, AutoModel
from fastbert.models.config import Config
from fastbert.models.pretrained import PreTrainedModel
from fastbert.tokenizer import Text, Tokenizer
from fastbert.train.batch import TrainBatch
from fastbert.train.examples import Examples
from fastbert.train.objectives.heads import HeadObjective
from fastbert.train.tables import Table
from fastbert.weights import read_json

Tensor = torch.Tensor
T = TypeVar("T", bound="Task")

WINDOW = 16384  # texts tokenised at once: what the tokenizer returns is far larger than the ids that are kept


@dataclass(frozen=True)
class Task:
    """A kind of fine-tuning; its fields are the columns and settings that a user may choose.

    The order of calls is `learn` (once, on the training table), `tokenizer`, `load`, `examples` of each table,
    `objective`; and for an evaluation `outputs` of each batch and `metrics` of all of them.
    """

    name: ClassVar[str]
    classes: ClassVar[type[AutoClass]]
    pipeline_tag: ClassVar[str]  # the hub's word for it
    library_name: ClassVar[str] = "transformers"  # what loads the result, besides fastbert
    reads_sentence_folder: ClassVar[bool] = False  # pooling and modules of a sentence-transformers folder count

    @property
    def loss_compares_items(self) -> bool:
        """Whether an item's loss depends on the others of its batch."""
        return False

    def learn(self: T, table: Table, config: Config) -> T:
        """The task with what the training table says, such as names of labels.

        Raises:
            CorpusError: a missing column, or labels that do not fit the task.
        """
        return self

    def configure(self, config: Config) -> Config:
        """A checkpoint's configuration with this task's labels."""
        return config

    def tokenizer(self, folder: Path, limit: int, max_length: int | None) -> Tokenizer:
        """The tokenizer as this task needs it, and as it is saved; arguments as in `Tokenizer.from_folder`."""
        return Tokenizer.from_folder(folder, limit, max_length)

    def load(self, folder: Path, tokenizer: Tokenizer) -> Any:
        """The checkpoint under this task's head. A head that it lacks, or has for other labels, starts at random."""
        family = self.classes.class_of(read_json(folder / "config.json").get("model_type"))
        saved = family.config_class.from_pretrained(folder)
        config = self.configure(saved)
        if _fits(family, saved, config):
            return family.from_pretrained(folder, config=config)
        warnings.warn(
            f"{folder} has a head for another task or other labels: it is replaced by a new one, initialised at random",
            stacklevel=2,
        )
        weights = AutoModel.class_of(config.model_type).from_pretrained(folder, config=config).state_dict()
        model: Any = family(config)
        model.base_model.load_state_dict({name: weights[name] for name in model.base_model.state_dict()})
        return model.eval()

    def examples(self, table: Table, tokenizer: Tokenizer) -> Examples:
        """Tokenised rows with their labels.

        Raises:
            CorpusError: a missing column, a row without a text, or a label that was not learnt.
        """
        raise NotImplementedError

    def objective(self) -> HeadObjective:
        """What is trained."""
        raise NotImplementedError

    def outputs(self, logits: Tensor, batch: TrainBatch) -> Sequence[np.ndarray]:
        """What `metrics` needs of a batch, one array an item, on the host."""
        return list(logits.float().cpu().numpy())

    def metrics(self, examples: Examples, outputs: Sequence[np.ndarray]) -> dict[str, float]:
        """Metrics of a whole table; `outputs` are in the order of the examples."""
        raise NotImplementedError


def _fits(family: type[PreTrainedModel], saved: Config, config: Config) -> bool:
    """Whether the head in a file, if there is one, is the head that `config` wants."""
    made = str((saved.extra.get("architectures") or [""])[0]).partition("For")[2]
    if made != family.__name__.partition("For")[2]:
        return made in ("", "MaskedLM", "PreTraining")  # no head that would be in the way
    names, wanted = saved.id2label or {}, config.id2label or {}
    unnamed = all(str(name) == f"LABEL_{i}" for i, name in names.items())
    return len(names) == len(wanted) and (unnamed or names == wanted)


def valid(text: str) -> str:
    """The text with lone surrogates, which JSON may hold and UTF-8 may not, as U+FFFD; no character moves."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def tokenize(tokenizer: Tokenizer, texts: Sequence[Text]) -> tuple[list[list[int]], list[list[int]] | None, int]:
    """(ids, segments, number of texts that were cut) of any number of texts or pairs."""
    ids: list[list[int]] = []
    type_ids: list[list[int]] = []
    num_truncated = 0
    for start in range(0, len(texts), WINDOW):
        encoded = tokenizer.encode(texts[start : start + WINDOW])
        ids += encoded.ids
        type_ids += encoded.type_ids or []
        num_truncated += sum(encoded.truncated)
    return ids, type_ids or None, num_truncated
