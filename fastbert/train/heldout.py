"""Loss and metrics of an objective on texts that are not trained on."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch

from fastbert.train.loader import Loader
from fastbert.train.objectives.loss import Objective


class HeldOut:
    """Calls give `loss`, its terms where there are several, the objective's metrics, and `perplexity` of masked tokens.

    Masks are those of epoch 0, the same in every call.

    Args:
        objective: what is measured.
        dataset: items as for `Loader`.
        micro_tokens: most tokens of a forward pass.
    """

    def __init__(self, objective: Objective, dataset: Any, micro_tokens: int) -> None:
        self.objective, self.dataset, self.micro_tokens = objective, dataset, micro_tokens

    @torch.inference_mode()
    def __call__(self, model: Any) -> dict[str, float]:
        """Of a model in `eval()`."""
        loader = Loader(
            self.dataset,
            batch_tokens=self.micro_tokens,
            micro_tokens=self.micro_tokens,
            position_offset=model.base_model.position_offset,
            token_fields=self.objective.token_fields,
            shuffle=False,
        )
        sums: dict[str, float] = defaultdict(float)
        counts: dict[str, int] = defaultdict(int)
        metrics: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for (batch,) in loader.steps(0):
            batch = self.objective.prepare(batch.to(model.device))
            loss = self.objective.loss(model, batch)
            for term, count in self.objective.counts(batch).items():
                counts[term] += int(count)
                sums[term] += float(loss.sums[term])
            for name, pair in loss.metrics.items():
                metrics[name] = [old + float(new) for old, new in zip(metrics[name], pair, strict=True)]
        means = {term: total / max(1, counts[term]) for term, total in sums.items()}
        found = {"loss": sum(self.objective.weights[term] * mean for term, mean in means.items())}
        if len(means) > 1:
            found |= means
        found |= {name: total / count for name, (total, count) in metrics.items() if count}
        return found | {"perplexity": math.exp(min(means["mlm"], 700.0))}
