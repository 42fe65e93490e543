"""The model card of a trained folder: `README.md` with the metadata that the Hugging Face hub reads."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from fastbert.train.arguments import TrainArguments


@dataclass(frozen=True)
class Card:
    """What a caller knows of a model that the loop does not.

    Attributes:
        title: the heading.
        summary: what it does, what it was trained on.
        base_model: folder or hub id that the run started from.
        pipeline_tag: the hub's word for the task, such as `text-classification`.
        library_name: what loads it: `transformers` or `sentence-transformers`.
        datasets: names of the data.
        tags: further words of the hub.
        usage: Python that loads and uses it.
    """

    title: str = "A model trained with fastbert"
    summary: str = ""
    base_model: str | None = None
    pipeline_tag: str | None = None
    library_name: str = "transformers"
    datasets: Sequence[str] = ()
    tags: Sequence[str] = ()
    usage: str | None = None


def write_card(
    folder: Path, card: Card, arguments: TrainArguments, metrics: Mapping[str, Any], plots: Sequence[str] = ()
) -> None:
    """Write `README.md`.

    Args:
        metrics: names to numbers, as the run ended.
        plots: names of figures in the folder.
    """
    head = {
        "library_name": card.library_name,
        "base_model": card.base_model,
        "pipeline_tag": card.pipeline_tag,
        "datasets": list(card.datasets),
        "tags": ["fastbert", *card.tags],
    }
    yaml = [f"{name}: {json.dumps(value)}" for name, value in head.items() if value]  # JSON is YAML
    parts = ["---", *yaml, "---", "", f"# {card.title}", ""]
    if card.summary:
        parts += [card.summary, ""]
    if card.usage:
        parts += ["## Use", "", "```python", card.usage.strip(), "```", ""]
    if metrics:
        parts += ["## Results", "", "| | |", "|---|---|"]
        parts += [f"| {name} | {_spell(value)} |" for name, value in metrics.items()] + [""]
        parts += [f"![{name}]({name})\n" for name in plots]
    told = _told(arguments)
    parts += ["## Training", "", "What was set; everything else had its default.", "", "| | |", "|---|---|"]
    parts += [f"| {name} | {value} |" for name, value in told.items()] + [""]
    parts += [f"fastbert, torch {torch.__version__}, Python {platform.python_version()}.", ""]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")


def _told(arguments: TrainArguments) -> dict[str, Any]:
    """Fields that differ from their defaults, and those that every reader asks for; paths are nobody's business."""
    always = {"learning_rate", "num_train_epochs", "optim", "lr_scheduler_type", "seed"}
    hidden = {"output_dir", "resume", "overwrite", "quiet", "report_to", "device"}
    values, defaults = asdict(arguments), {f.name: f.default for f in fields(arguments)}
    return {n: v for n, v in values.items() if n not in hidden and (n in always or v != defaults[n])}


def _spell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
