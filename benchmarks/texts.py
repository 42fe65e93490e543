"""Real English of three lengths, from what every Python carries: its own documentation."""

from __future__ import annotations

import inspect
import random
import re
from importlib import import_module

WORDS = {"query": (4, 10), "sentence": (10, 25), "passage": (40, 80)}
MODULES = (
    "argparse",
    "asyncio",
    "collections",
    "datetime",
    "decimal",
    "email",
    "json",
    "logging",
    "threading",
    "typing",
)


def real_texts(words: tuple[int, int], count: int, seed: int = 0) -> list[str]:
    """English from the standard library's documentation, cut to a range of words."""
    prose: list[str] = []
    for name in MODULES:
        module = import_module(name)
        found = [module, *(m for _, m in inspect.getmembers(module) if inspect.isclass(m) or inspect.isfunction(m))]
        for item in found:
            prose += re.sub(r"\s+", " ", inspect.getdoc(item) or "").split()
    rng = random.Random(seed)
    starts = [rng.randrange(len(prose) - words[1]) for _ in range(count)]
    return [" ".join(prose[i : i + rng.randint(*words)]) for i in starts]
