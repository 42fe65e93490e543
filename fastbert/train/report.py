"""What people see of a run: a live line, a log in JSON lines, TensorBoard's files. It computes nothing."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LOG = "log.jsonl"
_NOT_PLOTTED = ("step", "epoch", "seconds")


class Report:
    """Speaks and writes for rank 0; on other ranks, and without a folder, it does less.

    Attributes:
        history: every record of the run so far, those of before a resumed checkpoint included.
    """

    def __init__(
        self,
        folder: Path | None,
        history: Sequence[dict[str, Any]],
        total: float | None,
        start: int,
        quiet: bool,
        report_to: str,
    ) -> None:
        """
        Args:
            folder: where `log.jsonl` and TensorBoard's files go.
            history: records that a checkpoint held.
            total: optimiser steps of the run, None if a time budget ends it.
            start: steps that were done before.
            quiet: print nothing.
            report_to: as in `TrainArguments`.

        Raises:
            ImportError: TensorBoard was asked for, but is not installed.
        """
        self.history = list(history)
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self._began = time.perf_counter()
        self._log = self._rewritten_log(folder) if folder is not None else None
        self._board = _tensorboard(folder, start, report_to) if folder is not None else None
        self._total, self._start, self._first = total, start, True
        self._live: Progress | None = None
        if self.console.is_terminal and not quiet:
            told = TextColumn("{task.fields[told]}")
            self._live = Progress(
                BarColumn(bar_width=20), MofNCompleteColumn(), told, TimeRemainingColumn(), console=self.console
            )
            self._task = self._live.add_task("", total=total, completed=start, told="")
            self._live.start()

    def _rewritten_log(self, folder: Path) -> Any:
        """The log holds what the run that continues holds: lines that a killed run wrote past it are gone."""
        path, scratch = folder / LOG, folder / f".{LOG}"
        scratch.write_text("".join(json.dumps(record) + "\n" for record in self.history), encoding="utf-8")
        os.replace(scratch, path)
        return path.open("a", encoding="utf-8")

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, markup=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        """Move the bar of the live line."""
        if self._live is not None:
            self._live.update(self._task, completed=step)

    def write(self, record: Mapping[str, Any]) -> None:
        """A record: to the history, the log, TensorBoard and the screen; JSON has no NaN, so that becomes None."""
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.history.append(record)
        if self._log is not None:
            self._log.write(json.dumps(record) + "\n")
            self._log.flush()
        if self._board is not None:
            for name, value in record.items():
                if isinstance(value, (int, float)) and name not in _NOT_PLOTTED:
                    self._board.add_scalar(name, value, record["step"])
        if self._live is not None and "loss" in record:
            self._live.update(self._task, completed=record["step"], told=describe(record))
        else:
            self.say(f"{self._count(record['step'])}  {describe(record)}{self._remaining(record)}")

    def _count(self, step: int) -> str:
        return f"step {step}" + (f"/{self._total:.0f}" if self._total else "")

    def _remaining(self, record: Mapping[str, Any]) -> str:
        done = record["step"] - self._start
        if not self._total or done <= 0 or "loss" not in record:
            return ""
        seconds = (time.perf_counter() - self._began) / done * (self._total - record["step"])
        minutes, hours = int(seconds // 60) % 60, int(seconds // 3600)
        return f"  eta {hours}:{minutes:02d}:{int(seconds) % 60:02d}"

    def close(self) -> None:
        """End the live line, close the files."""
        for part in (self._live and self._live.stop, self._log and self._log.close, self._board and self._board.close):
            if part:
                part()
        self._live = self._log = self._board = None


def describe(record: Mapping[str, Any]) -> str:
    """A record as one line of text."""
    parts = [f"epoch {record['epoch']:.2f}"] if "epoch" in record else []
    for name, value in record.items():
        if name in _NOT_PLOTTED or not isinstance(value, (int, float)):
            continue
        if name == "learning_rate":
            parts.append(f"lr {value:.2e}")
        elif name == "tokens_per_second":
            parts.append(f"{value:,.0f} tokens/s")
        elif name in ("mfu", "padding_saved"):
            parts.append(f"{name.replace('_', ' ')} {100 * value:.0f} %")
        else:
            parts.append(f"{name.replace('_', ' ')} {value:.4g}")
    return "  ".join(parts)


def _tensorboard(folder: Path, start: int, report_to: str) -> Any:
    if report_to == "none" or (report_to == "auto" and find_spec("tensorboard") is None):
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("report_to='tensorboard' needs tensorboard: pip install tensorboard") from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)
