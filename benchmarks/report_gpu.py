"""The report's tables of a GPU, from committed rows."""

from __future__ import annotations

import csv
import re
from pathlib import Path

OWN = ("fastbert", "fused", "float8", "fastbert ops", "fastbert graph", "cublas + fastbert")
_MODES = {"vectors": ", its mean on the host", "compiled": ", beside torch.compile"}
Key = tuple[str, str, str]  # op, case, mode
Rows = dict[str, dict[str, str]]  # by backend


def gpu_table(path: Path) -> str:
    """One GPU's rows as Markdown: whole models beside the best peer, then kernels; empty for rows of memory alone."""
    if path.stem.endswith("-peak"):
        return ""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    cases: dict[Key, Rows] = {}
    for row in sorted(rows, key=_natural):
        cases.setdefault((row["op"], row["case"], row["mode"]), {})[row["backend"]] = row
    first = rows[0]
    roofs = (
        f"{float(first['copy_gb_s']) / 1e3:.2f} TB/s of a copy, {float(first['gemm_tflop_s']):.0f} TFLOP/s of a GEMM"
    )
    models = [(key, own) for key, own in cases.items() if key[0].startswith("bert-")]
    kernels = [
        (key, own)
        for key, own in cases.items()
        if not key[0].startswith("bert-") and key[2] != "training" and any(name in own for name in OWN[:3])
    ]
    return "\n".join(
        [
            f"One {first['device']}, bf16, random weights, torch {first['torch'].split('+')[0]}, {first['date']}; real "
            "tokens/s, ids to hidden states (training: a masked-LM step under autocast, memory of the step beside it), "
            "the median; peers compute the same tokens in the same run.",
            "",
            "| model | tokens | fastbert | TFLOP/s | best other | times it | Hugging Face, padded | times it |",
            "|---|---|---|---|---|---|---|---|",
            *(_model(key, own, _peaks(path)) for key, own in models),
            "",
            "Kernels on the same GPU, as CUDA graphs with a cold L2 cache; roof: the longer of bytes and FLOP at the "
            f"rates measured beside them ({roofs}, for 8 bits too).",
            "",
            "| kernel | case | | us | of the roof | best other | times it |",
            "|---|---|---|---|---|---|---|",
            *(_kernel(key, own) for key, own in kernels),
            "",
            _lost(kernels),
        ]
    )


def _lost(kernels: list[tuple[Key, Rows]]) -> str:
    """The sentence that says where another kernel is the faster one."""
    lost = {key: best["backend"] for key, own in kernels if _speed(best := _best(own)) < _speed(_ours(own))}
    if not lost:
        return "No other kernel is faster in any row."
    names = (f"{op} {case.replace('_', ', ')} {mode} ({peer})" for (op, case, mode), peer in lost.items())
    return f"Another kernel is the faster one in {len(lost)} of these {len(kernels)}: {'; '.join(names)}."


def _natural(row: dict[str, str]) -> tuple[str, str, list[int]]:
    return row["op"], row["mode"], [int(n) for n in re.findall(r"\d+", row["case"])]


def _peaks(path: Path) -> dict[tuple[str, str], float]:
    other = path.with_name(f"{path.stem}-peak.csv")
    if not other.exists():
        return {}
    with other.open(newline="") as file:
        return {(row["case"], row["backend"]): float(row["peak_mb"]) for row in csv.DictReader(file)}


def _ours(own: Rows) -> dict[str, str]:
    return next(own[name] for name in OWN[:3] if name in own)


def _speed(row: dict[str, str]) -> float:
    return float(row["ms_p50"])


def _best(own: Rows) -> dict[str, str]:
    """The fastest of the others; what joins a kernel of ours to the vendor's GEMM is another."""
    return min((row for name, row in own.items() if name not in OWN[:5]), key=_speed)


def _times(row: dict[str, str], ours: dict[str, str]) -> str:
    return f"{_speed(row) / _speed(ours):.2f}x"


def _model(key: Key, own: Rows, peaks: dict[tuple[str, str], float]) -> str:
    (op, case, mode), ours = key, own["fastbert"]
    tokens = int(re.findall(r"T(\d+)", case)[0])
    best, padded = _best(own), own.get("hf sdpa padded") or own.get("hf torch.compile padded")

    def rate(row: dict[str, str]) -> str:
        text = f"{tokens / _speed(row) / 1e3:.2f} M"
        peak = peaks.get((case, row["backend"])) if mode == "training" else None
        return text if peak is None else f"{text}, {peak / 1e3:.1f} GB"

    length = re.findall(r"S(\d+)", case)
    what = f"{tokens:,} in sequences of {length[0] if length else '2 to 512'}"
    if case.startswith("batch1"):
        what = f"one sequence of {tokens}"
    fields = [
        op.replace(" mlm", ", training"), what + _MODES.get(mode, ""),
        rate(ours), f"{float(ours['tflop_s']):.0f}", f"{rate(best)} {best['backend']}", _times(best, ours),
        "-" if padded is None else rate(padded), "-" if padded is None else _times(padded, ours),
    ]  # fmt: skip
    return f"| {' | '.join(fields)} |"


def _kernel(key: Key, own: Rows) -> str:
    (op, case, mode), ours, best = key, _ours(own), _best(own)
    fields = [
        op, case.replace("_", ", "), mode, f"{1e3 * _speed(ours):.1f}", f"{float(ours['roof_percent']):.0f} %",
        f"{1e3 * _speed(best):.1f} {best['backend']}", _times(best, ours),
    ]  # fmt: skip
    return f"| {' | '.join(fields)} |"
