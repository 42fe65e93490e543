"""What is shipped: the sdist and the wheel hold what they should, and a build that cannot work says what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fastbert import Embedder

ROOT = Path(__file__).parent.parent
TEXTS = ["A ferry in the storm.", "The boat did not sail."]
# The environment of the tests may hold this checkout as an editable installation, whose finder knows our _C.
ALONE = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
EMBED = """
import json
from fastbert import Embedder, native
vectors = Embedder.from_pretrained(sys.argv[1], "float32", device="cpu").encode(json.loads(sys.argv[2]))
print(json.dumps([native.available(), vectors.tolist()]))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The tree as a new user has it: no builds, no environment."""
    folder = tmp_path_factory.mktemp("source") / "fastbert"
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "__pycache__", "bench-report")
    shutil.copytree(ROOT, folder, ignore=left_out)
    return folder


def python(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, and what it printed."""
    command = [sys.executable, *map(str, arguments)]
    kept = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "PYTHONPATH")}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**kept, **environment})


@pytest.mark.parametrize(
    ("environment", "missing"),
    [({"PATH": "/nowhere"}, "c++ or g++ or clang++"), ({"CXX": "/nowhere/g++ -m64"}, "/nowhere/g++ -m64")],
)
def test_no_compiler_is_an_instruction(source, tmp_path, environment, missing):
    done = python("setup.py", "-q", "build_ext", "--build-lib", tmp_path, cwd=source, **environment)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == f"fastbert: {missing} not found. Install a C++17 compiler with OpenMP or set FASTBERT_NATIVE=0."


def test_a_compiler_that_fails_is_an_instruction(source, tmp_path):
    done = python("setup.py", "-q", "build_ext", "--build-lib", tmp_path, cwd=source, CXX="false", FASTBERT_CUDA="0")
    assert done.returncode == 1
    assert "fastbert: `false` failed (above)." in done.stderr
    assert "FASTBERT_NATIVE=0" in done.stderr


def test_the_sdist_holds_all_that_a_build_needs(source, tmp_path):
    done = python("setup.py", "-q", "sdist", "-d", tmp_path, cwd=source, FASTBERT_NATIVE="0")
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    for folder, pattern in (("csrc", "*.*"), ("benchmarks", "*.py"), ("fastbert", "*.py"), ("fastbert", "*.html")):
        files = {p.relative_to(source).as_posix() for p in (source / folder).rglob(pattern) if p.is_file()}
        assert files
        assert files <= found, sorted(files - found)
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "fastbert/py.typed"} <= found
    assert not [name for name in found if name.startswith(("tests", "shared")) or name.endswith((".so", ".csv"))]


def test_a_wheel_without_the_extension_works(source, tmp_path, minilm):
    """FASTBERT_NATIVE=0, no compiler anywhere: pure Python, which computes the same."""
    command = ("-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index", "-w", tmp_path, source)
    done = python(*command, cwd=source, FASTBERT_NATIVE="0", PATH="/nowhere")
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.whl")
    assert path.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    assert {"fastbert/bench/benchmarks/__main__.py", "fastbert/serve/page/index.html", "fastbert/py.typed"} <= names
    rooms = {name.split("/")[0] for name in names}
    assert {room.partition("-")[0] for room in rooms} == {"fastbert", "fastbert_engine"}
    assert not [name for name in names if name.endswith((".so", ".csv"))]
    installed = str(tmp_path / "installed")
    done = python("-c", ALONE + EMBED, minilm, json.dumps(TEXTS), cwd=tmp_path, PYTHONPATH=installed)
    assert done.returncode == 0, done.stderr
    has_native, vectors = json.loads(done.stdout)
    assert not has_native
    assert done.stderr.count("plain PyTorch computes, slower than it could be: fastbert was installed without") == 1
    here = Embedder.from_pretrained(minilm, "float32", device="cpu").encode(TEXTS)
    np.testing.assert_allclose(vectors, here, atol=1e-5)
    run = ALONE + "from fastbert.cli import app; app()"
    done = python("-c", run, "doctor", "--no-measure", cwd=tmp_path, PYTHONPATH=installed)
    assert done.returncode == 1, done.stderr
    assert "the native extension was not built" in " ".join(done.stdout.split())
