"""Builds `fastbert._C`: csrc/*.cpp once, csrc/cpu/*.cpp once per instruction set, csrc/cuda/*.cu when nvcc is found.

FASTBERT_NATIVE=0 leaves the extension out, FASTBERT_CUDA=0 its CUDA part; FASTBERT_SANITIZE=1 builds it, without CUDA,
with the address and undefined sanitizers.
"""

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

CSRC = Path("csrc")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
AVX512 += ["-Wno-uninitialized"]  # GCC 12 warns of its own immintrin.h
AVX512VNNI = [*AVX512, "-mavx512vnni"]
X86 = {"portable": [], "avx2": AVX2, "avxvnni": [*AVX2, "-mavxvnni"], "avx512": AVX512, "avx512vnni": AVX512VNNI}
X86["avx512bf16"] = [*AVX512VNNI, "-mavx512bf16"]
X86["amx"] = [*X86["avx512bf16"], "-mamx-tile", "-mamx-bf16", "-mamx-int8"]
X86["amxemulated"] = [*X86["avx512bf16"], "-DFASTBERT_EMULATE_AMX"]
ENCODER_ONLY = ("amx", "amxemulated")  # the other ops are those of avx512bf16
ENCODER_FILES = ("encoder.cpp", "peak.cpp")
ISAS = X86 if platform.machine().lower() in ("x86_64", "amd64") else {"portable": []}
SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined"] if os.environ.get("FASTBERT_SANITIZE") == "1" else []
# No -ffast-math: NaN and infinity must come out as they went in, and loading must not change the denormal mode.
CXXFLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas"]
# sm_80 runs on all of 8.x, sm_90 on 9.0, and the driver compiles the PTX for whatever is newer.
ARCHITECTURES = ["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90"]
NVCCFLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", *(f"-gencode={a}" for a in ARCHITECTURES)]


def run(command: list[str]) -> None:
    """Run a compiler; a failure ends in what to do."""
    print(shlex.join(command), flush=True)
    if subprocess.run(command).returncode:
        sys.exit(
            f"fastbert: `{command[0]}` failed (above). Install a C++17 compiler with OpenMP (for instance g++ >= 9) "
            "or set FASTBERT_NATIVE=0 to install without the native kernels, FASTBERT_CUDA=0 without their CUDA part."
        )


def is_fresh(target: Path, command: list[str]) -> bool:
    """Whether `target` was made by this very command from files that have not changed since."""
    stamp, depfile = target.with_suffix(".cmd"), target.with_suffix(".d")
    if not (target.exists() and stamp.exists() and depfile.exists() and stamp.read_text() == shlex.join(command)):
        return False
    depends = [Path(p) for p in depfile.read_text().replace("\\\n", " ").split(":", 1)[1].split()]
    return all(p.exists() and p.stat().st_mtime <= target.stat().st_mtime for p in depends)


def compile_one(source: Path, target: Path, compiler: list[str]) -> None:
    """Compile one file, unless its object is fresh."""
    command = [*compiler, "-MMD", "-MF", str(target.with_suffix(".d")), "-c", str(source), "-o", str(target)]
    if not is_fresh(target, command):
        run(command)
        target.with_suffix(".cmd").write_text(shlex.join(command))


def pybind11_include() -> Path:
    """Its headers; a machine without the package may have torch, which carries them."""
    for package, folder in (("pybind11", "include"), ("torch", "include")):
        found = importlib.util.find_spec(package)
        if (
            found is not None
            and found.origin is not None
            and (Path(found.origin).parent / folder / "pybind11").exists()
        ):
            return Path(found.origin).parent / folder
    sys.exit("fastbert: pybind11 not found: `pip install pybind11`")


class BuildNative(build_ext):
    """One object per source and instruction set, compiled in parallel and kept in build/ between builds."""

    def build_extension(self, ext: Extension) -> None:
        candidates = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
        cxx = next((c.split() for c in candidates if shutil.which(c.split()[0])), None)
        if cxx is None:
            names = " or ".join(candidates)
            sys.exit(f"fastbert: {names} not found. Install a C++17 compiler with OpenMP or set FASTBERT_NATIVE=0.")
        wanted = os.environ.get("FASTBERT_CUDA", "1") != "0" and not SANITIZE
        nvcc = shutil.which("nvcc") if wanted else None
        includes = [f"-I{CSRC}", f"-I{pybind11_include()}", f"-I{sysconfig.get_path('include')}"]
        base = [*cxx, *CXXFLAGS, *WARNINGS, *SANITIZE, *includes]
        jobs = [(s, s.stem, base) for s in sorted(CSRC.glob("*.cpp")) if nvcc or s.stem != "bindings_cuda"]
        if nvcc:  # only the module's own file asks whether there is CUDA
            jobs = [(s, n, [*c, "-DFASTBERT_CUDA"] if n == "bindings" else c) for s, n, c in jobs]
        for isa, flags in ISAS.items():
            per_isa = [*base, *flags, f"-DFASTBERT_ISA={isa}"]
            sources = sorted((CSRC / "cpu").glob("*.cpp"))
            chosen = [s for s in sources if isa not in ENCODER_ONLY or s.name in ENCODER_FILES]
            jobs += [(s, f"{s.stem}-{isa}", per_isa) for s in chosen]
        if nvcc:
            device = [nvcc, *NVCCFLAGS, f"-I{CSRC}"]
            jobs += [(s, f"{s.stem}-cuda", device) for s in sorted((CSRC / "cuda").glob("*.cu"))]

        folder = Path("build") / f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        targets = [folder / f"{name}.o" for _, name, _ in jobs]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda job, target: compile_one(job[0], target, job[2]), jobs, targets))
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        # nvcc links where it compiled: it knows its own libcudart_static and what that needs.
        link = [nvcc, "-shared", "-cudart=static", "-Xcompiler=-fopenmp"] if nvcc else [*cxx, "-shared"]
        link += [] if nvcc else ["-fopenmp", *SANITIZE]
        run([*link, *map(str, targets), "-o", str(library)])


class ShipBenchmarks(build_py):
    """The wheel carries benchmarks/ as data of fastbert, so that `fastbert bench` works there and no name is taken."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "fastbert" / "bench" / "benchmarks"
            shutil.copytree(
                "benchmarks",
                target,
                dirs_exist_ok=True,
                ignore=lambda _, names: {n for n in names if n in ("results", "__pycache__")},
            )


paths = [str(p) for p in sorted(CSRC.rglob("*")) if p.suffix in (".cpp", ".h", ".cu")]
native = Extension("fastbert._C", [p for p in paths if p.endswith(".cpp")], depends=paths)
wanted = os.environ.get("FASTBERT_NATIVE", "1") != "0"
setup(ext_modules=[native] if wanted else [], cmdclass={"build_ext": BuildNative, "build_py": ShipBenchmarks})
