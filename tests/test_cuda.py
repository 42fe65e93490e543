"""csrc/cuda: on a GPU where there is one (`-m gpu`), and everywhere else the same .cu files in tests/cuda_on_cpu."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastbert import native_cuda, ops, use_backend
from fastbert.ops.attention import attention_ref
from fastbert.ops.dispatch import backend_for
from fastbert.ops.plan import plan_mask_ref
from fastbert.ops.pool import MODES, pool_ref
from fastbert.testing import assert_within_budget
from fastbert.vectors import quantize_vectors

ROOT = Path(__file__).parent.parent
EMULATOR = ROOT / "tests" / "cuda_on_cpu"
KERNELS = ("attention", "pack", "pool")
HALVES = (torch.float16, torch.bfloat16)
CXX = shutil.which("g++")

RAGGED = [3, 1, 0, 16, 17, 0, 37, 2]
LENGTHS = {
    "one": [1],
    "none": [],
    "empty": [0, 0],
    "ragged": RAGGED,
    "many": torch.randint(0, 6, (1000,), generator=torch.Generator().manual_seed(0)).tolist(),
}


def _compile(source: Path, text: str, folder: Path) -> Path:
    """The object of one file in the emulator, kept by what went into it."""
    headers = sorted([*(ROOT / "csrc" / "cuda").glob("*.h"), *EMULATOR.glob("*.h")])
    key = hashlib.sha256("\0".join([text, *(h.read_text() for h in headers)]).encode()).hexdigest()[:16]
    target = folder / f"{source.stem}-{key}.o"
    if target.exists():
        return target
    pybind11 = importlib.import_module("pybind11")
    private = folder / f"{source.stem}-{key}-{os.getpid()}"
    private.with_suffix(".cpp").write_text(text)
    includes = [ROOT / "csrc", EMULATOR, pybind11.get_include(), sysconfig.get_path("include")]
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    command = [str(CXX), *flags, *(f"-I{i}" for i in includes), "-c", f"{private}.cpp", "-o", f"{private}.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    private.with_suffix(".o").replace(target)
    private.with_suffix(".cpp").unlink()
    return target


def emulator(mutated: str = "", old: str = "", new: str = "") -> ModuleType:
    """The bindings over kernels that g++ compiled, `old` replaced by `new` in one of them."""
    if CXX is None:
        pytest.skip("g++ is not installed: the emulator needs _Float16 and makecontext")
    folder = ROOT / "build" / "cuda_on_cpu"
    folder.mkdir(parents=True, exist_ok=True)
    objects = []
    for source in [*(ROOT / "csrc" / "cuda" / f"{k}.cu" for k in KERNELS), ROOT / "csrc" / "bindings_cuda.cpp",
                   EMULATOR / "module.cpp"]:  # fmt: skip
        text = source.read_text()
        if source.stem == mutated and source.suffix == ".cu":
            assert text.count(old) == 1, f"{source.name} has {old!r} {text.count(old)} times"
            text = text.replace(old, new)
        objects.append(_compile(source, text, folder))
    key = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:16]
    library = folder / f"{key}.so"
    if not library.exists():
        private = folder / f"{key}-{os.getpid()}.so"
        subprocess.run([str(CXX), "-shared", *map(str, objects), "-o", str(private)], check=True)
        private.replace(library)
    spec = importlib.util.spec_from_file_location("cuda_on_cpu", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def use_emulator(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    monkeypatch.setattr(native_cuda, "require", lambda: module)
    monkeypatch.setattr(native_cuda, "_DEVICE", "cpu")


@pytest.fixture(params=["emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch, poisoned_empty):
    """Where the kernels run."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        native_cuda.require()
        return "cuda"
    use_emulator(monkeypatch, emulator())
    return "cpu"


def _cu_seqlens(lengths: list[int]) -> torch.Tensor:
    return F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0), (1, 0)).int()


def check_plan(device: str, lengths: list[int], spare: int = 5) -> None:
    T = sum(lengths)
    made = native_cuda.plan(torch.tensor(lengths, dtype=torch.int32, device=device), T + spare)
    cu = _cu_seqlens(lengths)
    repeats = torch.tensor(lengths, dtype=torch.long)
    low, high = (F.pad(x.repeat_interleave(repeats), (0, spare)) for x in (cu[:-1], cu[1:]))
    positions = F.pad(torch.arange(T) - low[:T], (0, spare))
    for ours, exact in zip(made, (cu, positions.long(), low, high), strict=True):
        assert ours.dtype == exact.dtype
        assert torch.equal(ours.cpu(), exact)


@pytest.mark.parametrize("name", LENGTHS)
def test_plan(device, name):
    check_plan(device, LENGTHS[name])


def check_mask(device: str, shape: tuple[int, int]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6
    indices, cu = native_cuda.plan_mask(mask.to(device))
    exact_indices, exact_cu, max_seqlen = plan_mask_ref(mask)
    assert torch.equal(cu.cpu(), exact_cu)
    assert torch.equal(indices[: len(exact_indices)].cpu(), exact_indices)
    assert (indices[len(exact_indices) :] == -1).all()
    again = native_cuda.plan_mask_fwd(mask.to(device))
    assert torch.equal(again[0].cpu(), exact_indices)
    assert again[2] == max_seqlen


@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (300, 5), (3, 128), (0, 4), (4, 0)])
def test_plan_mask(device, shape):
    check_mask(device, shape)


def check_rows(device: str, dtype: torch.dtype, columns: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(2)
    padded = torch.randint(0, 2 if dtype == torch.bool else 100, (40, *columns), generator=generator).to(dtype)
    indices = torch.randperm(40, generator=generator)[:23]
    indices[[4, 9]] = torch.tensor([-1, 40])
    inside = (indices >= 0) & (indices < 40)
    packed = native_cuda.gather(padded.to(device), indices.to(device)).cpu()
    assert torch.equal(packed[inside], padded[indices[inside]])
    assert not packed[~inside].any()
    exact = torch.zeros_like(padded)
    exact[indices[inside]] = packed[inside]
    assert torch.equal(native_cuda.scatter(packed.to(device), indices.to(device), 40).cpu(), exact)


ROWS = [(torch.float32, (16,)), (torch.bfloat16, (3,)), (torch.float16, (2, 5)), (torch.int64, ()), (torch.bool, (7,)),
        (torch.int8, (32,)), (torch.float64, (385,)), (torch.float32, (0,))]  # fmt: skip


@pytest.mark.parametrize(("dtype", "columns"), ROWS, ids=str)
def test_gather_and_scatter(device, dtype, columns):
    check_rows(device, dtype, columns)


def check_pool(device: str, dtype: torch.dtype, mode: str, D: int, lengths: list[int] = RAGGED) -> None:
    hidden = torch.randn(sum(lengths), D, generator=torch.Generator().manual_seed(3)).to(dtype)
    cu = _cu_seqlens(lengths)
    same, exact = pool_ref(hidden, cu, mode), pool_ref(hidden.double(), cu, mode)
    ours = native_cuda.pool(hidden.to(device), cu.to(device), mode).cpu()
    assert_within_budget(ours, same, exact, what=mode)
    unit = native_cuda.pool(hidden.to(device), cu.to(device), mode, normalize=True, output="float32").cpu()
    assert_within_budget(unit, F.normalize(pool_ref(hidden.float(), cu, mode)), F.normalize(exact), what="normalised")


@pytest.mark.parametrize("D", [1, 37, 384, 2304])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_pool(device, dtype, mode, D):
    check_pool(device, dtype, mode, D)


def test_pool_of_nan_and_infinity(device):
    hidden = torch.tensor([[1.0, float("nan")], [float("-inf"), 2.0], [float("-inf"), 3.0]])
    for mode in MODES:
        ours = native_cuda.pool(hidden.to(device), _cu_seqlens([2, 1]).to(device), mode).cpu()
        assert torch.equal(ours.nan_to_num(7, 8, 9), pool_ref(hidden, _cu_seqlens([2, 1]), mode).nan_to_num(7, 8, 9))


def check_quantised(device: str, output: str, D: int) -> None:
    hidden, cu = torch.randn(sum(RAGGED), D, generator=torch.Generator().manual_seed(4)), _cu_seqlens(RAGGED)
    hidden[:, D // 2] = 0.5  # a dimension without a range
    place = (hidden.to(device), cu.to(device), "mean", False)
    vectors = native_cuda.pool(*place).cpu().numpy()
    low = vectors.min(axis=0)
    step = (vectors.max(axis=0) - low) / np.float32(255)
    ours = native_cuda.pool(*place, output, torch.from_numpy(low).to(device), torch.from_numpy(step).to(device))
    exact = quantize_vectors(vectors, output)
    assert ours.cpu().numpy().dtype == exact.dtype
    assert np.array_equal(ours.cpu().numpy(), exact)


@pytest.mark.parametrize("D", [37, 384])
@pytest.mark.parametrize("output", ["int8", "uint8", "binary", "ubinary"])
def test_pool_quantised(device, output, D):
    check_quantised(device, output, D)


def check_attention(
    device: str, dtype: torch.dtype, H: int, K: int, lengths: list[int], max_seqlen: int, scale: float | None = None
) -> None:
    scale = K**-0.5 if scale is None else scale
    qkv = torch.randn(sum(lengths), 3, H, K, generator=torch.Generator().manual_seed(5)).to(dtype)
    cu = _cu_seqlens(lengths)
    out, lse = native_cuda.attention_fwd(qkv.to(device), cu.to(device), max_seqlen, scale)
    same, exact = (attention_ref(x, cu, max_seqlen, scale) for x in (qkv, qkv.double()))
    assert_within_budget(out.cpu(), same, exact)
    parts = qkv.double().split(lengths)
    exact_lse = torch.cat([(torch.einsum("ihk,jhk->ihj", x[:, 0], x[:, 1]) * scale).logsumexp(-1) for x in parts])
    assert torch.allclose(lse.cpu().double(), exact_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("K", [16, 32, 48, 64, 80, 96, 112, 128])
def test_attention_of_every_head_size(device, dtype, K):
    check_attention(device, dtype, 2, K, RAGGED, 40)


@pytest.mark.parametrize("lengths", [[1], [128], [15, 0, 16, 17], [127, 65, 64, 63, 1]], ids=str)
def test_attention_of_every_length(device, lengths):
    check_attention(device, torch.bfloat16, 3, 64, lengths, max(lengths))


def test_attention_of_many_sequences(device):
    check_attention(device, torch.float16, 1, 16, LENGTHS["many"], 5)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 20.0])
def test_attention_scale(device, scale):
    check_attention(device, torch.float16, 2, 32, RAGGED, 37, scale)


def test_attention_past_max_seqlen_is_nan(device):
    qkv, cu = torch.randn(50, 3, 2, 16).half().to(device), _cu_seqlens([10, 33, 7]).to(device)
    out, lse = native_cuda.attention_fwd(qkv, cu, 32, 0.25)
    for x in (out, lse):
        assert torch.equal(x.isnan().flatten(1).all(1).cpu(), torch.tensor([False] * 10 + [True] * 33 + [False] * 7))
        assert not x[:10].isnan().any()


def test_attention_of_no_tokens(device):
    out, lse = native_cuda.attention_fwd(
        torch.empty(0, 3, 2, 16).half().to(device), _cu_seqlens([0]).to(device), 0, 1.0
    )
    assert out.shape == (0, 2, 16)
    assert lse.shape == (0, 2)


MUTANTS = [
    ("attention", "j * 8 + column + r % 2 < length ?", "true ?", "attention"),
    ("attention", "lane / 16 * 8 + lane % 8) * stride + k", "lane % 8) * stride + k", "attention"),
    ("attention", "  async_wait();\n", "", "attention"),
    ("attention", "static_cast<T*>(out), lse, H, K, max_seqlen, scale * LOG2E", "static_cast<T*>(out), lse, H, K, "
     "max_seqlen, scale", "attention"),
    ("pack", "      before += totals[w];\n", "", "plan"),
    ("pack", "cu_seqlens[middle] <= token", "cu_seqlens[middle] < token", "plan"),
    ("pack", "(1u << lane) - 1", "(2u << lane) - 1", "mask"),
    ("pack", "other >= 0 && other < num_rows", "other >= 0 && other <= num_rows - 2", "rows"),
    ("pool", "token - begin + 1", "token - begin", "weightedmean"),
    ("pool", "sum / divisor", "sum / (divisor + 1.0f)", "mean"),
    ("pool", "partial[8 * b + i] / norm > 0.0f", "partial[8 * b + i] / norm >= -0.1f", "binary"),
    ("pool", "floorf(", "rintf(", "int8"),
]  # fmt: skip
CHECKS = {
    "attention": lambda: check_attention("cpu", torch.bfloat16, 2, 32, [37, 5, 20], 37),
    "plan": lambda: check_plan("cpu", LENGTHS["many"]),
    "mask": lambda: check_mask("cpu", (7, 33)),
    "rows": lambda: check_rows("cpu", torch.float32, (16,)),
    "weightedmean": lambda: check_pool("cpu", torch.float32, "weightedmean", 37),
    "mean": lambda: check_pool("cpu", torch.float32, "mean", 384),
    "binary": lambda: check_quantised("cpu", "binary", 37),
    "int8": lambda: check_quantised("cpu", "int8", 37),
}


@pytest.mark.parametrize(("file", "old", "new", "what"), MUTANTS)
def test_mutants_fail(monkeypatch, poisoned_empty, file, old, new, what):
    use_emulator(monkeypatch, emulator(file, old, new))
    with pytest.raises(AssertionError):
        CHECKS[what]()


def test_the_emulator_finds_a_deadlock(tmp_path):
    source = tmp_path / "deadlock.cpp"
    source.write_text(
        '#include "cuda/simt.h"\n'
        "void kernel() { if (threadIdx.x < 40) fastbert::__syncthreads(); }\n"
        "int main() { fastbert::launch(kernel, 1, 64, 0, nullptr); }\n"
    )
    if CXX is None:
        pytest.skip("g++ is not installed")
    program = tmp_path / "deadlock"
    subprocess.run(
        [CXX, "-std=c++17", f"-I{ROOT / 'csrc'}", f"-I{EMULATOR}", str(source), "-o", str(program)], check=True
    )
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "wait for each other" in done.stderr


def test_errors_print_both_sides(device):
    cu = _cu_seqlens([4]).to(device)

    def qkv(K: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.zeros(4, 3, 1, K, dtype=dtype, device=device)

    with pytest.raises(ValueError, match="multiple of 16 from 16 to 128, got 24"):
        native_cuda.attention_fwd(qkv(24), cu, 4, 1.0)
    with pytest.raises(ValueError, match="from 16 to 128, got 144"):
        native_cuda.attention_fwd(qkv(144), cu, 4, 1.0)
    with pytest.raises(TypeError, match=r"qkv must be torch.float16 or torch.bfloat16, got torch.float32"):
        native_cuda.attention_fwd(qkv(16, torch.float32), cu, 4, 1.0)
    with pytest.raises(TypeError, match=r"cu_seqlens must be torch.int32, got torch.int64"):
        native_cuda.attention_fwd(qkv(16), cu.long(), 4, 1.0)
    with pytest.raises(NotImplementedError, match=r"max_seqlen <= 128 and dropout_p = 0, got 129 and 0\.1"):
        native_cuda.attention_fwd(qkv(16), cu, 129, 1.0, 0.1)
    with pytest.raises(ValueError, match=f"cu_seqlens must be on {device}.*got meta"):
        native_cuda.attention_fwd(qkv(16), cu.to("meta"), 4, 1.0)
    with pytest.raises(ValueError, match="needs low and step"):
        native_cuda.pool(torch.zeros(4, 8, device=device), cu, output="int8")
    with pytest.raises(ValueError, match="mode 'first' is not one of cls"):
        native_cuda.pool(torch.zeros(4, 8, device=device), cu, "first")
    with pytest.raises(ValueError, match="capacity is 2147483648"):
        native_cuda.plan(torch.zeros(4, dtype=torch.int32, device=device), 2**31)
    with pytest.raises(NotImplementedError, match="no backward"):
        native_cuda.pool_bwd()


def test_a_tensor_on_the_cpu_is_refused():
    with pytest.raises(ValueError, match="lengths must be on cuda, got cpu"):
        native_cuda.plan(torch.zeros(4, dtype=torch.int32), 4)


def test_a_gpu_too_old_is_refused(monkeypatch):
    monkeypatch.setattr(native_cuda, "available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ImportError, match="need sm_80 or newer, this GPU is sm_75"):
        native_cuda.require()


def test_an_extension_without_cuda_says_how_to_build_it(monkeypatch):
    monkeypatch.setattr(native_cuda, "available", lambda: False)
    with pytest.raises(ImportError, match="nvcc"):
        native_cuda.require()


@pytest.mark.gpu
def test_forced_through_ops():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    qkv, cu = torch.randn(40, 3, 2, 64, device="cuda").bfloat16(), _cu_seqlens([33, 7]).cuda()
    assert backend_for("attention", qkv) is not native_cuda
    with use_backend("native"):
        assert backend_for("attention", qkv) is native_cuda
        out = ops.attention(qkv, cu, 33)
        vectors = ops.pool(out.flatten(1), cu)
    exact = attention_ref(qkv.double(), cu, 33)
    assert_within_budget(out, attention_ref(qkv, cu, 33), exact)
    assert_within_budget(vectors, pool_ref(out.flatten(1), cu, "mean"), pool_ref(out.flatten(1).double(), cu, "mean"))


# Registers of a thread, at most. Attention: 4 warps a block, 128 registers leave room for 4 blocks an SM, 168 for 3.
REGISTERS = {"attention_kernel": 168, "pool_kernel": 64, "rows_kernel": 40, "scan_kernel": 40, "tokens_kernel": 40,
             "count_kernel": 40, "indices_kernel": 40, "tail_kernel": 40}  # fmt: skip


def _ptxas(source: Path) -> str:
    """What the assembler says of one file for both architectures, kept by what went into it."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    texts = [p.read_text() for p in [source, *sorted((ROOT / "csrc" / "cuda").glob("*.h"))]]
    key = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    kept = ROOT / "build" / "ptxas" / f"{source.stem}-{key}.log"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 90)]
        flags = ["-std=c++17", "-O3", "-Xptxas=-v", *targets, f"-I{ROOT / 'csrc'}", "-c", str(source)]
        done = subprocess.run([nvcc, *flags, "-o", os.devnull], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr
        private = kept.with_suffix(f".{os.getpid()}")
        private.write_text(done.stderr)
        private.replace(kept)
    return kept.read_text()


def test_registers_and_spills():
    """Every kernel for both architectures: no stack, so no spill, and no more registers than its blocks an SM allow."""
    seen = set()
    for source in (ROOT / "csrc" / "cuda").glob("*.cu"):
        for part in _ptxas(source).split("Compiling entry function '")[1:]:
            name, arch = re.match(r"(\w+)' for '(sm_\d+)'", part).groups()
            kernel = next(k for k in REGISTERS if k in name)
            seen.add((arch, kernel))
            assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in part, f"{arch} {name}: {part}"
            registers = int(re.search(r"Used (\d+) registers", part).group(1))
            # the instances for head sizes to 64 leave room for a fourth block
            most = 128 if kernel == "attention_kernel" and "Li8E" not in name else REGISTERS[kernel]
            assert registers <= most, f"{arch} {name}: {registers} registers"
    assert seen == {(arch, kernel) for arch in ("sm_80", "sm_90") for kernel in REGISTERS}
