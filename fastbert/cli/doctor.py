"""`fastbert doctor`: the machine and the installation examined."""

from __future__ import annotations

import json
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
    from rich.table import Table

    m, n = report.machine, report.native
    cores = f"{m['usable']} usable of {m['cores']}"
    limits = [f"affinity {m['affinity']}"] if m["affinity"] < m["cores"] else []
    limits += [f"quota {m['quota']:g}"] if m["quota"] is not None else []
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_row("machine", f"{m['cpu']}, {m['memory_gib']} GiB, {m['system']}")
    facts.add_row("features", " ".join(m["features"]) or "none that matter here")
    facts.add_row("cores", ", ".join([cores, *limits, f"torch runs {m['threads']} threads"]))
    facts.add_row("GPUs", ", ".join(m["gpus"]) or "none")
    facts.add_row("versions", ", ".join(f"{k} {v or 'not installed'}" for k, v in report.versions.items()))
    if report.environment:
        facts.add_row("environment", " ".join(f"{k}={v}" for k, v in report.environment.items()))
    facts.add_row("extension", f"{n['isa']} (this CPU offers {', '.join(n['supported'])})" if n["loads"] else n["why"])
    for what, plan in report.engines.items():
        facts.add_row(f"{what} encoder", plan)
    console.print(facts)
    devices = list(next(iter(report.ops.values())))
    grid = Table("op", *(f"{device} {dtype}" for device in devices for dtype in ("float32", "bfloat16", "float16")))
    for op, by_device in report.ops.items():
        grid.add_row(op, *(backend for device in devices for backend in by_device[device].values()))
    console.print(grid)
    for reason in report.reasons:
        console.print(f"  {reason}", style="dim", highlight=False)
    if report.measured:
        console.print(_speeds(report.measured))
    for finding in report.findings:
        style, word = ("bold red", "broken") if finding.broken else ("yellow", "advice")
        console.print(f"{word}: ", style=style, end="")
        console.print(f"{finding.what}. {finding.cure[:1].upper()}{finding.cure[1:]}.", highlight=False)
    if not report.findings:
        console.print("nothing to change", style="green")


def _speeds(measured: dict[str, dict[str, float]]) -> Any:
    from rich.table import Table

    table = Table(
        "measured",
        "roof GFLOP/s",
        "torch's GEMM",
        "encoder (of the roof)",
        "tokens/s",
        "texts/s of 29 tokens",
        "expected of BERT-base",
    )
    for dtype, row in measured.items():
        if dtype != "copy":
            share = f"{row['encoder_gflop_s']:,.0f} ({row['encoder_gflop_s'] / row['peak_gflop_s']:.0%})"
            speeds = (row["tokens_s"], row["tokens_s"] / 29, row["base_tokens_s"])
            roofs = (f"{row[name]:,.0f}" for name in ("peak_gflop_s", "gemm_gflop_s"))
            table.add_row(dtype, *roofs, share, *(f"{speed:,.0f}" for speed in speeds))
    table.caption = (
        f"memory copies {measured['copy']['gb_s']:.1f} GB/s; the roof is the CPU's densest arithmetic, measured; "
        "the encoder has MiniLM's shape, 16 to 128 tokens a text; BERT-base's tokens/s are computed from its GFLOP/s"
    )
    return table
