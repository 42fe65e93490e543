"""`fastbert doctor`: the machine and the installation examined."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer

from fastbert.cli.application import app, option


@app.command()
def doctor(
    measure: Annotated[
        bool, option("What", "Measure roofs and a MiniLM-shaped encoder.", "--measure/--no-measure")
    ] = True,
    as_json: Annotated[bool, option("Output", "The findings as JSON on stdout.", "--json")] = False,
) -> None:
    """Say what this machine is, what would run on it and how fast, and what to change; exit 1 if it is broken."""
    from dataclasses import asdict

    from rich.console import Console

    from fastbert.doctor import examine

    with Console(stderr=True).status("examining") as status:
        report = examine(measure, status.update)
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=1))
    else:
        _show(Console(markup=False), report)
    raise typer.Exit(1 if report.broken else 0)


def _show(console: Any, report: Any) -> None:
    from rich.columns import Columns
    from rich.table import Table

    m, n = report.machine, report.native
    cores = f"{m['usable']} usable of {m['cores']}"
    limits = [f"affinity {m['affinity']}"] if m["affinity"] < m["cores"] else []
    limits += [f"quota {m['quota']:g}"] if m["quota"] is not None else []
    facts = [
        ("machine", f"{m['cpu']}, {m['memory_gib']} GiB, {m['system']}"),
        ("features", " ".join(m["features"]) or "none that matter here"),
        ("cores", ", ".join([cores, *limits, f"torch runs {m['threads']} threads"])),
        ("GPUs", ", ".join(f"{n} x {gpu}" for gpu, n in Counter(m["gpus"]).items()) or "none"),
        ("versions", ", ".join(f"{k} {v or 'not installed'}" for k, v in report.versions.items())),
    ]
    if report.environment:
        facts.append(("environment", " ".join(f"{k}={v}" for k, v in report.environment.items())))
    isa = f"{n['isa']} (FASTBERT_ISA may name {', '.join(n['supported'])})" if n["loads"] else n["why"]
    facts += [("extension", isa), *((f"{what} encoder", plan) for what, plan in report.engines.items())]
    console.print(_pairs(facts, "bold"))
    grids = []
    for device, by_dtype in next(iter(report.ops.values())).items():
        grids.append(Table(f"op on {device}", *by_dtype))
        for op, by_device in report.ops.items():
            grids[-1].add_row(op, *by_device[device].values())
    console.print(Columns(grids))
    console.print("reference: plain PyTorch", style="dim", highlight=False)
    console.print(_pairs([line.split(": ", 1) for line in report.reasons], "dim"), style="dim", highlight=False)
    if report.measured:
        console.print(_speeds(report.measured))
        copies = (f"{key.split()[0]} {row['gb_s']:,.0f} GB/s" for key, row in report.measured.items() if "gb_s" in row)
        console.print(
            f"A copy of memory: {', '.join(copies)}. The roof is the CPU's densest arithmetic; the GEMM is torch's, "
            "and a GPU's roof. The encoder has MiniLM's shape and 16 to 128 tokens a text; BERT-base's tokens/s "
            "follow from its TFLOP/s.",
            style="dim",
            highlight=False,
        )
    words = {True: "[bold red]broken:[/]", False: "[yellow]advice:[/]"}
    cures = [(words[f.broken], f"{f.what}. {f.cure[:1].upper()}{f.cure[1:]}.") for f in report.findings]
    console.print(_pairs(cures) if cures else "nothing to change", style=None if cures else "green", highlight=False)


def _pairs(rows: Iterable[Sequence[str]], style: str = "") -> Any:
    """Two columns, so that a long line goes on below where it began; markup in the first one only."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style=style, no_wrap=True)
    for head, text in rows:
        grid.add_row(Text.from_markup(head), Text(text))
    return grid


def _speeds(measured: dict[str, dict[str, float]]) -> Any:
    from rich.table import Table

    table = Table("measured")
    for head in ("roof\nTFLOP/s", "GEMM\nTFLOP/s", "encoder\nTFLOP/s", "of the\nroof", "encoder\ntokens/s"):
        table.add_column(head, justify="right")
    table.add_column("BERT-base\ntokens/s", justify="right")
    for what, row in measured.items():
        if "tokens_s" in row:
            share = row["encoder_gflop_s"] / row["peak_gflop_s"]
            rates = (f"{row[f'{name}_gflop_s'] / 1e3:.2f}" for name in ("peak", "gemm", "encoder"))
            table.add_row(what, *rates, f"{share:.0%}", f"{row['tokens_s']:,.0f}", f"{row['base_tokens_s']:,.0f}")
    return table
