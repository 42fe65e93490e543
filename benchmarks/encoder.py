"""`python -m benchmarks.encoder`: texts to vectors end to end, each peer on the same texts, in turns.

Throughput is a whole list of texts, tokenisation included; batch1 is one text a call, typical of the list or of an
exact number of tokens. A peer whose vectors differ (worst cosine below the gate) gets no row.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path

import numpy as np
import torch
from rich.console import Group
from rich.table import Table

from benchmarks import harness
from benchmarks.models import MADE, folder_of
from benchmarks.providers import (
    BASE,
    OWN,
    chosen,
    compiles,
    dtype_of,
    make,
    package_of,
    padding_percent,
    reason_against,
)
from benchmarks.texts import WORDS, real_texts
from benchmarks.turns import Cell, Failed, Provider, Suite, Times, measure
from fastbert import Embedder
from fastbert.hub import DEFAULT_MODEL
from fastbert.sentence_folder import read_folder

GATE = 0.9995
LENGTHS = (16, 32, 64, 128, 256, 512)  # tokens of a lone text


def started(names: Sequence[str], folder: Path, scratch: Path, stack: ExitStack) -> list[Provider]:
    """A process of each provider that can run here; the others are named with the reason, and what to do."""
    found = []
    with harness.progress("starting providers") as progress:
        for i, name in enumerate(names):
            progress(i / len(names))
            if (reason := reason_against(name)) is not None:
                print(f"{name}: {reason}")
                continue
            try:
                found.append(stack.enter_context(Provider(name, make, name, folder, scratch, compiles=compiles(name))))
            except Failed as failed:
                print(f"{name}: no row: {failed}")
    return found


def worst_cosine(vectors: np.ndarray, exact: np.ndarray) -> float:
    """Least cosine of two lists of vectors, those of `exact` of length 1; a length rounded to bfloat16 is no error."""
    vectors = vectors.astype(np.float64)
    return float(((vectors * exact).sum(1) / np.linalg.norm(vectors, axis=1)).min())


def roomy(folder: Path, length: int, stack: ExitStack) -> Path:
    """The model's folder, or a copy whose `max_seq_length` leaves room for `length` tokens."""
    described = read_folder(folder)
    if (described.max_seq_length or length) >= length:
        return folder
    copy = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastbert-model-")))
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    settings = copy / "sentence_bert_config.json"
    told = json.loads(settings.read_text())
    settings.write_text(json.dumps({**told, "max_seq_length": length}))
    return copy


def text_of(length: int, encode: Callable[[list[str]], list[list[int]]]) -> str:
    """English of exactly so many tokens: whole words, then a word of one token as often as need be."""
    words = real_texts((length, length), 1, seed=length)[0].split()
    around = len(encode([""])[0])
    sizes = accumulate((len(ids) - around for ids in encode(words)), initial=around)
    words = words[: sum(size <= length for size in sizes) - 1]  # never longer than the tokenizer's own limit
    while len(encode([" ".join(words)])[0]) > length:
        words.pop()
    return " ".join(words + ["the"] * (length - len(encode([" ".join(words)])[0])))


@dataclass(frozen=True)
class Case:
    """Texts of one call, and who may have a row.

    Attributes:
        what: the kind of texts.
        mode: throughput of a list, or batch1.
        texts: of one call.
        cosines: worst cosine of each provider that passed.
    """

    what: str
    mode: str
    texts: list[str]
    cosines: dict[str, float]

    def cell(self, providers: Sequence[Provider]) -> Cell:
        """What takes turns: lists, of which a round takes seconds, longer than lone texts, and these than an op."""
        able = [provider for provider in providers if provider.name in self.cosines]
        share, least_ms = (6, 20.0) if self.mode == "batch1" else (16, 1.0)
        return Cell(self.texts, able, warm=self.texts[:1], share=share, least_ms=least_ms)


@dataclass(frozen=True)
class Bench:
    """What all measurements of a run share.

    Attributes:
        providers: those that run.
        exact: the model in fp64, which judges them.
        roofs: by dtype.
    """

    providers: Sequence[Provider]
    exact: Embedder
    roofs: dict[str, harness.Roofs]

    def gate(self, what: str, texts: list[str]) -> dict[str, float]:
        """Worst cosine of each provider that may have a row."""
        exact = self.exact.encode(texts, normalize_embeddings=True)
        cosines = {}
        for provider in self.providers:
            try:
                cosines[provider.name] = worst_cosine(provider.call(texts), exact)
            except Failed as failed:
                print(f"{what}: {provider.name}: no row: {failed}")
        kept = {name: cosine for name, cosine in cosines.items() if cosine >= GATE or "int8" in name}
        for name in cosines.keys() - kept.keys():
            print(f"{what}: {name} fails the gate, worst cosine {cosines[name]:.6f}")
        return kept

    def rows(self, case: Case, times: Times) -> list[harness.Row]:
        """Rows of one case, from the samples of each provider in ms."""
        ids = self.exact.tokenizer.encode(case.texts).ids
        tokens, squares = sum(map(len, ids)), sum(len(i) ** 2 for i in ids)
        config = self.exact.model.config
        layers, D, F = config.num_hidden_layers, config.hidden_size, config.intermediate_size
        weights = layers * (4 * D * D + 2 * D * F)
        flop = 2 * weights * tokens + 4 * layers * D * squares
        rows = []
        for name, ms in times.items():
            p50, p20, p80 = harness.percentiles(ms)
            nbytes = weights * {"float32": 4, "bfloat16": 2, "int8": 1}[dtype_of(name)]  # read once a call, at least
            roofs = self.roofs[dtype_of(name)].beside_cache(nbytes, "cpu")
            times_base, low, high = harness.times_base(times.get(BASE), ms)
            rows.append(
                harness.Row(
                    "encode", f"{case.what}-{len(case.texts)}x{tokens}", name, case.mode, dtype_of(name),
                    *(round(v, 4) for v in (p50, p20, p80)), round(nbytes / p50 / 1e6, 3), round(flop / p50 / 1e9, 4),
                    round(100 * roofs.bound_ms(nbytes, flop) / p50, 1), round(harness.fast_tenth(ms), 4),
                    times_base, low, high, padding_percent(name, ids), round(case.cosines[name], 6), **roofs.columns(),
                    version=package_of(name), samples=harness.joined(ms),
                )
            )  # fmt: skip
        return rows


def tables(rows: list[harness.Row]) -> Group:
    """A table for each list of texts and mode; the fastest of each dtype class is marked, whosever it is."""
    shown: list[Table | str] = []
    columns = ("provider", "texts/s", "ms p50", "p20", "p80", "x ST", "roof", "pad", "cosine")
    for (case, mode), group in groupby(rows, key=lambda row: (row.case, row.mode)):
        what, _, size = case.rpartition("-")
        count, tokens = map(int, size.split("x"))
        texts = f"{count} texts of {tokens / count:.0f} tokens" if count > 1 else f"one text of {tokens} tokens"
        part = harness.table(columns, f"{what}, {mode}: {texts}", num_text=1)
        members = sorted(group, key=lambda row: row.ms_p50)
        fastest = {row.dtype: row for row in reversed(members)}
        for row in members:
            name = f"[bold]{row.backend}[/]" if row.backend in OWN else row.backend
            part.add_row(
                name + ("*" if fastest[row.dtype] is row else ""), f"{1e3 * count / row.ms_p50:,.0f}",
                *(harness.short(ms) for ms in (row.ms_p50, row.ms_p20, row.ms_p80)),
                f"{harness.mark(row.times_low, row.times_high)}{row.times_base:.2f}", f"{row.roof_percent:.0f} %",
                f"{row.padding_percent:.0f} %", f"{row.worst_cosine:.5f}",
            )  # fmt: skip
        shown += [part, ""]
    legend = (
        "* the fastest of its number format on these texts; x ST: times sentence-transformers in fp32, by the "
        "faster half of the rounds, ~ where the parts of this run differ by more than 10 %; roof: share of the "
        "measured one; pad: share of computed tokens that is padding; cosine: the worst against fp64"
    )
    return Group(*shown, legend)


def prepare(options: Sequence[str], stack: ExitStack) -> Suite:
    """The suite of `options`: providers that run here, and texts that they encode right."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encoder", description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL, help=f"folder, hub id or one of {', '.join(MADE)}")
    parser.add_argument("--seconds", type=float, default=600, help="of turns, all providers and texts together")
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--only", help="providers, separated by commas")
    parser.add_argument("--against", help="peers, separated by commas, beside ours and the base")
    parser.add_argument("--quick", action="store_true", help="a few texts once, to see that all works; writes no rows")
    args = parser.parse_args(options)
    lengths, parts = LENGTHS, harness.PARTS
    if args.quick:
        args.seconds, args.texts, lengths, parts = 0, 8, LENGTHS[::3], 1
    folder = roomy(folder_of(args.model), max(lengths), stack)
    own = "" if args.model == DEFAULT_MODEL else f"{Path(args.model).name} "  # begins the cases of another model
    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastbert-peers-")))
    names = args.only.split(",") if args.only else chosen(args.against)
    providers = started(names, folder, scratch, stack)
    exact = Embedder.from_pretrained(folder, dtype="float32")
    exact.model.double()
    dtypes = dict.fromkeys(dtype_of(provider.name) for provider in providers)
    roofs = {dtype: harness.measure_roofs(getattr(torch, dtype), "cpu") for dtype in dtypes}
    bench = Bench(providers, exact, roofs)
    cases = []
    for mix, words in list(WORDS.items())[: 1 if args.quick else None]:
        texts = real_texts(words, args.texts)
        cosines = bench.gate(mix, texts)
        typical = sorted(texts, key=len)[len(texts) // 2]
        cases += [Case(own + mix, "throughput", texts, cosines), Case(own + mix, "batch1", [typical], cosines)]
    room = exact.model.config.max_position_embeddings
    for length in [n for n in lengths if n <= room]:
        text = text_of(length, lambda texts: exact.tokenizer.encode(texts).ids)
        cases.append(Case(f"{own}length", "batch1", [text], bench.gate(f"length {length}", [text])))

    def finish(found: list[Times]) -> None:
        rows = [row for case, times in zip(cases, found, strict=True) for row in bench.rows(case, times)]
        print(f"{args.model}, {harness.device_name('cpu')}, {torch.get_num_threads()} threads\n")
        harness.console().print(tables(rows))
        harness.keep(rows, harness.file_of(f"{own.strip()}-encoder" if own else "encoder", "cpu"), args.quick)

    return Suite([case.cell(providers) for case in cases], args.seconds, parts, finish)


if __name__ == "__main__":
    measure([(prepare, sys.argv[1:])])
