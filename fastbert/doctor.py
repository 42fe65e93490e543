"""What this machine is, what each op and engine would run on, and what is wrong: the facts behind `fastbert doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from fastbert import machine, native
from fastbert.engine.dtypes import auto_on_cpu, resolve_dtype
from fastbert.models import BertConfig, BertModel
from fastbert.models.quantize import loaded_dtype, quantize
from fastbert.ops import OPS, dispatch
from fastbert.packing import pack

_COMPILERS = (name for name in dispatch.BACKENDS if name != "native")  # backends that are packages of their own
PACKAGES = ("fastbert-engine", "torch", *_COMPILERS, "numpy", "tokenizers", "safetensors", "transformers")
_ENVIRONMENT = ("FASTBERT_BACKEND", "FASTBERT_ISA", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE")
# MiniLM-L6: the encoder that most embedding services run.
_PROBE = BertConfig(num_hidden_layers=6, hidden_size=384, num_attention_heads=12, intermediate_size=1536)
_BASE = BertConfig()
_ENGINE_DTYPES = {"cpu": ("float32", "bfloat16", "int8"), "cuda": ("bfloat16", "float16")}
_LENGTHS = (16, 24, 32, 48, 64, 96, 128)


@dataclass(frozen=True)
class Finding:
    """Something to change: `broken` means that the installation does not work as meant, else it is advice."""

    broken: bool
    what: str
    cure: str


@dataclass(frozen=True)
class Report:
    """All that `examine` found, as plain values: `dataclasses.asdict` makes it JSON.

    Attributes:
        machine: processor, features, cores, memory, GPUs.
        versions: installed packages; None where one is not.
        environment: variables that change what runs.
        native: the C++ extension: instruction sets, or why it does not load.
        ops: op -> device -> dtype -> backend that computes it unasked.
        reasons: why ops run as they do, each reason once, with the ops and dtypes that it is of.
        engines: device and dtype -> what a forward pass would run on, and why where that is no engine.
        measured: device and dtype -> roofs and speeds, empty without measuring.
        findings: what to change.
    """

    machine: dict[str, Any]
    versions: dict[str, str | None]
    environment: dict[str, str]
    native: dict[str, Any]
    ops: dict[str, dict[str, dict[str, str]]]
    reasons: list[str]
    engines: dict[str, str]
    measured: dict[str, dict[str, float]]
    findings: list[Finding] = field(default_factory=list)

    @property
    def broken(self) -> bool:
        """Whether anything does not work as meant."""
        return any(finding.broken for finding in self.findings)


def examine(measure: bool = True, say: Callable[[str], object] = lambda step: None) -> Report:
    """Look at the machine and the installation.

    Args:
        measure: also measure roofs and a MiniLM-shaped encoder: some seconds.
        say: told what is being done.
    """
    say("reading the machine")
    cpu = machine.cpu()
    extension = _extension()
    report = Report(
        machine={
            "cpu": cpu.model,
            "features": list(cpu.features),
            "cores": cpu.online,
            "affinity": cpu.affinity,
            "quota": cpu.quota,
            "usable": cpu.usable,
            "threads": torch.get_num_threads(),
            "memory_gib": round((machine.memory_bytes() or 0) / 2**30, 1) or None,
            "gpus": _gpus(),
            "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        },
        versions={name: _version(name) for name in PACKAGES},
        environment={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        native=extension,
        ops={op: _backends(op) for op in _OPS},
        reasons=_reasons(),
        engines=_engines(),
        measured={k: v for device in _devices() for k, v in _measure(device, say).items()} if measure else {},
    )
    report.findings.extend(_findings(report, cpu))
    return report


def _gpus() -> list[str]:
    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return machine.nvidia_gpus()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extension() -> dict[str, Any]:
    try:
        extension = native.require()
    except (ImportError, ValueError) as error:
        return {"loads": False, "why": str(error)}
    return {
        "loads": True,
        "isa": extension.isa(),
        "supported": list(extension.supported_isas()),
        "openmp": machine.openmp_runtimes(),
    }


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_OPS = tuple(op for op in OPS if not op.startswith("plan_"))
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _devices() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _reasons() -> list[str]:
    """One line a (device, dtype, backend), all ops together where they agree."""
    found: dict[str, list[str]] = {}
    for device in _devices():
        for dtype in _DTYPES:
            for op in _OPS:
                reason = dispatch.why(op, device, dtype).replace(f"no {op} of", "no op of")
                if device == "cpu" and not native.available():
                    reason = "the native extension was not built"
                found.setdefault(f"{device} {_short(dtype)}: {reason}", []).append(op)
    return [f"{line} ({'every op' if len(ops) == len(_OPS) else ', '.join(ops)})" for line, ops in found.items()]


def _backends(op: str) -> dict[str, dict[str, str]]:
    return {device: {_short(d): dispatch.chosen(op, device, d) for d in _DTYPES} for device in _devices()}


def _tiny() -> BertModel:
    config = BertConfig(
        vocab_size=32, hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval()


def _engines() -> dict[str, str]:
    found = {}
    with torch.no_grad():
        for device in _devices():
            for name in _ENGINE_DTYPES[device]:
                model = quantize(_tiny().to(getattr(torch, loaded_dtype(name))), name)
                plan = model.to(device).execution_plan()
                # What follows the threads is of this tiny model alone.
                found[f"{device} {name}"] = plan if plan.startswith("ops") else ", ".join(plan.split(", ")[:3])
    return found | {"cpu auto": "{}: {}".format(*auto_on_cpu())}


def _median_seconds(function: Callable[[], object], device: str, budget_s: float = 0.6) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: list[float] = []
    function()
    wait()
    while len(times) < 3 or sum(times) < budget_s:
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _flop(config: BertConfig, lengths: Sequence[int]) -> int:
    """Arithmetic of a forward pass over sequences of these lengths."""
    D, F = config.hidden_size, config.intermediate_size
    return config.num_hidden_layers * sum(2 * n * (4 * D * D + 2 * D * F) + 4 * n * n * D for n in lengths)


@torch.no_grad()
def _measure(device: str, say: Callable[[str], object]) -> dict[str, dict[str, float]]:
    """Roofs of a device in GB/s and GFLOP/s, and tokens/s of a MiniLM-shaped encoder there, by dtype."""
    gpu = device == "cuda"
    say(f"measuring memory of {device}")
    source = torch.randn((64 if gpu else 16) << 20, device=device)
    target = torch.empty_like(source)
    copy = _median_seconds(lambda: target.copy_(source), device)
    measured: dict[str, dict[str, float]] = {f"{device} copy": {"gb_s": 2 * source.nbytes / copy / 1e9}}
    model = BertModel(_PROBE, add_pooling_layer=False).eval().to(device)
    generator = torch.Generator().manual_seed(0)
    lengths = _LENGTHS * (40 if gpu else 4)
    batch = pack([torch.randint(1000, 30000, (n,), generator=generator).tolist() for n in lengths])
    flop, edge = _flop(_PROBE, lengths), 8192 if gpu else 1024
    for name in (resolve_dtype("auto", torch.device(device)),) if gpu else ("float32", "bfloat16"):
        say(f"measuring {name} on {device}")
        dtype: torch.dtype = getattr(torch, name)
        a = torch.randn(edge, edge, device=device).to(dtype)
        gemm = 2 * edge**3 / _median_seconds(partial(torch.mm, a, a), device, 0.4)
        model.to(dtype)
        seconds = _median_seconds(partial(model.forward_packed, batch), device)
        peak = native.peak_flop_s(dtype) if native.available() and not gpu else 0.0
        measured[f"{device} {name}"] = {
            "peak_gflop_s": max(peak, gemm) / 1e9,
            "gemm_gflop_s": gemm / 1e9,
            "encoder_gflop_s": flop / seconds / 1e9,
            "tokens_s": sum(lengths) / seconds,
            "base_tokens_s": flop / seconds / (_flop(_BASE, lengths) / sum(lengths)),
        }
    return measured


def _findings(report: Report, cpu: machine.Cpu) -> list[Finding]:
    found = []
    if not report.native["loads"]:
        what, build = "the native extension was not built", "`pip install --force-reinstall --no-deps .`"
        if native.available():
            what = f"the native extension does not load: {report.native['why']}"
        cure = f"with a C++17 compiler at hand run {build} in the source tree, without FASTBERT_NATIVE=0"
        found.append(Finding(True, what, cure))
    runtimes = report.native.get("openmp", [])
    if len(runtimes) > 1:
        found.append(
            Finding(
                True,
                f"{len(runtimes)} OpenMP runtimes are loaded and fight over the cores: {', '.join(runtimes)}",
                "import torch before other packages that bring OpenMP, or remove the one that you do not need",
            )
        )
    if report.machine["gpus"] and not torch.cuda.is_available():
        built = "for the CPU alone" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
        cure = "install a CUDA build of torch that the driver supports"
        found.append(
            Finding(
                True, f"there is a GPU ({report.machine['gpus'][0]}), but torch {torch.__version__} is {built}", cure
            )
        )
    threads = torch.get_num_threads()
    if threads > cpu.usable:
        what = f"torch runs {threads} threads, but this process may use {cpu.usable} cores"
        found.append(Finding(False, what, f"set OMP_NUM_THREADS={cpu.usable}, or --threads {cpu.usable}"))
    if threads < cpu.usable:
        what = f"torch runs {threads} threads of {cpu.usable} cores that this process may use"
        found.append(Finding(False, what, "raise OMP_NUM_THREADS if nothing else needs them"))
    for name in ("FASTBERT_BACKEND", "FASTBERT_ISA"):
        if name in report.environment:
            what = f"{name}={report.environment[name]} overrides what fastbert would choose"
            found.append(Finding(False, what, f"unset {name} outside of tests"))
    fp32, bf16 = report.measured.get("cpu float32"), report.measured.get("cpu bfloat16")
    if fp32 and bf16 and bf16["tokens_s"] > 1.15 * fp32["tokens_s"]:
        ratio = bf16["tokens_s"] / fp32["tokens_s"]
        found.append(Finding(False, f"bfloat16 is {ratio:.1f}x as fast as float32 here", "try --dtype bfloat16"))
    return found
