"""`fastbert bench`: the door to the benchmark suite, which is a package of its own and declares its options itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import typer

from fastbert.cli.application import app


def suite_root() -> Path:
    """The folder that holds the package `benchmarks`: the checkout, or what the wheel ships.

    Raises:
        FileNotFoundError: neither is there.
    """
    package = Path(__file__).parent.parent
    for root in (package.parent, package / "bench"):
        if (root / "benchmarks" / "__main__.py").is_file():
            return root
    raise FileNotFoundError(f"the benchmark suite is neither beside {package} nor in it: install fastbert-engine anew")


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Measure ops, encoders beside their peers, training and serving (--help); a table and a page."""
    paths = [str(suite_root()), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "benchmarks", *context.args]
    if os.name == "posix":  # in our place: signals reach it, and there is nothing to pass on
        os.execve(command[0], command, environment)
    raise typer.Exit(subprocess.call(command, env=environment))
