"""`python -m fastbert.kernels --target sm_90`: all kernels compiled without a GPU, what the compiler says of them.

`--tune` measures tiles on the GPU that is here and keeps the fastest for it (FASTBERT_CACHE says where).
"""

from __future__ import annotations

import argparse

import torch

from fastbert.kernels.ahead import ARCHITECTURES, compile_ahead
from fastbert.kernels.tiles import tiles_path
from fastbert.kernels.tune import tune


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastbert.kernels", description=__doc__)
    parser.add_argument("--target", choices=[f"sm_{a}" for a in ARCHITECTURES], default="sm_90")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--match", default="", help="only calls whose name contains this")
    parser.add_argument("--tune", action="store_true", help="measure tiles on this GPU, keep the fastest")
    parser.add_argument("--seconds", type=float, default=60, help="box of --tune")
    args = parser.parse_args()
    if args.tune:
        if not torch.cuda.is_available():
            raise SystemExit("--tune measures on a CUDA device, and there is none here")
        for tuned in tune(seconds=args.seconds, head_size=args.head_size, dtype=getattr(torch, args.dtype)):
            print(tuned, flush=True)
        print(f"kept in {tiles_path()}")
        return
    target, dtype = int(args.target.removeprefix("sm_")), getattr(torch, args.dtype)
    print(f"{'call':30}{'kernel':20}{'warps':>6}{'regs':>6}{'spill B':>9}{'shared B':>10}{'load B':>8}  tensor cores")
    for c in compile_ahead(target, dtype, args.head_size, args.dropout, args.match):
        print(
            f"{c.call:30}{c.kernel:20}{c.num_warps:6}{c.registers:6}{c.spills:9}{c.shared:10}{c.widest('ld'):8}"
            f"  {c.matrix_instruction}"
        )


if __name__ == "__main__":
    _main()
