"""`python -m benchmarks.encoder`: texts to vectors end to end, each peer on the same texts, interleaved.

Throughput is a whole list of texts, tokenisation included; batch1 is one text a call. A peer whose vectors differ
(worst cosine below the gate) gets no row.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from benchmarks import harness, peers
from benchmarks.texts import WORDS, real_texts
from fastbert import Embedder, native
from fastbert.hub import DEFAULT_MODEL, resolve

GATE = 0.9995
Encode = Callable[[list[str]], np.ndarray]


def providers(folder: str, only: list[str] | None) -> Iterator[tuple[str, Encode]]:
    """(name, encode) of everything that can run here; the others are named with the reason, and what to do."""
    own = {"fastbert": "float32", "fastbert-bf16": "bfloat16", "fastbert-int8": "int8"}
    libraries = {"sentence-transformers": torch.float32, "sentence-transformers-bf16": torch.bfloat16}
    for name in [*own, *libraries, *peers.PEERS] if only is None else only:
        if name in own:
            yield name, partial(Embedder.from_pretrained(folder, own[name]).encode, normalize_embeddings=True)
        elif name in peers.PEERS:
            reason = peers.reason_against(peers.PEERS[name])
            if reason is None:
                yield name, peers.make(name, Path(folder))
            else:
                print(f"{name}: {reason}")
        elif name not in libraries:
            raise SystemExit(f"no provider {name!r}; there are {', '.join([*own, *libraries, *peers.PEERS])}")
        elif importlib.util.find_spec("sentence_transformers") is None:
            print(f"{name}: missing: pip install sentence-transformers")
        elif libraries[name] == torch.bfloat16 and not peers.has_bfloat16():
            print(f"{name}: {peers.NO_BFLOAT16}")
        else:
            from sentence_transformers import SentenceTransformer

            model = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": libraries[name]})
            yield name, partial(model.encode, normalize_embeddings=True, show_progress_bar=False)


def dtype_of(name: str) -> str:
    """In which a provider computes, by its name."""
    return {"bf16": "bfloat16", "int8": "int8"}.get(name.rpartition("-")[2], "float32")


def worst_cosine(vectors: np.ndarray, exact: np.ndarray) -> float:
    """Least cosine of two lists of unit vectors."""
    return float((vectors.astype(np.float64) * exact).sum(1).min())


def main() -> None:
    """Measure, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--only", help="providers, separated by commas")
    parser.add_argument("--quick", action="store_true", help="a few texts once, to see that all works; writes no rows")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.texts = 2, 24
    batch1_rounds = 2 if args.quick else 30
    folder = str(resolve(args.model))
    encoders = dict(providers(folder, args.only.split(",") if args.only else None))
    exact_model = Embedder.from_pretrained(folder, dtype="float32")
    exact_model.model.double()
    config = exact_model.model.config
    per_token = (
        2 * config.num_hidden_layers * config.hidden_size * (4 * config.hidden_size + 2 * config.intermediate_size)
    )
    roofs = harness.measure_roofs(torch.float32, "cpu")
    rows, shown = [], Table(title=f"{args.model}, {harness.device_name('cpu')}, {torch.get_num_threads()} threads")
    for column in (
        "texts",
        "mode",
        "provider",
        "texts/s",
        "tokens/s",
        "ms p50 (p20, p80)",
        "% GEMM roof",
        "worst cosine",
    ):
        shown.add_column(column, justify="left" if column in ("texts", "mode", "provider") else "right", no_wrap=True)
    for mix, words in list(WORDS.items())[: 1 if args.quick else None]:
        texts = real_texts(words, args.texts)
        exact = exact_model.encode(texts, normalize_embeddings=True)
        lengths = [len(ids) for ids in exact_model.tokenizer.encode(texts).ids]
        cosines = {name: worst_cosine(encode(texts), exact) for name, encode in encoders.items()}
        kept = {name: encode for name, encode in encoders.items() if cosines[name] >= GATE or "int8" in name}
        for name in encoders.keys() - kept.keys():
            print(f"{mix}: {name} fails the gate, worst cosine {cosines[name]:.6f}")
        median = sorted(range(len(texts)), key=lengths.__getitem__)[len(texts) // 2]
        for mode, chosen, rounds in (
            ("throughput", list(range(len(texts))), args.rounds),
            ("batch1", [median], batch1_rounds),
        ):
            batch, tokens = [texts[i] for i in chosen], sum(lengths[i] for i in chosen)
            times = harness.interleave(
                {name: partial(encode, batch) for name, encode in kept.items()}, rounds, warmup=2
            )
            squares = sum(lengths[i] ** 2 for i in chosen)
            flop = per_token * tokens + 4 * config.num_hidden_layers * config.hidden_size * squares
            for name, ms in times.items():
                p50, p20, p80 = harness.percentiles(ms)
                rows.append(
                    harness.Row(
                        "encode", f"{mix}-{len(batch)}x{tokens}", name, mode, dtype_of(name),
                        *(round(v, 4) for v in (p50, p20, p80)), 0.0, round(flop / p50 / 1e9, 4),
                        round(100 * roofs.bound_ms(0, flop) / p50, 1), harness.device_name("cpu"), torch.__version__,
                        native.isa() if native.available() else "none", torch.get_num_threads(), harness.load(),
                        harness.commit(), harness.today(),
                    )
                )  # fmt: skip
                shown.add_row(
                    mix, mode, name, f"{1e3 * len(batch) / p50:,.0f}", f"{1e3 * tokens / p50:,.0f}",
                    f"{p50:.2f} ({p20:.2f}, {p80:.2f})", f"{rows[-1].roof_percent:.0f}", f"{cosines[name]:.6f}",
                )  # fmt: skip
        shown.add_section()
    harness.console().print(shown)
    if args.quick:
        print("quick: no rows are written, and these times mean nothing")
        return
    name = f"encoder-{harness.device_name('cpu')}".lower()
    path = harness.write(rows, "".join(c if c.isalnum() else "-" for c in name))
    print(f"load {harness.load()}; {len(rows)} rows in {path.relative_to(harness.RESULTS.parent.parent)}")


if __name__ == "__main__":
    main()
