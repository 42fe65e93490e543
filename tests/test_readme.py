"""What the README shows runs as shown."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
FOLDERS = ("", "csrc", "fastbert", "fastbert/models", "fastbert/train", "tests", "benchmarks")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^(?:cat queries\.txt \| )?fastbert embed .*?(?=\s+#|$)", README, re.MULTILINE)


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_commands(tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = ["a first text", "a second one"] * 3
    (tmp_path / "queries.txt").write_text("\n".join(texts) + "\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "corpus.parquet")
    assert len(COMMANDS) == 4
    for command in COMMANDS:
        if "--resume" in command:
            (tmp_path / "vectors.npy").unlink()
        run = command.replace("fastbert", f"{shlex.quote(sys.executable)} -c 'from fastbert.cli import app; app()'")
        done = subprocess.run(run, shell=True, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, (command, done.stderr)
    assert (tmp_path / "vectors.npy").exists()
    assert len((tmp_path / "vectors.jsonl").read_text().splitlines()) == len(texts)


def test_tree_is_true():
    for name in re.findall(r"\b([a-z_]+/|[a-z_]+\.(?:py|md))(?=\s|,|$)", README.split("## What is where")[1]):
        root = Path(__file__).parent.parent
        assert any((root / folder / name).exists() for folder in FOLDERS), name
