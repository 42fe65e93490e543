"""Runs an encoder over a corpus: into a file with a bar and resume, onto stdout, or into a table to look at.

It knows neither models (an `encode` function does the work) nor file formats (`corpus` does).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fastbert.corpus import Corpus, CorpusError, Part, VectorFile, jsonl_rows

if TYPE_CHECKING:
    from fastbert.embedder import Embeddings

PREVIEW_ROWS = 20


@dataclass
class _Run:
    """Totals of a run; rows and tokens of resumed parts count into the rows only."""

    corpus: Corpus
    encode: Callable[[list[str]], Embeddings]
    num_rows: int = 0
    num_tokens: int = 0
    num_truncated: int = 0
    start: float = field(default_factory=time.perf_counter)

    def compute(self, texts: list[str]) -> Part:
        out = self.encode(texts)
        self.num_tokens += out.num_tokens
        return self.count(Part(out.vectors.numpy(), texts, out.num_tokens, out.num_truncated))

    def count(self, part: Part) -> Part:
        self.num_rows += len(part.vectors)
        self.num_truncated += part.num_truncated
        return part

    def rate(self) -> str:
        return f"{self.num_tokens / (time.perf_counter() - self.start):,.0f} tokens/s"

    def report(self, target: str, quiet: bool) -> None:
        """One line on stderr; of a quiet run only that texts were cut."""
        if not self.num_rows:
            raise CorpusError(f"no texts in {self.corpus.name}")
        seconds = time.perf_counter() - self.start
        if not quiet:
            print(
                f"rows {self.num_rows:,} | tokens computed {self.num_tokens:,} | {seconds:.1f} s | {self.rate()} | "
                f"truncated {self.num_truncated:,} | {target}",
                file=sys.stderr,
            )
        elif self.num_truncated:
            print(f"warning: {self.num_truncated:,} of {self.num_rows:,} texts were truncated", file=sys.stderr)


@contextmanager
def _bar(run: _Run, quiet: bool) -> Iterator[Callable[[], None]]:
    """A bar on stderr where that is a terminal; call what it yields after each part that was computed."""
    console = Console(stderr=True)
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    hidden = quiet or not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("starting", total=None)

        def update() -> None:
            fraction = run.corpus.fraction_read()
            progress.update(
                task,
                total=None if fraction is None else 1.0,
                completed=fraction or 0.0,
                description=f"{run.num_rows:,} rows  {run.rate()}",
            )

        yield update


def embed_to_file(
    corpus: Corpus,
    file: VectorFile,
    encode: Callable[[list[str]], Embeddings],
    chunk_rows: int,
    quiet: bool = False,
) -> None:
    """Compute the parts that `file` lacks, `chunk_rows` texts each, and assemble it.

    Raises:
        CorpusError: no text at all, or as `corpus` and `file` say. What was computed until then is kept.
    """
    run, num_parts = _Run(corpus, encode), 0
    try:
        with _bar(run, quiet) as update:
            for index, texts in enumerate(corpus.chunks(chunk_rows)):
                finished = file.part(index, texts)
                if finished is None:
                    file.add(index, texts, run.compute(texts))
                    update()
                else:
                    run.count(finished)
                num_parts = index + 1
        if num_parts:
            file.finish(num_parts)
    except BaseException:
        if num_parts:
            print(f"{file.folder} keeps what was computed: the same command with --resume continues", file=sys.stderr)
        raise
    run.report(str(file.path), quiet)


def embed_to_stdout(
    corpus: Corpus,
    encode: Callable[[list[str]], Embeddings],
    chunk_rows: int,
    with_text: bool = True,
    quiet: bool = False,
) -> None:
    """Write JSON lines to stdout as they are computed."""
    run = _Run(corpus, encode)
    for texts in corpus.chunks(chunk_rows):
        part = run.compute(texts)
        sys.stdout.buffer.write(jsonl_rows(run.num_rows - len(texts), part, with_text))
        sys.stdout.buffer.flush()
    run.report("stdout", quiet)


def embed_to_table(corpus: Corpus, encode: Callable[[list[str]], Embeddings], quiet: bool = False) -> None:
    """Show the vectors of the first rows: text, tokens, norm and leading features."""
    run = _Run(corpus, encode)
    texts = list(islice(corpus.texts, PREVIEW_ROWS + 1))
    table = Table("text", "tokens", "norm", "first features")
    table.columns[0].no_wrap, table.columns[0].overflow = True, "ellipsis"
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for text in texts[:PREVIEW_ROWS]:
        part = run.compute([text])  # one by one, for the number of its tokens
        norm, values = (part.vectors[0] ** 2).sum() ** 0.5, " ".join(f"{v: .3f}" for v in part.vectors[0, :4])
        table.add_row(Text(_printable(text)), str(part.num_tokens), f"{norm:.3f}", values)
        table.caption = f"{part.vectors.shape[1]} features a text"
    if texts:
        Console().print(table)
    more = len(texts) > PREVIEW_ROWS
    run.report(f"the first {PREVIEW_ROWS} rows only: --output FILE writes all" if more else "preview", quiet)


def _printable(text: str) -> str:
    """One line that cannot move the terminal's cursor."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split())[:200])
