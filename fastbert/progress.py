"""A progress bar on stderr that counts texts and shows tokens per second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress(total: int, show: bool) -> Iterator[Callable[[int, int], None]]:
    """Gives a function to call with (texts, tokens) that were done since; without `show` it does nothing."""
    if not show:
        yield lambda num_texts, num_tokens: None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Progress("texts", *columns, console=Console(stderr=True)) as bar:
        task, start, tokens = bar.add_task("", total=total, rate=""), time.perf_counter(), 0

        def advance(num_texts: int, num_tokens: int) -> None:
            nonlocal tokens
            tokens += num_tokens
            rate = tokens / (time.perf_counter() - start)
            bar.update(task, advance=num_texts, rate=f"{rate:,.0f} tokens/s")

        yield advance
