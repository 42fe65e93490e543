"""Fixtures of all tests: hub access off, uninitialised memory poisoned, real weights found."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # one worker a core: threads of several workers only wait for each other

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fastbert import machine
from fastbert.hub import DEFAULT_MODEL, resolve


def pytest_configure() -> None:
    """A shell starts what ends in "&" with SIGINT ignored, and so would be every process that a test interrupts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2, as a package ships it."""
    return resolve(DEFAULT_MODEL)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, however many cores there are, and puts it back."""
    monkeypatch.setattr(machine, "cpu", lambda: machine.Cpu("many cores", "", (), 64, 64, None))
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `torch.empty` and `torch.empty_like` return with NaN: a kernel that misses an element fails."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def poisoned(*args, _original=original, **kwargs):
            out = _original(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(-(2**30))

        monkeypatch.setattr(torch, name, poisoned)
