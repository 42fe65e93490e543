"""A run so small that tests can repeat it: items, a model, a loader that is a pure function of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fastbert.models import BertConfig, BertForSequenceClassification, BertForTokenClassification
from fastbert.train.arguments import TrainArguments
from fastbert.train.batch import TrainBatch, collate
from fastbert.train.objectives.heads import TokenClassification
from fastbert.train.objectives.loss import Loss

VOCAB = 40


def items(num: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    """Sequences of 3 to 12 tokens whose label is the range that their tokens come from."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(num):
        label = int(rng.integers(2))
        words = rng.integers(10, 25, rng.integers(1, 11)) + 10 * label
        found.append({"input_ids": [2, *words.tolist(), 3], "labels": label})
    return found


def token_items(num: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    """Sequences with a label for some tokens: how many differs from one to the next."""
    rng = np.random.default_rng(seed)
    found = []
    for item in items(num, seed):
        ids = item["input_ids"]
        labels = [i % 3 if rng.random() < 0.6 else -100 for i in ids]
        found.append({"input_ids": ids, "labels": labels})
    return found


def config(dropout: float = 0.1, **more: Any) -> BertConfig:
    """Two layers of 16 features."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 16}
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertConfig(**{**sizes, **rates, "initializer_range": 0.1, **more})


def classifier(dropout: float = 0.1, seed: int = 0, **more: Any) -> BertForSequenceClassification:
    """A model with fresh weights of a seed."""
    torch.manual_seed(seed)
    return BertForSequenceClassification(config(dropout, **more))


def tagger(dropout: float = 0.0, seed: int = 0) -> BertForTokenClassification:
    """A model that labels tokens."""
    torch.manual_seed(seed)
    return BertForTokenClassification(config(dropout, num_labels=3))


class OwnUnits(TokenClassification):
    """A mutant: each micro-batch divided by its own units, where the whole step's count belongs."""

    def counts(self, batch: TrainBatch) -> dict[str, torch.Tensor]:
        """One unit a micro-batch."""
        return {name: torch.ones_like(value) for name, value in super().counts(batch).items()}

    def loss(self, model: Any, batch: TrainBatch) -> Loss:
        """The mean of the micro-batch."""
        loss, units = super().loss(model, batch), super().counts(batch)
        return type(loss)({k: v / units[k] for k, v in loss.sums.items()}, loss.metrics)


class Steps:
    """A loader: `batch` items a step, in micro-batches of `micro`, dealt to ranks in turn."""

    def __init__(
        self,
        items: list[dict[str, Any]],
        batch: int = 8,
        micro: int = 8,
        rank: int = 0,
        world_size: int = 1,
        token_fields: tuple[str, ...] = (),
    ) -> None:
        self.items, self.batch, self.micro, self.token_fields = items, batch, micro, token_fields
        self.rank, self.world_size = rank, world_size

    def num_steps(self, epoch: int) -> int:
        """Steps of an epoch; the last one may be smaller."""
        return -(-len(self.items) // self.batch)

    def steps(self, epoch: int, start: int = 0) -> Iterator[list[TrainBatch]]:
        """This rank's micro-batches of each step."""
        order = np.random.default_rng([7, epoch]).permutation(len(self.items)).tolist()
        for k in range(start, self.num_steps(epoch)):
            mine = order[k * self.batch : (k + 1) * self.batch][self.rank :: self.world_size]
            yield [self.collate(mine[i : i + self.micro], epoch) for i in range(0, len(mine), self.micro)]

    def collate(self, rows: list[int], epoch: int = 0) -> TrainBatch:
        """A batch of some items."""
        return collate([self.items[i] for i in rows], rows, epoch, 0, self.token_fields)


def arguments(**more: Any) -> TrainArguments:
    """Nine steps of AdamW, silently; the roof is stated, so that none is measured."""
    given = {"num_train_epochs": 3.0, "learning_rate": 5e-3, "weight_decay": 0.01, "logging_steps": 1, "bf16": False}
    silent = {"quiet": True, "report_to": "none", "peak_tflops": 1.0, "device": "cpu"}
    return TrainArguments(**{**given, **silent, **more})
