"""One page of a folder of rows: figures, where a peer wins, all numbers, the method. It needs no other file."""

from __future__ import annotations

import base64
import csv
import re
from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from benchmarks import plots

Row = dict[str, str]

CAPTIONS = {
    "peers": "Texts to vectors, tokenisation included, many texts a call; bars are medians, lines the middle 60 % of "
    "rounds, in brackets times sentence-transformers in fp32, by the faster half of the rounds (~: unsteady).",
    "throughput": "The same by length of the texts, each number format by itself. Padding is never counted as tokens.",
    "latency": "One text a call, by its length.",
    "roofline": "Encoders: arithmetic a byte of weights read, below a copy of the weights' size and the arithmetic "
    "that this machine's units did out of registers in the same run. Ops: each against the slower of its bytes at the "
    "speed of a copy of that size and its arithmetic at that of the units.",
}
METHOD = (
    "Every provider gets the same texts and the same token ids and takes one turn a round, and a round goes through "
    "all texts, so that a slow moment of the machine hits all alike. Each lives in a process of its own, stopped while "
    "others have their turn: no library's waiting threads take another's cores. Twice in a run all processes start "
    "anew, since where memory lies is drawn once a process.",
    "Times are medians. Ratios are of the faster half of the rounds of both: what else the machine does only ever adds "
    "time, to some more than to others. A ratio that differs by more than 10 % between the parts of the run is "
    "marked ~.",
    "Correctness comes first: vectors are held against the model in fp64, and below a cosine of 0.9995 there is no "
    "row. int8 changes vectors more than that in every library: its rows carry their worst cosine instead.",
    "A turn begins with calls that do not count, and its sample is the median of some milliseconds of calls. Roofs are "
    "a copy, and the densest arithmetic of the CPU's instructions on all threads.",
    "“tuned” peers run as their documentation says for throughput, the others as most people run them.",
)
COLUMNS = {
    "op": "op", "case": "case", "backend": "provider", "mode": "mode", "dtype": "format", "ms_p50": "ms p50",
    "ms_p20": "p20", "ms_p80": "p80", "times_base": "x base", "times_low": "low", "times_high": "high",
    "roof_percent": "% roof", "padding_percent": "% padding", "worst_cosine": "worst cosine", "load": "load",
    "version": "version", "commit": "commit", "date": "date",
}  # fmt: skip
STYLE = """
:root{color-scheme:light dark;--ink:#1f2328;--faint:#59636e;--line:#d8dee4;--paper:#fff;--ours:#d1340f;--soft:#f6f8fa}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--faint:#9198a1;--line:#3d444d;--paper:#15191f;--ours:#ff7a52;
--soft:#1d232b}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1180px;margin:2rem auto;
padding:0 1rem}h1{margin:0}h2{margin:2.2rem 0 .4rem}figure{margin:0 0 1.2rem;overflow-x:auto}
figure img{max-width:100%}@media(max-width:800px){figure img{max-width:none}}
figcaption,.facts{color:var(--faint)}.scroll{overflow:auto;max-height:75vh;border:1px solid var(--line)}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums;width:100%}
td,th{padding:.2rem .55rem;text-align:left;white-space:nowrap;border-bottom:1px solid var(--line)}
td.n,th.n{text-align:right}.scroll th{position:sticky;top:0;background:var(--soft);cursor:pointer}
tr.ours td{color:var(--ours);font-weight:600}input{font:inherit;padding:.3rem .5rem;margin:.3rem 0;width:22rem;
max-width:100%}th[aria-sort=ascending]::after{content:" ▲"}th[aria-sort=descending]::after{content:" ▼"}
"""
SCRIPT = """
const body=document.querySelector('#rows tbody');
document.querySelectorAll('#rows th').forEach((head,i)=>{head.tabIndex=0;const sort=()=>{
const up=head.ariaSort!=='ascending';document.querySelectorAll('#rows th').forEach(h=>h.ariaSort='none');
head.ariaSort=up?'ascending':'descending';
const key=r=>r.cells[i].textContent;
const order=(a,b)=>{const x=key(a),y=key(b),n=parseFloat(x.replaceAll(',',''))-parseFloat(y.replaceAll(',',''));
return head.classList.contains('n')?(isNaN(n)?(x==='')-(y===''):n):x.localeCompare(y)};
[...body.rows].sort((a,b)=>up?order(a,b):order(b,a)).forEach(r=>body.append(r))};
head.onclick=sort;head.onkeydown=e=>{if(e.key==='Enter')sort()}});
document.querySelector('#filter').oninput=e=>{const words=e.target.value.toLowerCase().split(/\\s+/);
for(const r of body.rows)r.hidden=!words.every(w=>r.textContent.toLowerCase().includes(w))};
"""


def read(folder: Path) -> list[Row]:
    """Rows of ops and encoders in a folder, those with ratios."""
    rows: list[Row] = []
    for path in sorted([*folder.glob("encoder-*.csv"), *folder.glob("ops-*.csv")]):
        with path.open(newline="") as file:
            rows += [row for row in csv.DictReader(file) if row.get("times_high")]
    return rows


def peer_wins(rows: Sequence[Row]) -> list[str]:
    """A sentence for each list of texts and number format where a peer is faster than we are, and for each op that is
    slower than its reference."""
    found = []
    for (_, _, mode, dtype), group in groupby(sorted(rows, key=_what), key=_what):
        members = sorted(group, key=lambda r: float(r["ms_p50"]))
        ours = next((r for r in members if plots.is_ours(r["backend"])), None)
        best = members[0]
        if ours is not None and best is not ours:
            times = float(ours["ms_p50"]) / float(best["ms_p50"])
            found.append(
                f"{dtype}, {mode}, {_case(best)}: {best['backend']} is {times:.2f} times as fast as {ours['backend']}"
            )
    return found


def _what(row: Row) -> tuple[str, str, str, str]:
    return row["op"], row["case"], row["mode"], row["dtype"]


def _case(row: Row) -> str:
    """What was computed, in words."""
    if row["op"] != "encode":
        return f"{row['op']} {row['case']}"
    texts, tokens = plots.size_of(row)
    return f"{row['case'].split('-')[0]} texts, {texts} of {tokens / texts:.0f} tokens" if texts > 1 else (
        f"one text of {tokens} tokens")  # fmt: skip


def _place(row: Row) -> tuple[bool, str, str, list[int], str, str]:
    """Where a row stands in the table: encoders first, by kind of texts, by their number and length."""
    numbers = [int(n) for n in re.findall(r"\d+", row["case"])]
    return row["op"] != "encode", row["op"], re.sub(r"\d+", "", row["case"]), numbers, row["mode"], row["dtype"]


def _picture(name: str, rows: Sequence[Row]) -> str:
    figures = {theme: plots.draw(name, rows, theme) for theme in plots.THEMES}
    data = {
        theme: "data:image/svg+xml;base64," + base64.b64encode(plots.svg(figure).encode()).decode()
        for theme, figure in figures.items()
        if figure is not None
    }
    if not data:
        return ""
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{data["dark"]}">'
        f'<img alt="{name}" src="{data["light"]}"></picture><figcaption>{CAPTIONS[name]}</figcaption></figure>'
    )


def render(rows: Sequence[Row], notes: Sequence[str] = ()) -> str:
    """The page.

    Args:
        rows: as `read` gives them.
        notes: what was left out, and why.
    """
    first = rows[0]
    loads = [float(r["load"]) for r in rows]
    commits, dates = sorted({r["commit"] for r in rows}), sorted({r["date"] for r in rows})
    facts = (
        f"{first['device']}, {first['threads']} threads, kernels for {first['isa']}, torch {first['torch']}; load "
        f"average {min(loads):.1f} to {max(loads):.1f}; commit {', '.join(commits)}; {', '.join(dates)}"
    )
    wins = peer_wins(rows)
    measured = ("roof_percent", "padding_percent", "worst_cosine", "load")
    numeric = {c for c in COLUMNS if c.startswith(("ms_", "times_")) or c in measured}
    heads = "".join(f'<th scope="col"{_number(c in numeric)}>{escape(t)}</th>' for c, t in COLUMNS.items())
    lines = []
    for row in sorted(rows, key=_place):
        ours = ' class="ours"' if plots.is_ours(row["backend"]) else ""
        values = ((c, "" if row[c] == "nan" else row[c]) for c in COLUMNS)
        lines.append(
            f"<tr{ours}>" + "".join(f"<td{_number(c in numeric)}>{escape(v)}</td>" for c, v in values) + "</tr>"
        )
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>fastbert bench: {escape(first['device'])}</title><style>{STYLE}</style>",
        f'<h1>fastbert bench</h1><p class="facts">{escape(facts)}</p>',
        *(_picture(name, rows) for name in plots.FIGURES),
        "<h2>Where a peer wins</h2>",
        _bullets(wins)
        if wins
        else "<p>Nowhere in these rows, within a number format; of ops the peer is the reference.</p>",
        "<h2>Not measured</h2>" + _bullets(notes) if notes else "",
        "<h2>All numbers</h2><p>Base: an op's reference in plain PyTorch, of int8_linear the float layer; "
        "sentence-transformers in fp32. A click on a "
        'head sorts.</p><input id="filter" placeholder="filter: e.g. encode int8 length" aria-label="filter rows">',
        f'<div class="scroll"><table id="rows"><thead><tr>{heads}</tr></thead>',
        f"<tbody>{''.join(lines)}</tbody></table></div>",
        f"<h2>Method</h2>{_bullets(METHOD)}<script>{SCRIPT}</script></html>",
    ]
    return "\n".join(parts)


def _number(numeric: bool) -> str:
    return ' class="n"' if numeric else ""


def _bullets(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"
