"""`python -m benchmarks.interrupted`: real runs of `fastbert pretrain`, killed at random moments, end in the same bits.

A run that nobody disturbs comes first. Others are killed with SIGKILL at moments from their start (imports and the
reading of texts included) to their end and continued with `--resume`, until so many kills are spent; every file of
weights, moments and averages of a run that came through must hold the bytes of the first one's.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.texts import WORDS, real_texts

OPTIONS = (
    "--model-type", "bert", "--size", "tiny", "--vocab-size", "400", "--seq-length", "64", "--objective", "mlm",
    "--batch-tokens", "1024", "--micro-tokens", "512", "--ema-decay", "0.9", "--max-steps", "40", "--save-steps", "2",
    "--report-to", "none", "--quiet", "--resume", "--seed", "1",
)  # fmt: skip


def command(texts: Path, out: Path) -> list[str]:
    """What a user types."""
    return [sys.executable, "-m", "fastbert", "pretrain", "--data", str(texts), "--out", str(out), *OPTIONS]


def digests(out: Path) -> dict[str, str]:
    """File of tensors -> hash of its bytes: the model that was left, and what the newest checkpoint holds."""
    last = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    files = [out / "model.safetensors", *sorted(last.glob("*.safetensors"))]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def newest(out: Path) -> str:
    """The last checkpoint there is, by its name."""
    found = [int(path.name.partition("-")[2]) for path in out.glob("checkpoint-*")]
    return f"checkpoint-{max(found)}" if found else "none"


def run(texts: Path, out: Path, limit_s: float | None) -> bool:
    """Start or continue a run; whether it ended by itself before the limit, at which it is killed."""
    with (out.with_suffix(".log")).open("ab") as log:
        process = subprocess.Popen(command(texts, out), stdout=log, stderr=log)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return False
    if code:
        raise SystemExit(f"a run ended with {code}: {out.with_suffix('.log').read_text()[-2000:]}")
    return True


def main() -> None:
    """Kill until the number is reached, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, kills, runs, moments = random.Random(args.seed), 0, 0, Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        texts = root / "texts.txt"
        texts.write_text("\n\n".join(real_texts(WORDS["passage"], 500, args.seed)) + "\n", encoding="utf-8")
        began = time.perf_counter()
        run(texts, root / "straight", None)
        seconds, expected = time.perf_counter() - began, digests(root / "straight")
        print(f"undisturbed: {seconds:.1f} s, {len(expected)} files", flush=True)
        while kills < args.kills:
            out = root / f"run-{runs}"
            while not run(texts, out, rng.uniform(0.0, seconds) if kills < args.kills else None):
                kills += 1
                moments[newest(out)] += 1
                print(f"kill {kills}: {newest(out)} is the last checkpoint", flush=True)
            if (found := digests(out)) != expected:
                raise SystemExit(
                    f"run {runs} ended in other bits: {[n for n in expected if found.get(n) != expected[n]]}"
                )
            runs += 1
            print(f"run {runs}: the same bits", flush=True)
    print(f"{kills} kills in {runs} runs; {len(moments)} different last checkpoints; all ended in the same bits")


if __name__ == "__main__":
    main()
