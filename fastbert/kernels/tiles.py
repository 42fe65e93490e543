"""A program's block, and the blocks that were measured to be the fastest on this GPU: a file, read once a process.

`python -m fastbert.kernels --tune` writes it, `configs.py` prefers it to its static choices. Nothing is measured here.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from fastbert.kernels import interpreted


class Tile(NamedTuple):
    """A program's block of the output, and how it is compiled; `depth` is the step of a product's inner loop."""

    rows: int
    cols: int
    num_warps: int
    num_stages: int = 2
    max_registers: int | None = None
    depth: int = 0

    def options(self, dependent: bool = False) -> dict[str, int | None]:
        """Keyword arguments of the launch. Multiply-adds are fused, whatever the default of this Triton. A `dependent`
        kernel begins while the one before still runs, and waits for it by itself."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return options | {"maxnreg": self.max_registers} | ({"launch_pdl": True} if dependent else {})


def gpu_name() -> str:
    """Name of the GPU in use; of a stand-in for one that is absent, or of the interpreter, a name that no GPU has."""
    if interpreted():
        return "interpreter"
    device = triton.runtime.driver.active.get_current_device()
    return torch.cuda.get_device_name(device) if isinstance(device, int) else str(device)


def tiles_path() -> Path:
    """The file: `tiles.json` in FASTBERT_CACHE, or in the user's cache."""
    folder = os.environ.get("FASTBERT_CACHE")
    return (Path(folder) if folder else Path.home() / ".cache" / "fastbert") / "tiles.json"


def key_of(kernel: str, dtype: torch.dtype, size: int) -> str:
    """What a measurement holds for: GPU, compiler, kernel, dtype, and head size or number of features."""
    return f"{gpu_name()}, triton {triton.__version__}, {kernel}, {str(dtype)[6:]}, {size}"


def _tile(fields: object) -> Tile:
    tile = Tile(**fields) if isinstance(fields, dict) else Tile(0, 0, 0)
    numbers = [v for k, v in tile._asdict().items() if not (v is None and k == "max_registers")]
    if not all(isinstance(n, int) and n >= 0 for n in numbers) or 0 in tile[:4]:
        raise ValueError(f"{fields!r} is no tile")
    return tile


@cache
def measured() -> dict[str, Tile]:
    """Tiles by `key_of`. A file that cannot be read is named in a warning, and then there are none."""
    path = tiles_path()
    if not path.exists():
        return {}
    try:
        return {key: _tile(fields) for key, fields in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(
            f"{path} is ignored, static tiles are used ({error}): delete it, then `python -m fastbert.kernels --tune`",
            stacklevel=2,
        )
        return {}


def write(found: dict[str, Tile]) -> Path:
    """Add tiles to the file, in one step for whoever reads it."""
    path = tiles_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps({k: t._asdict() for k, t in (measured() | found).items()}, indent=1))
    fresh.replace(path)
    measured.cache_clear()
    return path


_tried: dict[str, Tile] = {}


@contextmanager
def trying(kernel: str, tile: Tile) -> Iterator[None]:
    """In the block, in the whole process, a kernel has this tile."""
    _tried[kernel] = tile
    try:
        yield
    finally:
        del _tried[kernel]


def chosen(kernel: str, dtype: torch.dtype, size: int, static: Tile) -> Tile:
    """The tile that is being tried, or was measured here to be the fastest, or `static`."""
    if kernel in _tried:
        return _tried[kernel]
    found = measured()
    return found.get(key_of(kernel, dtype, size), static) if found else static
