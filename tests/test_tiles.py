"""Measured tiles, their file, and the command that measures: under Triton's interpreter with a clock of our own.

`tests/test_kernels.py` runs this file again with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import pytest
import torch

from fastbert import kernels

if not kernels.available():
    pytest.skip("Triton is not installed", allow_module_level=True)

from fastbert.kernels import configs, tiles, tune
from fastbert.kernels.tiles import Tile

interpreted = pytest.mark.skipif(not kernels.interpreted(), reason="runs in the process with TRITON_INTERPRET=1")
SMALL = {"tokens": 40, "length": 20, "num_heads": 2, "head_size": 16, "dtype": torch.float16, "device": "cpu"}
HALF = torch.float16


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTBERT_CACHE", str(tmp_path))
    monkeypatch.setattr(tiles, "gpu_name", lambda: "a GPU")
    tiles.measured.cache_clear()
    yield tmp_path / "tiles.json"
    tiles.measured.cache_clear()


def _clock(kernel: str, fast: Tile, ms: float):
    """Every tile takes 1 ms, and the fast one of one kernel `ms`."""
    return lambda call: ms if tiles._tried.get(kernel) == fast else 1.0


@interpreted
def test_the_fastest_tile_is_kept_for_this_gpu_alone(cache, monkeypatch):
    fast = configs.candidates("attention_dkv", configs.attention_dkv_tile(16, HALF, False))[-1]
    found = {t.kernel: t for t in tune.tune(_clock("attention_dkv", fast, 0.5), **SMALL)}
    assert set(found) == {
        "attention_fwd", "attention_dq", "attention_dkv", "norm_fwd", "norm_bwd", "gelu", "short", "linear",
    }  # fmt: skip
    assert found.pop("attention_dkv").best == fast
    assert all(t.best == t.static for t in found.values())
    assert configs.attention_dkv_tile(16, HALF, False) == fast
    assert configs.attention_dkv_tile(32, HALF, False) != fast, "another head size"
    assert configs.attention_dkv_tile(16, torch.bfloat16, False) != fast, "another dtype"
    monkeypatch.setattr(tiles, "gpu_name", lambda: "another GPU")
    assert configs.attention_dkv_tile(16, HALF, False) != fast


@interpreted
def test_neither_noise_nor_a_wrong_result_replaces_a_static_tile(monkeypatch):
    fast = configs.candidates("attention_fwd", configs.attention_fwd_tile(16, HALF, False))[-1]
    first = next(tune.tune(_clock("attention_fwd", fast, 0.98), **SMALL))
    assert first.best == first.static
    monkeypatch.setattr(tune, "_same", lambda found, right: False)
    first = next(tune.tune(_clock("attention_fwd", fast, 0.1), **SMALL))
    assert first.best == first.static


def test_without_a_file_tiles_are_static(cache):
    assert not cache.exists()
    assert tiles.chosen("gelu", HALF, 3072, Tile(4, 512, 4)) == Tile(4, 512, 4)


def test_what_is_written_is_read_and_added_to(cache):
    one, two = Tile(1, 2, 4, 3, 128, 64), Tile(8, 8, 8)
    tiles.write({tiles.key_of("gelu", HALF, 64): one})
    tiles.write({tiles.key_of("linear", HALF, 64): two})
    static = Tile(4, 512, 4)
    assert tiles.chosen("gelu", HALF, 64, static) == one
    assert tiles.chosen("linear", HALF, 64, static) == two
    assert tiles.chosen("gelu", HALF, 65, static) == static
    assert [p.name for p in cache.parent.iterdir()] == [cache.name]


GOOD = Tile(1, 2, 4)._asdict()


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"a": 3}', "\x00", *(json.dumps({"a": GOOD | wrong}) for wrong in (
        {"rows": 0}, {"cols": "4"}, {"depth": -1}, {"num_warps": None}, {"width": 3},
    ))],
)  # fmt: skip
def test_a_broken_file_is_ignored_with_one_warning(cache, text):
    cache.write_text(text)
    static = Tile(4, 512, 4)
    with pytest.warns(UserWarning, match=r"tiles\.json is ignored, static tiles are used"):
        assert tiles.chosen("gelu", HALF, 64, static) == static
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tiles.chosen("gelu", HALF, 64, static) == static


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_tuning_without_a_gpu_says_so():
    run = subprocess.run(
        [sys.executable, "-m", "fastbert.kernels", "--tune"], capture_output=True, text=True, check=False
    )
    assert run.returncode != 0
    assert "measures on a CUDA device" in run.stderr
