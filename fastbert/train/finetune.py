"""Fine-tuning: a checkpoint, labelled examples and a task to a trained model with its metrics."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbert.hub import resolve
from fastbert.models.auto import AutoConfig, AutoModel
from fastbert.sentence_folder import read_folder
from fastbert.tokenizer import Tokenizer
from fastbert.train.card import Card
from fastbert.train.evaluate import Evaluator
from fastbert.train.examples import Examples
from fastbert.train.finetune_arguments import FinetuneArguments
from fastbert.train.loop import train as run_loop
from fastbert.train.options import from_mapping
from fastbert.train.outcome import TrainResult
from fastbert.train.tables import read_table
from fastbert.train.tasks import TASKS, Task
from fastbert.weights import nearest


@dataclass(frozen=True)
class Finetuning:
    """A fine-tuning run that is ready to begin.

    Attributes:
        name: folder or hub id that it starts from.
        task: with what it learnt from the training data.
        model, tokenizer: what is trained, what reads the texts.
        train, eval: tokenised examples.
        arguments: of the run.
        sources: what the tables are called.
    """

    name: str
    task: Task
    model: Any
    tokenizer: Tokenizer
    train: Examples
    eval: Examples | None
    arguments: FinetuneArguments
    sources: tuple[str, ...]

    def evaluator(self) -> Evaluator | None:
        """Metrics of a model on the evaluation examples, if there are any."""
        if self.eval is None:
            return None
        together = self.arguments.items_or_tokens["batch_items"] if self.task.loss_compares_items else None
        return Evaluator(self.task, self.eval, self.task.objective(), self.arguments.micro_tokens, together)

    def run(self) -> TrainResult:
        """Train; errors and what is left in the output folder are those of `fastbert.train.loop.train`."""
        local = Path(self.name).exists()
        name = Path(self.name).resolve().name if local else self.name
        card = Card(
            title=Path(self.arguments.output_dir or name).name,
            summary=f"{name} fine-tuned for {self.task.name} on {Path(self.sources[0]).name}.",
            base_model=None if local else name,
            pipeline_tag=self.task.pipeline_tag,
            library_name=self.task.library_name,
            datasets=[Path(name).name for name in self.sources],
        )
        return run_loop(
            self.model, self.task.objective(), self.train, self.arguments, evaluate=self.evaluator(),
            tokenizer=self.tokenizer, card=card,
        )  # fmt: skip


def finetune(
    model: str | os.PathLike[str],
    train: Any,
    eval: Any = None,
    task: str | Task = "classification",
    arguments: FinetuneArguments | None = None,
    **options: Any,
) -> TrainResult:
    """Fine-tune a checkpoint on labelled examples.

        result = finetune("DIR", "train.csv", "eval.csv", text_column="text", label_column="label", output_dir="OUT")
        result.metrics["eval_accuracy"]

    Args:
        model: a folder or a hub id; see `fastbert.hub.resolve`.
        train, eval: a path (.csv, .tsv, .jsonl, .json, .parquet, .conll), a Hugging Face dataset, a data frame, a
            mapping of columns, or a list of mappings; see `fastbert.train.tables.read_table`.
        task: a name of `fastbert.train.tasks.TASKS`, or a task of your own.
        arguments: of the run; or each by its name:
        options: fields of `FinetuneArguments`, such as `num_train_epochs=2`.

    Returns:
        The model, its metrics (`eval_loss`, `eval_accuracy` ..., `train_seconds`, `tokens_per_second`,
        `padding_saved`), the log. With an `output_dir` all of it lies there, too, and the model loads in fastbert,
        transformers and, for embeddings, sentence-transformers.

    Raises:
        CorpusError: data that cannot be read, a missing column, a label that the training data lack.
        ValueError: an unknown task or option, or a value out of its range.
    """
    return prepare(model, train, eval, task, arguments, **options).run()


def prepare(
    model: str | os.PathLike[str],
    train: Any,
    eval: Any = None,
    task: str | Task = "classification",
    arguments: FinetuneArguments | None = None,
    **options: Any,
) -> Finetuning:
    """All of `finetune` but the training: data read and tokenised, the model loaded. Arguments and errors alike."""
    if arguments is not None and options:
        raise ValueError(f"give arguments or options, not both: {', '.join(options)}")
    arguments = arguments or from_mapping(FinetuneArguments, options, "finetune()")
    chosen = _task(task, arguments)
    tables = [read_table(train, "train", arguments.column_names)]
    if eval is not None:
        tables.append(read_table(eval, "eval", arguments.column_names))
    folder = resolve(model)
    config = AutoConfig.from_pretrained(_encoder_folder(folder))
    chosen = chosen.learn(tables[0], config)
    folder = folder if chosen.reads_sentence_folder else _encoder_folder(folder)
    tokenizer = chosen.tokenizer(folder, _position_limit(config), arguments.max_length)
    examples = [chosen.examples(table, tokenizer) for table in tables]
    with torch.random.fork_rng([]):  # a fresh head is a function of the seed
        torch.manual_seed(arguments.seed)
        loaded = chosen.load(folder, tokenizer)
    if chosen.loss_compares_items:
        _expect_whole_batches(examples[0], arguments)
    evaluated = examples[1] if eval is not None else None
    names = tuple(table.name for table in tables)
    return Finetuning(str(model), chosen, loaded, tokenizer, examples[0], evaluated, arguments, names)


def _task(task: str | Task, arguments: FinetuneArguments) -> Task:
    """The task with the columns and settings that were asked for."""
    if isinstance(task, Task):
        if arguments.of_task:
            raise ValueError(f"a task was given whole: set {', '.join(arguments.of_task)} on it, not beside it")
        return task
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}{nearest(task, TASKS)}; the tasks are {', '.join(TASKS)}")
    kind = TASKS[task]
    own = [field.name for field in fields(kind)]
    if foreign := [name for name in arguments.of_task if name not in own]:
        raise ValueError(f"{foreign[0]} means nothing to the task {task}; it has {', '.join(own)}")
    return kind(**arguments.of_task)


def _expect_whole_batches(examples: Examples, arguments: FinetuneArguments) -> None:
    """Warn where a loss that compares the items of a forward pass would see only a part of a batch."""
    items = arguments.items_or_tokens["batch_items"]
    most = arguments.batch_tokens if items is None else int(np.sort(examples.lengths)[-items:].sum())
    if most is not None and most > arguments.micro_tokens:
        warnings.warn(
            f"a batch may have {most:,} tokens but a forward pass takes {arguments.micro_tokens:,}: it is split then, "
            "and texts are compared within the parts only. Raise micro_tokens, or make the batch smaller",
            stacklevel=3,
        )


def _encoder_folder(folder: Path) -> Path:
    """Where the encoder's own files are: some sentence-transformers folders have them one level down."""
    if (folder / "config.json").is_file() or not (folder / "modules.json").is_file():
        return folder
    return read_folder(folder).transformer


def _position_limit(config: Any) -> int:
    """Tokens that the model has positions for."""
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    return config.max_position_embeddings - model.position_offset


def label_counts(examples: Examples, id2label: Mapping[int, str]) -> dict[str, int]:
    """How often each class occurs among the labels of items; nothing where they are no classes."""
    labels = examples.labels.get("labels")
    if labels is None or labels.dtype.kind != "i":
        return {}
    return {name: int((labels == i).sum()) for i, name in id2label.items()}
