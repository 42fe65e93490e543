"""Loss and metrics of a model on labelled examples: one packed forward pass each, the longest first."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch

from fastbert.packing import token_batches
from fastbert.train.batch import collate
from fastbert.train.examples import Examples
from fastbert.train.objectives.heads import HeadObjective
from fastbert.train.objectives.loss import encode
from fastbert.train.tasks.task import Task

MICRO_TOKENS = 16384


class Evaluator:
    """Calls give the metrics of a model on one table.

    Attributes:
        task, examples, objective: what is measured, on what, with which loss.
        micro_tokens: most tokens a forward pass.
        batch_items: items that share a loss, where the loss of an item depends on the others.
    """

    def __init__(
        self,
        task: Task,
        examples: Examples,
        objective: HeadObjective,
        micro_tokens: int = MICRO_TOKENS,
        batch_items: int | None = None,
    ) -> None:
        self.task, self.examples, self.objective = task, examples, objective
        self.micro_tokens, self.batch_items = micro_tokens, batch_items

    def __call__(self, model: Any) -> dict[str, float]:
        """`loss` and the task's metrics."""
        outputs, loss = self._run(model)
        return {"loss": loss, **self.task.metrics(self.examples, outputs)}

    def outputs(self, model: Any) -> list[np.ndarray]:
        """Predictions as `Task.metrics` takes them, in the order of the examples."""
        return self._run(model)[0]

    @torch.inference_mode()
    def _run(self, model: Any) -> tuple[list[np.ndarray], float]:
        """(outputs, loss) in `eval()` without autograd, so the engine may compute it; the mode is restored."""
        was_training = model.training
        model.eval()
        try:
            return self._measure(model)
        finally:
            model.train(was_training)

    def _measure(self, model: Any) -> tuple[list[np.ndarray], float]:
        sums: dict[str, float] = defaultdict(float)
        counts: dict[str, float] = defaultdict(float)
        outputs: list[Any] = [None] * len(self.examples)
        for rows in self._batches():
            items = [self.examples[i] for i in rows]
            batch = collate(items, rows, 0, model.base_model.position_offset, self.objective.token_fields)
            batch = self.objective.prepare(batch.to(model.device))
            logits = model.logits(encode(model, batch))
            loss = self.objective.of_logits(model, logits, batch)
            for term, count in self.objective.counts(batch).items():
                counts[term] += float(count)
                sums[term] += float(loss.sums[term])
            for row, output in zip(rows, self.task.outputs(logits, batch), strict=True):
                outputs[row] = output
        total = sum(self.objective.weights[term] * sums[term] / max(counts[term], 1) for term in sums)
        return outputs, total

    def _batches(self) -> list[list[int]]:
        if self.batch_items is None:
            return token_batches(self.examples.lengths.tolist(), self.micro_tokens)
        starts = range(0, len(self.examples), self.batch_items)
        return [list(range(s, min(s + self.batch_items, len(self.examples)))) for s in starts]
