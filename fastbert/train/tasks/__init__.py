"""The kinds of fine-tuning, one file each, and the table that names them."""

from fastbert.train.tasks.classification import Classification, MultiLabel, Pair, Regression
from fastbert.train.tasks.embedding import Embedding
from fastbert.train.tasks.multiple_choice import Choosing
from fastbert.train.tasks.ner import WordTagging
from fastbert.train.tasks.qa import Answering
from fastbert.train.tasks.task import Task

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (Classification, Regression, MultiLabel, Pair, WordTagging, Answering, Choosing, Embedding)
}

__all__ = ["TASKS", "Task"]
