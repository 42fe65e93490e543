"""Two files of rows: what is slower in the new one, by a statistical test, and whether their ratios agree."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from benchmarks import harness

KEY = ("op", "case", "backend", "mode", "dtype")
BASES = ("torch-linear", "reference", "sentence-transformers")  # of int8_linear, of other ops, of encoders
ALPHA = 0.01  # of finding any regression where there is none, over all rows together
LEAST = harness.AGREE  # less is not called a regression

Key = tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """One row in both files.

    Attributes:
        key: op, case, backend, mode, dtype.
        times: how many times as long the new one takes, by medians or by the fast tenth, whichever is nearer to 1:
            a machine in another state moves either.
        p: probability of means so far apart if nothing changed, corrected for the number of rows (Holm).
        relative: whether times were divided by the base's of the same round.
    """

    key: Key
    times: float
    p: float
    relative: bool

    @property
    def regressed(self) -> bool:
        """Slower beyond chance and beyond what two runs differ by."""
        return self.times >= LEAST and self.p < ALPHA

    @property
    def improved(self) -> bool:
        """Faster beyond both."""
        return self.times <= 1 / LEAST and self.p < ALPHA


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as its base one row is in both files.

    Attributes:
        key: op, case, backend, mode, dtype.
        old, new: of the whole runs.
        steady: whether the parts of each run agree.
    """

    key: Key
    old: float
    new: float
    steady: bool

    @property
    def apart(self) -> float:
        """The larger over the smaller one."""
        return max(self.old, self.new) / min(self.old, self.new)


def read(path: Path) -> dict[Key, list[float]]:
    """Samples in ms by key; rows without samples are left out.

    Raises:
        ValueError: it is not a file of rows.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not set(KEY) <= rows[0].keys():
        raise ValueError(f"{path} holds no rows of ops or encoders: they have the columns {', '.join(KEY)}")
    found = {tuple(r[k] for k in KEY): [float(v) for v in r["samples"].split(";")] for r in rows if r.get("samples")}
    if not found:
        raise ValueError(f"{path} holds no samples, which rows have since 2026-11-27: measure again")
    return found


def _base(key: Key, table: dict[Key, list[float]]) -> list[float] | None:
    """Samples of the row's base in the same rounds."""
    op, case, backend, mode, dtype = key
    for base in BASES:
        samples = table.get((op, case, base, mode, "float32" if base == "sentence-transformers" else dtype))
        if samples is not None:
            return samples if base != backend and len(samples) == len(table[key]) else None
    return None


def ratios(old: dict[Key, list[float]], new: dict[Key, list[float]]) -> list[Ratio]:
    """Rows whose base is in both files, those that differ most first."""
    found = []
    for key in old.keys() & new.keys():
        sides = [harness.times_base(_base(key, table), table[key]) for table in (old, new)]
        if not any(math.isnan(whole) for whole, *_ in sides):
            steady = not any(harness.mark(*parts) for _, *parts in sides)
            found.append(Ratio(key, sides[0][0], sides[1][0], steady))
    return sorted(found, key=lambda ratio: -ratio.apart)


def agreement(found: list[Ratio]) -> str:
    """How many ratios agree, and which do not."""
    apart = [ratio for ratio in found if ratio.apart > harness.AGREE]
    within = f"within {100 * (harness.AGREE - 1):.0f} %"
    lines = [f"{len(found) - len(apart)} of {len(found)} ratios agree {within}"]
    for ratio in apart:
        known = "" if ratio.steady else " (~: unsteady within a run)"
        lines.append(f"  {' '.join(ratio.key)}: {ratio.old:.2f} then, {ratio.new:.2f} now{known}")
    return "\n".join(lines)


def holm(ps: Iterable[float]) -> list[float]:
    """Holm's correction: the probability that any of the tests errs stays below the level."""
    values = list(ps)
    corrected, running = [0.0] * len(values), 0.0
    for rank, i in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        running = max(running, min(1.0, (len(values) - rank) * values[i]))
        corrected[i] = running
    return corrected


def compare(old: dict[Key, list[float]], new: dict[Key, list[float]]) -> list[Change]:
    """Rows in both, the most slowed first: Welch's test of logarithms (two-sided), Holm's correction over all rows.

    Lists of texts have few samples a run: no test of ranks could tell them apart after a correction over hundreds.

    Where both files have the row's base, each sample is divided by the base's of its round: a machine that is slower as
    a whole has not regressed. Bases themselves are compared by their times, and judged last.
    """
    from scipy.stats import ttest_ind

    found: list[tuple[Key, float, float, bool]] = []
    for key in old.keys() & new.keys():
        bases = _base(key, old), _base(key, new)
        relative = bases[0] is not None and bases[1] is not None
        if not relative and any(base in key for base in BASES):
            continue  # what others compute is no regression of ours
        sides = []
        for samples, base in zip((old[key], new[key]), bases, strict=True):
            sides.append([s / b for s, b in zip(samples, base, strict=True)] if relative and base else samples)
        times = min(
            (of(sides[1]) / of(sides[0]) for of in (statistics.median, harness.fast_tenth)),
            key=lambda t: abs(math.log(t)),
        )
        logs = [[math.log(value) for value in side] for side in sides]
        p = float(ttest_ind(*logs, equal_var=False).pvalue) if min(map(len, logs)) > 2 else 1.0
        found.append((key, times, p, relative))
    corrected = holm(p for _, _, p, _ in found)
    changes = [Change(key, times, p, rel) for (key, times, _, rel), p in zip(found, corrected, strict=True)]
    return sorted(changes, key=lambda change: -change.times)


def table(changes: list[Change]) -> Table | str:
    """What changed beyond chance."""
    told = [change for change in changes if change.regressed or change.improved]
    title = f"{len(changes)} rows in both; slower or faster by {LEAST:.2f} times, p < {ALPHA} after Holm"
    if not told:
        return f"{title}: none"
    shown = harness.table(("row", "new / old", "p", ""), title, num_text=1)
    for change in told:
        verdict = "[red]slower[/]" if change.regressed else "[green]faster[/]"
        by = "" if change.relative else " (by time: no base)"
        shown.add_row(" ".join(change.key) + by, f"{change.times:.2f}", f"{change.p:.0e}", verdict)
    return shown
