"""Ahead-of-time compilation of every kernel for a GPU that is not there, and what the compiler says of each.

The kernels are called as ever, on BERT-base's shapes and on CPU memory; a stand-in driver names the target, and a hook
records each launch instead of compiling it. So what is compiled is what the callers launch, arguments and all.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastbert.kernels.add_layer_norm import add_layer_norm_bwd, add_layer_norm_float8_fwd, add_layer_norm_fwd
from fastbert.kernels.attention import (
    attention_bwd,
    attention_fwd,
    attention_rel_bias_bwd,
    attention_rel_bias_fwd,
    attention_window_bwd,
    attention_window_fwd,
)
from fastbert.kernels.cross_entropy import cross_entropy_bwd, cross_entropy_fwd
from fastbert.kernels.embed import embed_bwd, embed_fwd
from fastbert.kernels.float8 import FLOAT8, Float8Rows
from fastbert.kernels.gelu import gelu_bwd, gelu_fwd
from fastbert.kernels.linear import (
    Rows,
    float8_gelu_fwd,
    float8_linear_fwd,
    float8_rows_linear_fwd,
    linear_add_fwd,
    linear_gelu_fwd,
    linear_rows_fwd,
    norm_linear_fwd,
)
from fastbert.kernels.pool import pool_bwd, pool_fwd
from fastbert.kernels.short import linear_add_norm_fwd

ARCHITECTURES = (80, 90)
OLDEST_FLOAT8 = 89


@dataclass(frozen=True)
class Compiled:
    """One kernel on one architecture.

    Attributes:
        kernel: name of the kernel, and of the call that launches it.
        registers, spills: of each thread: 32-bit registers, and bytes that did not fit them.
        shared: bytes of shared memory of a program.
        ptx: the code, to look for instructions.
    """

    kernel: str
    call: str
    architecture: int
    num_warps: int
    registers: int
    spills: int
    shared: int
    ptx: str

    @property
    def matrix_instruction(self) -> str:
        """What drives the tensor cores: `wgmma`, `mma`, or `-`."""
        return "wgmma" if "wgmma.mma_async" in self.ptx else "mma" if "mma.sync" in self.ptx else "-"

    def widest(self, access: str) -> int:
        """Bytes of the widest access to global memory by one thread: `ld` (copies to shared memory count) or `st`."""
        found = re.findall(rf"{access}\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\s", self.ptx)
        widths = [int(count or 1) * int(bits) // 8 for count, bits in found]
        if access == "ld":
            widths += [int(n, 0) for n in re.findall(r"cp\.async\.\w+\.shared\.global[^;]*?\], (\w+)", self.ptx)]
        return max(widths, default=0)


def _calls(dtype: torch.dtype, K: int, p: float) -> dict[str, Callable[[], Any]]:
    """Each function of the backend on BERT-base's shapes: 256 tokens, 12 heads of K features."""
    T, S, H, F, V = 256, 4, 12, 3072, 30528  # BERT's 30522, padded to whole 16-byte words
    D = H * K
    x, w, g = torch.empty(T, D, dtype=dtype), torch.empty(D, dtype=dtype), torch.empty(T, F, dtype=dtype)
    b, logits = torch.empty(F, dtype=dtype), torch.empty(T, V, dtype=dtype)
    qkv, out, rel_bias = (torch.empty(*shape, dtype=dtype) for shape in ((T, 3, H, K), (T, H, K), (H, 255)))
    y, f = torch.empty(T, D), torch.empty(D)  # fp32 whatever the dtype
    row, lse, scale = torch.empty(T), torch.empty(T, H), torch.empty(())
    ids, cu = torch.zeros(T, dtype=torch.int64), torch.zeros(S + 1, dtype=torch.int32)
    tables, pooled = (ids, ids, ids, x, x, x), torch.empty(S, D, dtype=dtype)
    argmax = torch.empty(S, D, dtype=torch.int32)
    rest = (cu, 128, K**-0.5, p, 1)
    inner, up, down = torch.empty(4096, F, dtype=dtype), torch.empty(F, D, dtype=dtype), torch.empty(D, F, dtype=dtype)
    many, bias, wide = torch.empty(4096, D, dtype=dtype), torch.empty(D, dtype=dtype), torch.empty(F)
    rows = Rows(many, torch.empty(triton.cdiv(D, 256), 2, 4096), 256, w, w, 1e-12)
    float8, scales = (torch.empty(F, D, dtype=FLOAT8), wide, b), torch.empty(F // 128, 4096)
    return {
        "linear_gelu_fwd": lambda: linear_gelu_fwd(many, up, b, "none"),
        "linear_gelu_fwd short": lambda: linear_gelu_fwd(x[:128], up, b, "none"),
        "linear_add_norm_fwd short": lambda: linear_add_norm_fwd(g[:128], down, bias, x[:128], w, w, 1e-12),
        "linear_add_fwd": lambda: linear_add_fwd(inner, down, bias, many),
        "linear_add_fwd short": lambda: linear_add_fwd(g, down, bias, x),
        "linear_rows_fwd": lambda: linear_rows_fwd(inner, down, bias, rows, w, w, 1e-12),
        "norm_linear_fwd": lambda: norm_linear_fwd(rows, (up, wide, wide), "erf"),
        "float8_linear_fwd": lambda: float8_linear_fwd(many, *float8),
        "float8_gelu_fwd": lambda: float8_gelu_fwd(
            Float8Rows(torch.empty(4096, D, dtype=FLOAT8), scales[:1], D), *float8, "none"
        ),
        "float8_rows_linear_fwd": lambda: float8_rows_linear_fwd(
            Float8Rows(torch.empty(4096, F, dtype=FLOAT8), scales, 128), torch.empty(D, F, dtype=FLOAT8), wide, w, dtype
        ),
        "add_layer_norm_float8_fwd": lambda: add_layer_norm_float8_fwd(x, x, w, w, 1e-12),
        "gelu_fwd": lambda: gelu_fwd(g, b, "none"),
        "gelu_bwd": lambda: gelu_bwd(g, g, b, "none"),
        "gelu_fwd tanh": lambda: gelu_fwd(g, b, "tanh"),
        "gelu_bwd tanh": lambda: gelu_bwd(g, g, b, "tanh"),
        "add_layer_norm_fwd": lambda: add_layer_norm_fwd(x, w, x, w, w, 1e-12, p, 1),
        "add_layer_norm_bwd": lambda: add_layer_norm_bwd(x, x, w, x, w, row, row, p, 1),
        "add_layer_norm_fwd autocast": lambda: add_layer_norm_fwd(x, f, y, f, f, 1e-12, p, 1),
        "add_layer_norm_bwd autocast": lambda: add_layer_norm_bwd(y, x, f, y, f, row, row, p, 1),
        "embed_fwd": lambda: embed_fwd(*tables, w, w, 1e-12, p, 1),
        "embed_bwd": lambda: embed_bwd(x, *tables, w, row, row, 0, p, 1),
        "pool_fwd mean": lambda: pool_fwd(x, cu, "mean"),
        "pool_fwd max": lambda: pool_fwd(x, cu, "max"),
        "pool_bwd mean": lambda: pool_bwd(pooled, cu, "mean", T, None),
        "pool_bwd max": lambda: pool_bwd(pooled, cu, "max", T, argmax),
        "cross_entropy_fwd": lambda: cross_entropy_fwd(logits, ids, -100),
        "cross_entropy_bwd": lambda: cross_entropy_bwd(scale, logits, ids, torch.empty(2, T), -100),
        "attention_fwd": lambda: attention_fwd(qkv, *rest),
        "attention_bwd": lambda: attention_bwd(out, qkv, out, lse, *rest),
        "attention_window_fwd": lambda: attention_window_fwd(qkv, 64, *rest),
        "attention_window_bwd": lambda: attention_window_bwd(out, qkv, 64, out, lse, *rest),
        "attention_rel_bias_fwd": lambda: attention_rel_bias_fwd(qkv, rel_bias, *rest),
        "attention_rel_bias_bwd": lambda: attention_rel_bias_bwd(out, qkv, rel_bias, out, lse, *rest),
    }


class _AbsentGPU:
    """What a launch asks of a driver before it compiles."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"absent sm_{self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def _recording(architecture: int) -> Iterator[list[dict[str, Any]]]:
    """The launches of the block, which are neither compiled nor run."""
    launches: list[dict[str, Any]] = []

    def record(**launch: Any) -> bool:
        launches.append(launch)
        return True  # to the launcher: nothing left to do

    runtime = triton.knobs.runtime
    before, runtime.jit_cache_hook = runtime.jit_cache_hook, record
    driver = triton.runtime.driver
    active = driver._active  # asking for `active` would make one, which needs a GPU
    driver.set_active(_AbsentGPU(architecture))
    try:
        yield launches
    finally:
        runtime.jit_cache_hook = before
        driver._active = active


def _compile(call: str, architecture: int, launch: dict[str, Any]) -> Compiled:
    kernel, spec = launch["fn"].jit_function, launch["compile"]
    source = ASTSource(kernel, spec["signature"], spec["constants"], spec["configs"][0])
    given = json.loads(spec["specialization_data"])["options"]
    options = {name: given[name] for name in ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing of registers: {usage!r}")
    name = kernel.__name__.strip("_").removesuffix("_kernel")
    return Compiled(
        name, call, architecture, options["num_warps"], int(found[1]), int(found[2]), compiled.metadata.shared,
        compiled.asm["ptx"],
    )  # fmt: skip


def compile_ahead(
    architecture: int, dtype: torch.dtype = torch.bfloat16, head_size: int = 64, dropout_p: float = 0.1, match: str = ""
) -> list[Compiled]:
    """Compile every kernel that the calls whose name contains `match` launch.

    Args:
        architecture: 80, 90, ...: compute capability without the point.
        dtype, head_size, dropout_p: of the calls; the hidden size is 12 heads.

    Raises:
        RuntimeError: the kernels of this process run in the interpreter, which has nothing to compile.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, so there is nothing to compile: unset it")
    compiled = []
    for call, function in _calls(dtype, head_size, dropout_p).items():
        if match in call and not (architecture < OLDEST_FLOAT8 and "float8" in call):
            with _recording(architecture) as launches:
                function()
            compiled += [_compile(call, architecture, launch) for launch in launches]
    return compiled
