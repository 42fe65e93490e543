"""Figures. The only file that imports matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def error_by_layer(
    path: Path, title: str, errors: Mapping[str, Sequence[float]], budgets: Mapping[str, Sequence[float]]
) -> None:
    """Write a figure of the greatest error at each layer, one line a path, with its budget dashed.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install matplotlib") from error

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in errors.items():
        (line,) = axes.plot(range(len(values)), values, marker="o", markersize=3.5, linewidth=1.4, label=name)
        if name in budgets:
            axes.plot(
                range(len(values)), budgets[name], linestyle="--", linewidth=0.9, color=line.get_color(), alpha=0.6
            )
    axes.set_yscale("log")
    axes.set_xlabel("layer (0 = embeddings)")
    axes.set_ylabel("max |error| against fp64")
    axes.set_title(title, fontsize=10)
    axes.grid(True, which="major", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, title="dashed: budget", title_fontsize=8)
    figure.savefig(path, dpi=150)


def training_curves(path: Path, title: str, history: Sequence[Mapping[str, Any]]) -> None:
    """Write a figure of a run's log: losses over the steps, and scores (what lies between 0 and 1) below them.

    Args:
        history: records with `step` and numbers by name, such as a training log holds.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install matplotlib") from error

    panels = {
        "loss": ("loss",),
        "score": ("accuracy", "f1", "matthews", "pearson", "spearman", "recall", "exact_match"),
    }
    names = list(dict.fromkeys(name for record in history for name in record))
    chosen = {kind: [n for n in names if any(word in n for word in words)] for kind, words in panels.items()}
    chosen = {kind: found for kind, found in chosen.items() if found}
    figure = Figure(figsize=(7, 1 + 3 * max(len(chosen), 1)), layout="constrained")
    for axes, (kind, found) in zip(
        figure.subplots(max(len(chosen), 1), squeeze=False)[:, 0], chosen.items(), strict=False
    ):
        for name in found:
            points = [(record["step"], record[name]) for record in history if record.get(name) is not None]
            marker = "o" if name.startswith("eval_") or len(points) == 1 else None
            axes.plot(*zip(*points, strict=True), marker=marker, markersize=3.5, linewidth=1.4, label=name)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(kind)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(True, which="major", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
