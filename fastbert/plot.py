"""Figures. The only file that imports matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


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
