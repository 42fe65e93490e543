"""Figures of a run, out of its rows: throughput and latency by length, peers, rooflines. Light and dark."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks import harness

Row = Mapping[str, str]

THEMES = {
    "light": {"ink": "#1f2328", "faint": "#59636e", "grid": "#d8dee4", "paper": "#ffffff", "ours": "#d1340f"},
    "dark": {"ink": "#e6edf3", "faint": "#9198a1", "grid": "#3d444d", "paper": "#15191f", "ours": "#ff7a52"},
}
PEERS = {  # a family keeps its colour and its mark in every figure
    "sentence-transformers": ("#4c78a8", "o"),
    "transformers": ("#72b7b2", "s"),
    "torch-compile": ("#54a24b", "^"),
    "onnxruntime": ("#b279a2", "D"),
    "openvino": ("#9d755d", "v"),
    "openvino-tuned": ("#c9a227", "P"),
    "ctranslate2": ("#8088a0", "X"),
}
FORMATS = ("float32", "bfloat16", "int8")


def family(name: str) -> str:
    """A provider without its number format."""
    return name.removesuffix("-bf16").removesuffix("-int8")


def is_ours(name: str) -> bool:
    """Whether a provider is this package."""
    return family(name) in ("fastbert", "native", "triton", "gpu engine")


def size_of(row: Row) -> tuple[int, int]:
    """(texts, tokens) of an encoder row."""
    texts, tokens = row["case"].rpartition("-")[2].split("x")
    return int(texts), int(tokens)


def _ratio(row: Row) -> str:
    return f"{harness.mark(float(row['times_low']), float(row['times_high']))}{float(row['times_base']):.1f}x"


def _style(theme: Mapping[str, str]) -> dict[str, Any]:
    return {
        "figure.facecolor": theme["paper"], "axes.facecolor": theme["paper"], "savefig.facecolor": theme["paper"],
        "text.color": theme["ink"], "axes.labelcolor": theme["ink"], "axes.edgecolor": theme["grid"],
        "xtick.color": theme["faint"], "ytick.color": theme["faint"], "grid.color": theme["grid"], "font.size": 9,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.linewidth": 0.6,
        "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 7.5, "axes.titlesize": 10,
        "axes.titlelocation": "left", "svg.hashsalt": "fastbert", "xtick.minor.size": 0, "ytick.minor.size": 0,
    }  # fmt: skip


def _plain(axis: Any, ticks: Sequence[float] | None = None) -> None:
    """Numbers as people write them on a logarithmic axis."""
    if ticks is not None:
        axis.set_ticks(ticks)
    else:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if v >= 1 else f"{v:g}"))
    axis.set_minor_formatter(NullFormatter())


def _by_format(rows: Sequence[Row], x: Callable[[Row], float], y: Callable[[Row], float], theme: Any) -> Any:
    """One panel a number format, so that like is held against like; ours on top."""
    formats = [f for f in FORMATS if any(row["dtype"] == f for row in rows)]
    figure = Figure(figsize=(3.6 * max(len(formats), 1.4), 3.9), layout="constrained")
    panels = figure.subplots(1, len(formats), sharex=True, sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, formats, strict=True):
        names = sorted({r["backend"] for r in rows if r["dtype"] == kind}, key=lambda n: (not is_ours(n), n))
        for name in names:
            points = sorted((x(r), y(r)) for r in rows if r["backend"] == name)
            color, mark = (theme["ours"], "o") if is_ours(name) else PEERS.get(family(name), ("#888888", "."))
            width, order = (2.4, 3) if is_ours(name) else (1.1, 2)
            axes.plot(
                *zip(*points, strict=True), color=color, marker=mark, markersize=4, linewidth=width, zorder=order,
                label=family(name),
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", title=kind)
        ticks = sorted({round(x(r)) for r in rows})
        _plain(axes.xaxis, ticks)
        _plain(axes.yaxis)
    known = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        list(known.values()), list(known), loc="outside lower center", ncols=int(figure.get_figwidth() / 1.35)
    )
    return figure, panels


def throughput(rows: Sequence[Row], theme: Mapping[str, str]) -> Figure | None:
    """Tokens a second by the mean length of texts, many texts a call."""
    chosen = [r for r in rows if r["mode"] == "throughput"]
    if len({r["case"] for r in chosen}) < 2:
        return None
    figure, panels = _by_format(
        chosen, lambda r: size_of(r)[1] / size_of(r)[0], lambda r: 1e3 * size_of(r)[1] / float(r["ms_p50"]), theme
    )
    panels[0].set_ylabel("real tokens / s  (higher is better)")
    for axes in panels:
        axes.set_xlabel("mean tokens a text")
    return figure


def latency(rows: Sequence[Row], theme: Mapping[str, str]) -> Figure | None:
    """Milliseconds of a lone text by its length."""
    chosen = [r for r in rows if r["mode"] == "batch1" and r["case"].startswith("length-")]
    if not chosen:
        return None
    figure, panels = _by_format(chosen, lambda r: size_of(r)[1], lambda r: float(r["ms_p50"]), theme)
    panels[0].set_ylabel("ms, median  (lower is better)")
    for axes in panels:
        axes.set_xlabel("tokens of the text")
    return figure


def peers(rows: Sequence[Row], theme: Mapping[str, str]) -> Figure | None:
    """Texts a second of everything that was measured, a panel a kind of text, with the spread of the rounds."""
    chosen = [r for r in rows if r["mode"] == "throughput"]
    cases = sorted({r["case"] for r in chosen}, key=lambda case: size_of({"case": case})[1])
    if not cases:
        return None
    most = max(sum(r["case"] == case for r in chosen) for case in cases)
    figure = Figure(figsize=(4.1 * len(cases), 1.2 + 0.24 * most), layout="constrained")
    for axes, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        members = sorted((r for r in chosen if r["case"] == case), key=lambda r: -float(r["ms_p50"]))
        texts, tokens = size_of(members[0])
        rates = [1e3 * texts / float(r["ms_p50"]) for r in members]
        spread = [[1e3 * texts / float(r[p]) for r in members] for p in ("ms_p80", "ms_p20")]
        errors = [[abs(a - b) for a, b in zip(rates, side, strict=True)] for side in spread]
        colors = [theme["ours"] if is_ours(r["backend"]) else theme["faint"] for r in members]
        axes.barh(range(len(members)), rates, color=colors, xerr=errors, height=0.72,
                  error_kw={"ecolor": theme["ink"], "elinewidth": 0.8})  # fmt: skip
        for i, (row, rate) in enumerate(zip(members, rates, strict=True)):
            end = max(rate, spread[1][i])
            axes.text(end, i, f"  {rate:,.0f}  ({_ratio(row)})", va="center", fontsize=7)
        axes.set_yticks(range(len(members)), [r["backend"] for r in members], fontsize=8)
        for label, row in zip(axes.get_yticklabels(), members, strict=True):
            label.set(color=theme["ours"] if is_ours(row["backend"]) else theme["ink"])
        axes.set(xlabel="texts / s", title=f"{case.split('-')[0]}: {texts} texts of {tokens / texts:.0f} tokens")
        axes.set_xlim(0, 1.45 * max(spread[1] + rates))
        axes.grid(False, axis="y")
    return figure


def roofline(rows: Sequence[Row], theme: Mapping[str, str]) -> Figure | None:
    """Encoders below their two measured roofs; and the percent of the roof of each op. Only what there are rows of."""
    encoders = [r for r in rows if r["op"] == "encode"]
    ops = [r for r in rows if r["op"] != "encode" and r["mode"] == "forward" and r["dtype"] == "float32"]
    drawn = [(panel, chosen) for panel, chosen in ((_encoder_roofs, encoders), (_op_roofs, ops)) if chosen]
    if not drawn:
        return None
    figure = Figure(figsize=(5.5 * len(drawn), 4.2), layout="constrained")
    for (panel, chosen), axes in zip(drawn, figure.subplots(1, len(drawn), squeeze=False)[0], strict=True):
        panel(axes, chosen, theme)
    return figure


def _encoder_roofs(axes: Any, rows: Sequence[Row], theme: Mapping[str, str]) -> None:
    roofs = {r["dtype"]: (float(r["copy_gb_s"]), float(r["peak_tflop_s"])) for r in rows}
    span = (1.0, 3e4)
    for kind, color in zip(FORMATS, (theme["ours"], "#4c78a8", "#54a24b"), strict=True):
        if kind not in roofs:
            continue
        copy, peak = roofs[kind]
        axes.plot([span[0], 1e3 * peak / copy, span[1]], [copy * span[0] / 1e3, peak, peak], color=color, linewidth=1.2,
                  label=f"{kind}: copy {copy:,.0f} GB/s, {peak:.2f} TFLOP/s")  # fmt: skip
        for mode, mark in (("throughput", "o"), ("batch1", "^")):
            points = [
                (1e3 * float(r["tflop_s"]) / float(r["gb_s"]), float(r["tflop_s"]))
                for r in rows
                if is_ours(r["backend"]) and r["dtype"] == kind and r["mode"] == mode and float(r["gb_s"])
            ]
            axes.scatter([x for x, _ in points], [y for _, y in points], color=color, marker=mark, s=22, zorder=3)
    axes.set(xscale="log", yscale="log", xlim=span, xlabel="FLOP a byte of weights", ylabel="TFLOP/s",
             title="fastbert's encoder: throughput ●, one text ▲")  # fmt: skip
    axes.legend(loc="lower right")
    _plain(axes.xaxis, [1, 10, 100, 1000, 10000])
    _plain(axes.yaxis)


def _op_roofs(axes: Any, rows: Sequence[Row], theme: Mapping[str, str]) -> None:
    labels = sorted({f"{r['op']} {r['case']}" for r in rows}, reverse=True)
    for backend, color, shift in (("native", theme["ours"], 0.2), ("reference", theme["faint"], -0.2)):
        found = {f"{r['op']} {r['case']}": float(r["roof_percent"]) for r in rows if r["backend"] == backend}
        axes.barh([labels.index(k) + shift for k in found], list(found.values()), height=0.38, color=color,
                  label=backend)  # fmt: skip
    axes.axvline(100, color=theme["ink"], linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set(xlabel="% of the measured roof", title="ops, forward, float32")
    axes.grid(False, axis="y")
    axes.legend(loc="lower right", frameon=True, facecolor=theme["paper"], edgecolor="none", framealpha=1.0)


FIGURES: dict[str, Callable[[Sequence[Row], Mapping[str, str]], Figure | None]] = {
    "peers": peers, "throughput": throughput, "latency": latency, "roofline": roofline,
}  # fmt: skip


def draw(name: str, rows: Sequence[Row], theme: str) -> Figure | None:
    """A figure by its name, or None where the rows hold nothing for it."""
    with mpl.rc_context(_style(THEMES[theme])):
        return FIGURES[name](rows, THEMES[theme])


def svg(figure: Figure) -> str:
    """The figure as SVG text, the same for the same rows."""
    out = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "fastbert"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def save(rows: Sequence[Row], folder: Path, names: Iterable[str] = FIGURES) -> list[Path]:
    """Write `<name>.svg` and `.png`, light, for pages that have no theme."""
    written = []
    for name in names:
        if (figure := draw(name, rows, "light")) is not None:
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=150)
            path.with_suffix(".svg").write_text(svg(figure), encoding="utf-8")
            written += [path, path.with_suffix(".svg")]
    return written
