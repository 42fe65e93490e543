"""`python -m benchmarks.encoder`: texts to vectors end to end, each peer on the same texts, interleaved.

Throughput is a whole list of texts, tokenisation included; batch1 is one text a call, typical of the list or of an
exact number of tokens. A peer whose vectors differ (worst cosine below the gate) gets no row.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from benchmarks import harness, peers
from benchmarks.models import MADE, folder_of
from benchmarks.texts import WORDS, real_texts
from fastbert import Embedder, native
from fastbert.hub import DEFAULT_MODEL
from fastbert.models import BertConfig, BertModel
from fastbert.packing import pack
from fastbert.sentence_folder import read_folder

GATE = 0.9995
OWN = {"fastbert": "float32", "fastbert-bf16": "bfloat16", "fastbert-int8": "int8"}
BASE = "sentence-transformers"  # in fp32: what most people run
LIBRARIES = {BASE: torch.float32, "sentence-transformers-bf16": torch.bfloat16}
LENGTHS = (16, 32, 64, 128, 256, 512)  # tokens of a lone text
Encode = Callable[[list[str]], np.ndarray]


def reason_against(name: str) -> str | None:
    """Why a provider cannot be measured here, and what to do; None where it can.

    Raises:
        SystemExit: there is no such provider.
    """
    if name in OWN:
        return None
    if name in peers.PEERS:
        return peers.reason_against(peers.PEERS[name])
    if name not in LIBRARIES:
        raise SystemExit(f"no provider {name!r}; there are {', '.join([*OWN, *LIBRARIES, *peers.PEERS])}")
    if importlib.util.find_spec("sentence_transformers") is None:
        return "missing: pip install sentence-transformers"
    return peers.NO_BFLOAT16 if LIBRARIES[name] == torch.bfloat16 and not peers.has_bfloat16() else None


def providers(folder: str, only: list[str] | None) -> Iterator[tuple[str, Encode]]:
    """(name, encode) of everything that can run here; the others are named with the reason, and what to do."""
    for name in [*OWN, *LIBRARIES, *peers.PEERS] if only is None else only:
        reason = reason_against(name)
        if reason is not None:
            print(f"{name}: {reason}")
        elif name in OWN:
            yield name, partial(Embedder.from_pretrained(folder, OWN[name]).encode, normalize_embeddings=True)
        elif name in peers.PEERS:
            yield name, peers.make(name, Path(folder))
        else:
            from sentence_transformers import SentenceTransformer

            model = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": LIBRARIES[name]})
            yield name, partial(model.encode, normalize_embeddings=True, show_progress_bar=False)


def dtype_of(name: str) -> str:
    """In which a provider computes, by its name."""
    return {"bf16": "bfloat16", "int8": "int8"}.get(name.rpartition("-")[2], "float32")


@torch.inference_mode()
def roofs_of(dtype: str) -> harness.Roofs:
    """Roofs in which the GEMM is the fastest of the libraries' and of our own, seen in one wide layer."""
    roofs = harness.measure_roofs(getattr(torch, dtype), "cpu")
    if dtype == "int8":
        return roofs
    D, F, lengths = 1024, 4096, [16] * 32
    config = BertConfig(num_hidden_layers=1, hidden_size=D, num_attention_heads=16, intermediate_size=F, vocab_size=64)
    model = BertModel(config, add_pooling_layer=False).eval().to(getattr(torch, dtype))
    batch = pack([[1] * n for n in lengths])
    ms = min(harness.interleave({"layer": lambda: model.forward_packed(batch)}, 10)["layer"])
    return replace(roofs, flop_s=max(roofs.flop_s, 2 * (4 * D * D + 2 * D * F) * sum(lengths) / ms * 1e3))


def worst_cosine(vectors: np.ndarray, exact: np.ndarray) -> float:
    """Least cosine of two lists of vectors, those of `exact` of length 1; a length rounded to bfloat16 is no error."""
    vectors = vectors.astype(np.float64)
    return float(((vectors * exact).sum(1) / np.linalg.norm(vectors, axis=1)).min())


def chosen(against: str | None) -> list[str] | None:
    """Names of providers for `--against`: ours, the base, and each peer that a word names, with its variants.

    Raises:
        SystemExit: a word names no peer.
    """
    if against is None:
        return None
    names = [*OWN, BASE]
    for word in against.split(","):
        found = [n for n in (*LIBRARIES, *peers.PEERS) if n == word or n.startswith(f"{word}-")]
        if not found:
            raise SystemExit(f"no peer {word!r}; there are {', '.join([*LIBRARIES, *peers.PEERS])}")
        names += [name for name in found if name not in names]
    return names


def package_of(name: str) -> str:
    """A provider's package and its version."""
    stem = re.sub(r"(-tuned)?(-bf16|-int8)?$", "", name)
    package = {"fastbert": "fastbert-engine", "torch-compile": "torch"}.get(stem, stem)
    return f"{package} {version(package)}"


def padding_percent(name: str, ids: list[list[int]]) -> float:
    """The share of computed tokens that are padding, in a provider's batches."""
    if name in OWN or name.startswith("ctranslate2"):
        return 0.0
    size = peers.PEERS[name].kind.batch_size if name in peers.PEERS else peers.Padded.batch_size
    return round(100 * (1 - sum(map(len, ids)) / sum(mask.size for _, _, mask in peers.batches(ids, size))), 1)


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
    while len(encode([" ".join(words)])[0]) > length:
        words.pop()
    return " ".join(words + ["the"] * (length - len(encode([" ".join(words)])[0])))


@dataclass(frozen=True)
class Bench:
    """What all measurements of a run share.

    Attributes:
        encoders: name -> texts to unit vectors.
        exact: the model in fp64, which judges them.
        roofs: by dtype.
    """

    encoders: dict[str, Encode]
    exact: Embedder
    roofs: dict[str, harness.Roofs]

    def gate(self, what: str, texts: list[str]) -> dict[str, float]:
        """Worst cosine of each provider that may have a row."""
        exact = self.exact.encode(texts, normalize_embeddings=True)
        cosines = {name: worst_cosine(encode(texts), exact) for name, encode in self.encoders.items()}
        kept = {name: cosine for name, cosine in cosines.items() if cosine >= GATE or "int8" in name}
        for name in cosines.keys() - kept.keys():
            print(f"{what}: {name} fails the gate, worst cosine {cosines[name]:.6f}")
        return kept

    def measure(
        self, what: str, mode: str, texts: list[str], rounds: int, cosines: dict[str, float]
    ) -> list[harness.Row]:
        """Rows of one list of texts, encoded in one call; `cosines` names those that may have one."""
        ids = self.exact.tokenizer.encode(texts).ids
        tokens, squares = sum(map(len, ids)), sum(len(i) ** 2 for i in ids)
        config = self.exact.model.config
        layers, D, F = config.num_hidden_layers, config.hidden_size, config.intermediate_size
        weights = layers * (4 * D * D + 2 * D * F)
        flop = 2 * weights * tokens + 4 * layers * D * squares
        turns = {name: partial(self.encoders[name], texts) for name in cosines}
        times = harness.interleave(turns, rounds, warmup=2)
        rows = []
        for name, ms in times.items():
            p50, p20, p80 = harness.percentiles(ms)
            roofs = self.roofs[dtype_of(name)]
            nbytes = weights * {"float32": 4, "bfloat16": 2, "int8": 1}[dtype_of(name)]  # read once a call, at least
            rows.append(
                harness.Row(
                    "encode", f"{what}-{len(texts)}x{tokens}", name, mode, dtype_of(name),
                    *(round(v, 4) for v in (p50, p20, p80)), round(nbytes / p50 / 1e6, 3), round(flop / p50 / 1e9, 4),
                    round(100 * roofs.bound_ms(nbytes, flop) / p50, 1), harness.device_name("cpu"),
                    torch.__version__, native.isa() if native.available() else "none", torch.get_num_threads(),
                    harness.load(), harness.commit(), harness.today(), harness.times_base(times.get(BASE), ms),
                    padding_percent(name, ids), round(cosines[name], 6), round(roofs.bytes_s / 1e9, 2),
                    round(roofs.flop_s / 1e12, 4), package_of(name), harness.joined(ms),
                )
            )  # fmt: skip
        return rows


def table(title: str, rows: list[harness.Row]) -> Table:
    """Rows by texts and mode; the fastest of each dtype class is marked, whosever it is."""
    shown = Table(title=title, caption="* the fastest of its number format on these texts", caption_justify="left")
    for column in ("texts", "mode", "provider", "texts/s", "tokens/s", "ms p50 (p20, p80)"):
        shown.add_column(column, justify="left" if column in ("texts", "mode", "provider") else "right", no_wrap=True)
    for column in ("x ST", "% roof", "% padding", "cosine"):
        shown.add_column(column, justify="right", no_wrap=True)
    for _, group in groupby(rows, key=lambda row: (row.case, row.mode)):
        members = sorted(group, key=lambda row: row.ms_p50)
        fastest = {row.dtype: row for row in reversed(members)}
        for row in members:
            what, _, size = row.case.rpartition("-")
            count, tokens = map(int, size.split("x"))
            mark = "*" if fastest[row.dtype] is row else ""
            name = f"[bold]{row.backend}[/]" if row.backend in OWN else row.backend
            shown.add_row(
                what, row.mode, f"{name}{mark}", f"{1e3 * count / row.ms_p50:,.0f}",
                f"{1e3 * tokens / row.ms_p50:,.0f}", f"{row.ms_p50:.2f} ({row.ms_p20:.2f}, {row.ms_p80:.2f})",
                f"{row.times_base:.2f}", f"{row.roof_percent:.0f}", f"{row.padding_percent:.0f}",
                f"{row.worst_cosine:.5f}",
            )  # fmt: skip
        shown.add_section()
    return shown


def main() -> None:
    """Measure, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL, help=f"folder, hub id or one of {', '.join(MADE)}")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--only", help="providers, separated by commas")
    parser.add_argument("--against", help="peers, separated by commas, beside ours and the base")
    parser.add_argument("--quick", action="store_true", help="a few texts once, to see that all works; writes no rows")
    args = parser.parse_args()
    lengths, batch1_rounds = LENGTHS, 15
    if args.quick:
        args.rounds, args.texts, lengths, batch1_rounds = 2, 24, LENGTHS[::3], 2
    with ExitStack() as stack:
        folder = roomy(folder_of(args.model), max(lengths), stack)
        own = "" if args.model == DEFAULT_MODEL else f"{Path(args.model).name} "  # begins the cases of another model
        only = args.only.split(",") if args.only else chosen(args.against)
        encoders = dict(providers(str(folder), only))
        exact = Embedder.from_pretrained(folder, dtype="float32")
        exact.model.double()
        dtypes = dict.fromkeys(map(dtype_of, encoders))
        bench = Bench(encoders, exact, {dtype: roofs_of(dtype) for dtype in dtypes})
        rows: list[harness.Row] = []
        for mix, words in list(WORDS.items())[: 1 if args.quick else None]:
            texts = real_texts(words, args.texts)
            cosines = bench.gate(mix, texts)
            rows += bench.measure(own + mix, "throughput", texts, args.rounds, cosines)
            typical = sorted(texts, key=len)[len(texts) // 2]
            rows += bench.measure(own + mix, "batch1", [typical], batch1_rounds, cosines)
        room = exact.model.config.max_position_embeddings
        for length in [n for n in lengths if n <= room]:
            text = text_of(length, lambda texts: exact.tokenizer.encode(texts).ids)
            cosines = bench.gate(f"length {length}", [text])
            rows += bench.measure(f"{own}length", "batch1", [text], batch1_rounds, cosines)
    device = harness.device_name("cpu")
    harness.console().print(table(f"{args.model}, {device}, {torch.get_num_threads()} threads", rows))
    if args.quick and harness.RESULTS == harness.COMMITTED:
        print("quick: no rows are written, and these times mean nothing")
        return
    path = harness.write(rows, harness.file_of(f"{own.strip()}-encoder" if own else "encoder", "cpu"))
    print(f"load {harness.load()}; {len(rows)} rows in {path.relative_to(harness.RESULTS.parent.parent)}")


if __name__ == "__main__":
    main()
