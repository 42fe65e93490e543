"""What this machine is: processors and what they multiply, the cores this process may use, GPUs, runtimes loaded."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

# Feature flags that decide how fast an encoder can be, as the kernel spells them.
_FEATURES = (
    "avx2",
    "fma",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "i8mm",
)


@dataclass(frozen=True)
class Cpu:
    """Attributes:
    model: the processor's name.
    vendor: who made it, as it says itself: AuthenticAMD, GenuineIntel; empty where it does not say.
    features: instruction sets that matter here.
    online: cores of the machine.
    affinity: cores that this process may run on.
    quota: cores that the container's CPU quota allows, or None without one.
    """

    model: str
    vendor: str
    features: tuple[str, ...]
    online: int
    affinity: int
    quota: float | None

    @property
    def usable(self) -> int:
        """Threads that can run at once: the least of cores, affinity and quota (rounded up), at least 1."""
        quota = self.online if self.quota is None else int(-(-self.quota // 1))
        return max(1, min(self.online, self.affinity, quota))


def cpu() -> Cpu:
    """The processors as this process sees them now."""
    text = _read(Path("/proc/cpuinfo"))
    model = re.search(r"^model name\s*:\s*(.*)$", text, re.M)
    vendor = re.search(r"^vendor_id\s*:\s*(.*)$", text, re.M)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.M)
    found = set(flags[1].split()) if flags else set()
    online = os.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else online
    name = model[1] if model else platform.processor() or platform.machine()
    features = tuple(f for f in _FEATURES if f in found)
    return Cpu(name, vendor[1] if vendor else "", features, online, affinity, cpu_quota())


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores that the control group's quota allows (v2 `cpu.max`, v1 `cpu.cfs_quota_us`), the tightest of all levels.

    Args:
        root: where control groups are mounted.
        membership: the file that names this process's group.
    """
    allowed = []
    for line in _read(membership).splitlines() or ["0::/"]:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base = root
        elif "cpu" in controllers.split(","):
            base = next((root / d for d in (controllers, "cpu") if (root / d).is_dir()), root / "cpu")
        else:
            continue
        folder = base / path.lstrip("/")
        for level in (folder, *folder.parents):
            if not level.is_relative_to(base):
                break
            allowed += [quota for quota in (_quota_v2(level), _quota_v1(level)) if quota is not None]
    return min(allowed, default=None)


def _quota_v2(folder: Path) -> float | None:
    fields = _read(folder / "cpu.max").split()
    return int(fields[0]) / int(fields[1]) if len(fields) == 2 and fields[0] != "max" else None


def _quota_v1(folder: Path) -> float | None:
    quota, period = _read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) > 0 else None


def openmp_runtimes(maps: Path = Path("/proc/self/maps")) -> list[str]:
    """Files of the OpenMP runtimes loaded in this process: two of them fight over the cores."""
    paths = {line.split(maxsplit=5)[-1] for line in _read(maps).splitlines() if "/" in line}
    return sorted(p for p in paths if re.match(r"lib(gomp|iomp5|omp)\b", Path(p).name))


def nvidia_gpus(root: Path = Path("/proc/driver/nvidia/gpus")) -> list[str]:
    """Names of the NVIDIA GPUs that the driver sees, whatever torch was built for."""
    found = (re.search(r"^Model:\s*(.*)$", _read(path), re.M) for path in sorted(root.glob("*/information")))
    return [match[1].strip() for match in found if match]


def memory_bytes() -> int | None:
    """Memory that this process may use: the machine's, or the control group's limit where that is less."""
    total = re.search(r"^MemTotal:\s*(\d+) kB", _read(Path("/proc/meminfo")), re.M)
    limit = _read(Path("/sys/fs/cgroup/memory.max")).strip()
    known = [int(total[1]) * 1024] if total else []
    return min(known + ([int(limit)] if limit.isdigit() else []), default=None)


def _read(path: Path) -> str:
    """The file, or nothing where there is none or it may not be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
