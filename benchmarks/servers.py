"""The servers that are measured, started and stopped: fastbert and its peers. All speak OpenAI's embeddings route."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from benchmarks import load

START_S = 180.0
PEERS = ("fastbert", "sentence-transformers", "infinity")


@dataclass
class Server:
    """A running server.

    Attributes:
        name: one of `PEERS`.
        path: of OpenAI's embeddings route.
        log: what it printed.
    """

    name: str
    path: str
    port: int
    process: subprocess.Popen[bytes]
    log: IO[bytes] = field(repr=False)

    def request(self, texts: Sequence[str], model: str) -> bytes:
        """A whole request for vectors in base64, the same for every server."""
        body = {"input": list(texts), "model": model, "encoding_format": "base64"}
        return load.post(self.path, json.dumps(body).encode())

    def url(self, path: str) -> str:
        """Where a path is."""
        return f"http://127.0.0.1:{self.port}{path}"

    def stop(self, signal_number: int = signal.SIGTERM, timeout_s: float = 60.0) -> int:
        """Ask it to end; its exit code. A server that does not end in time is killed, and that is an error."""
        self.process.send_signal(signal_number)
        return self.wait(timeout_s)

    def wait(self, timeout_s: float = 60.0) -> int:
        """Its exit code, when it has ended."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise RuntimeError(f"{self.name} did not end within {timeout_s} s:\n{self.printed()}") from None

    def printed(self) -> str:
        """Everything it printed so far."""
        return Path(self.log.name).read_text(errors="replace")

    def rss_mb(self) -> float:
        """Resident memory of the process (Linux)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.log.close()
        Path(self.log.name).unlink()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def missing(name: str) -> str | None:
    """Why a peer cannot be started here, with the line that installs it; None where it can."""
    if name == "sentence-transformers" and importlib.util.find_spec("sentence_transformers") is None:
        return "sentence-transformers is missing: pip install sentence-transformers"
    if name == "infinity" and infinity() is None:
        return (
            "infinity is missing: pip install 'infinity-emb[server,torch]' 'transformers<4.49' 'optimum<2' 'click<8.2' "
            "'typer<0.16' into an environment of its own, and put its infinity_emb on PATH or its path in INFINITY_EMB"
        )
    return None


def infinity() -> str | None:
    """The program: it wants older libraries than ours, so it lives in another environment."""
    return os.environ.get("INFINITY_EMB") or shutil.which("infinity_emb")


def start(name: str, folder: str, *options: str, served_name: str = "model") -> Server:
    """Start a server and wait until it answers.

    Raises:
        RuntimeError: it ended or did not answer in time; the message has what it printed.
    """
    port = free_port()
    path = "/embeddings" if name == "infinity" else "/v1/embeddings"
    command = {
        "fastbert": [sys.executable, "-m", "fastbert", "serve", folder, "--port", str(port)],
        "sentence-transformers": [sys.executable, "-m", "benchmarks.fastapi_peer", folder, str(port)],
        "infinity": [
            str(infinity()), "v2", "--model-id", folder, "--served-model-name", served_name, "--port", str(port),
            "--host", "127.0.0.1", "--engine", "torch", "--device", "cpu", "--dtype", "float32",
            "--no-bettertransformer",
        ],
    }[name]  # fmt: skip
    if name == "fastbert":
        command += ["--served-model-name", served_name, *options]
    log = tempfile.NamedTemporaryFile(prefix=f"{name}-", suffix=".log", delete=False)  # noqa: SIM115  # stop() closes
    environment = {**os.environ, "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    server = Server(name, path, port, process, log)
    try:
        _wait_until_it_answers(server)
    except BaseException:
        server.__exit__()
        raise
    return server


def _wait_until_it_answers(server: Server) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if server.process.poll() is not None:
            raise RuntimeError(f"{server.name} ended with {server.process.returncode}:\n{server.printed()}")
        try:
            with urllib.request.urlopen(server.url("/health"), timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise RuntimeError(f"{server.name} did not answer within {START_S} s:\n{server.printed()}")


def vectors_of(body: bytes) -> np.ndarray:
    """The (N, D) float32 vectors of an answer in base64."""
    rows = sorted(json.loads(body)["data"], key=lambda row: row["index"])
    return np.stack([np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in rows])
