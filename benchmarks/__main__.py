"""`fastbert bench`, or `python -m benchmarks` in a checkout: suites in processes of their own, then the report.

A suite is a module with a `main`; rows go to one folder, figures and the page are made of the rows there.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer

SOURCE = Path(__file__).parent.parent
SUITES = {
    "ops": "every op x backend x number format, forward and with gradients, beside its reference",
    "encoder": "texts to vectors: throughput by kind of text, one text by length, beside all peers",
    "training": "fine-tuning beside transformers' Trainer, on labelled texts",
    "server": "HTTP under load beside the other servers that are installed",
}
DEFAULT = TOGETHER = ("ops", "encoder")  # they take turns round by round: each sees all of the machine's minutes
TOGETHER_S = 480  # at most, on a slow machine too; what overruns, and the report, stay within ten minutes
# A whole report in minutes: what a suite is told beside the user's own options.
TOLD = {
    "ops": ["--dtype", "float32,bfloat16", "--seconds", "90"],
    "encoder": ["--texts", "96", "--seconds", "310"],
    "training": ["--only", "rotten-tomatoes", "--quick"],
    "server": ["--seconds", "4"],
}

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command()
def bench(
    suites: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(SUITES)}. [default: ops encoder]")] = None,
    against: Annotated[str | None, typer.Option(help="Peers of `encoder`, separated by commas; default all.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few rounds: that all works; the times mean little.")] = False,
    model: Annotated[str | None, typer.Option(help="Folder or hub id; default all-MiniLM-L6-v2.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of every provider; default all cores.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of rows, figures and index.html.")] = Path("bench-report"),
    list_: Annotated[bool, typer.Option("--list", help="What there is, and what installs the missing.")] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="OLD.csv NEW.csv: which ratios agree; exit 1 where the new rows are slower."),
    ] = None,
) -> None:
    """Measure this machine: ops, encoders beside their peers, training, serving; a table, figures and a page."""
    if list_:
        raise typer.Exit(show_list())
    if compare is not None:
        raise typer.Exit(show_changes(*compare))
    chosen = suites or list(DEFAULT)
    if unknown := [name for name in chosen if name not in SUITES]:
        raise typer.BadParameter(f"no suite {unknown[0]!r}; there are {', '.join(SUITES)}")
    if against is not None and "encoder" not in chosen:
        raise typer.BadParameter("--against names peers of the suite encoder, which was not asked for")
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # by way of `finally`
    began, failed = time.perf_counter(), []
    together = [name for name in TOGETHER if name in chosen]
    for names in [together] * bool(together) + [[name] for name in chosen if name not in TOGETHER]:
        options: dict[str, list[str]] = {}
        for name in names:
            options[name] = TOLD[name] + (["--quick"] if quick and "--quick" not in TOLD[name] else [])
            options[name] += ["--model", model] if model is not None and name != "ops" else []
            options[name] += ["--against", against] if against is not None and name == "encoder" else []
            print(f"{name}: {SUITES[name]}", flush=True)
        if run(options, out, threads):
            failed += names
    if report(out):
        print(f"{out / 'index.html'}: the report, after {(time.perf_counter() - began) / 60:.1f} minutes")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        raise typer.Exit(1)


def run(options: dict[str, list[str]], out: Path, threads: int | None) -> int:
    """Suites in a process apart from the libraries that others load; its exit code.

    Args:
        options: of each suite; those of several that take turns.
    """
    environment = {
        **os.environ,
        "FASTBERT_BENCH_OUT": str(out.resolve()),
        "PYTHONPATH": os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")]),
        "TOKENIZERS_PARALLELISM": "true",
        "COLUMNS": str(shutil.get_terminal_size((140, 24)).columns),
    }
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    words = [word for name, told in options.items() for word in ("--", name, *told)][1:]
    module, *words = ["together", str(TOGETHER_S), "--", *words] if words[0] in TOGETHER else words
    log = out / f"{'-'.join(options)}.log"
    with log.open("w", encoding="utf-8") as file:
        command, process = [sys.executable, "-m", f"benchmarks.{module}", *words], None
        try:
            with signals_wait():
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdout=subprocess.PIPE,
                    text=True,
                    encoding="utf-8",
                    start_new_session=True,
                )
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                file.write(line)
            return process.wait()
        finally:
            if process is not None:
                end(process)


@contextmanager
def signals_wait() -> Iterator[None]:
    """SIGINT and SIGTERM that come in the block are raised after it: `Popen` that is interrupted leaves a process that
    nobody knows."""
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def end(process: subprocess.Popen[str], patience_s: float = 10.0) -> None:
    """End a suite that still runs, with all that it started: it leads a process group of its own."""
    if process.poll() is not None:
        return
    if not hasattr(os, "killpg"):
        process.kill()
        return
    with suppress(ProcessLookupError):  # all are gone
        for number in (signal.SIGTERM, signal.SIGCONT):  # who has no turn is stopped, and would not hear the first
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
        os.killpg(process.pid, signal.SIGKILL)


def notes(out: Path) -> list[str]:
    """Lines of the suites' logs that say what was left out."""
    lines = [line.strip() for path in sorted(out.glob("*.log")) for line in path.read_text("utf-8").splitlines()]
    marks = (": missing: ", "fails the gate", "is left out", ": this CPU has no", "no row")
    return [line for line in lines if any(mark in line for mark in marks)]


def report(out: Path) -> bool:
    """Figures and the page out of the rows in a folder; whether there was anything to show."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no figures and no page: missing: pip install matplotlib")
        return False
    from benchmarks import harness, page, plots

    rows = page.read(out)
    if not rows:
        return False
    plots.save(rows, out)
    (out / "index.html").write_text(page.render(rows, notes(out)), encoding="utf-8")
    for line in page.peer_wins(rows):
        harness.console().print(f"a peer wins: {line}", highlight=False, markup=False)
    return True


def show_list() -> int:
    """Suites and providers; a missing one with the line that installs it."""
    from benchmarks import providers

    for name, what in SUITES.items():
        print(f"suite {name}: {what}")
    for name in providers.chosen(None):
        print(f"encoder {name}: {providers.reason_against(name) or 'installed, ' + providers.package_of(name)}")
    return 0


def show_changes(old: Path, new: Path) -> int:
    """What changed between two files of rows, and whether their ratios agree; 1 where something regressed."""
    from benchmarks import compare, harness

    try:
        tables = compare.read(old), compare.read(new)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    changes = compare.compare(*tables)
    if not changes:
        raise typer.BadParameter(f"{old} and {new} have no row in common")
    harness.console().print(compare.table(changes))
    print(compare.agreement(compare.ratios(*tables)))
    regressed = sum(change.regressed for change in changes)
    print(f"{regressed} slower, {sum(change.improved for change in changes)} faster, of {len(changes)}")
    return 1 if regressed else 0


if __name__ == "__main__":
    app(prog_name="fastbert bench")
