"""`fastbert serve` as a process: its options, its environment, and its end under load."""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from typer.testing import CliRunner

from fastbert.cli import app
from fastbert.serve.server import _take_no_newcomers
from fastbert.serve.settings import Settings


@contextmanager
def process(*arguments, **environment):
    """A server on a free port, with the URL it announced."""
    command = [sys.executable, "-m", "fastbert", "serve", *map(str, arguments), "--port", "0", "--no-warmup"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    lines: list[str] = []
    ready = threading.Event()

    def read():
        for line in child.stderr:
            lines.append(line)
            if " ready at " in line:
                ready.set()
        ready.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert ready.wait(120), "no word from the server"
        found = re.search(r"ready at http://([0-9.]+):(\d+)", "".join(lines))
        assert found, "".join(lines)
        child.lines, child.host, child.port, child.reader = lines, found[1], int(found[2]), reader
        yield child
    finally:
        child.kill()
        child.wait()


class Client(threading.Thread):
    """Asks on one connection after another until nobody listens any more, and keeps count."""

    def __init__(self, port):
        super().__init__(daemon=True)
        self.port, self.answered, self.lost, self.refused = port, 0, [], False

    def run(self):
        body = json.dumps({"inputs": ["a text of some words " * 12] * 4})
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
            try:
                connection.connect()
            except ConnectionRefusedError:
                self.refused = True
                return
            try:
                while True:
                    connection.request("POST", "/embed", body, {"content-type": "application/json"})
                    response = connection.getresponse()
                    vectors = json.loads(response.read())
                    if response.status != 200 or len(vectors) != 4:
                        self.lost.append(response.status)
                    self.answered += 1
                    if response.getheader("connection") == "close":
                        break
            except (OSError, http.client.HTTPException) as error:
                self.lost.append(repr(error))
            finally:
                connection.close()


def test_sigterm_under_load_loses_nothing(minilm):
    with process(minilm, "--drain-grace-s", 0.5) as child:
        clients = [Client(child.port) for _ in range(8)]
        for client in clients:
            client.start()
        end = time.monotonic() + 60
        while sum(client.answered for client in clients) < 20 and time.monotonic() < end:
            time.sleep(0.02)
        child.send_signal(signal.SIGTERM)
        # Whoever asks learns that no more should come, while everything is still answered.
        connection = http.client.HTTPConnection("127.0.0.1", child.port, timeout=60)
        connection.request("GET", "/ready")
        assert connection.getresponse().status == 503
        assert child.wait(60) == 0
        for client in clients:
            client.join(60)
    child.reader.join(10)
    assert [client.lost for client in clients] == [[]] * len(clients)
    assert all(client.refused for client in clients)
    assert sum(client.answered for client in clients) >= 20
    assert "stopped\n" in child.lines[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="the filter is Linux's")
def test_a_listening_socket_that_takes_no_newcomers_serves_those_it_has():
    listener = socket.create_server(("127.0.0.1", 0))
    early = socket.create_connection(listener.getsockname())
    _take_no_newcomers(listener.fileno())
    with early, listener.accept()[0] as served:
        served.sendall(b"here")
        assert early.recv(4) == b"here"
        early.sendall(b"too")
        assert served.recv(3) == b"too"
    with socket.socket() as late:
        late.settimeout(0.2)
        with pytest.raises(TimeoutError):
            late.connect(listener.getsockname())
    address = listener.getsockname()
    listener.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)


def test_sigterm_resets_nobody_who_has_just_connected(minilm):
    """Connections in the listening socket's queue are accepted before it closes."""
    with process(minilm, "--drain-grace-s", 0.3) as child:
        answered, failures = [], []

        def newcomer():
            while True:
                connection = http.client.HTTPConnection(child.host, child.port, timeout=60)
                try:
                    connection.connect()
                except ConnectionRefusedError:
                    return
                except OSError as error:
                    failures.append(repr(error))
                    return
                try:
                    connection.request("GET", "/ping")
                    answered.append(connection.getresponse().read())
                except (OSError, http.client.HTTPException) as error:
                    failures.append(repr(error))
                finally:
                    connection.close()

        newcomers = [threading.Thread(target=newcomer, daemon=True) for _ in range(16)]
        for thread in newcomers:
            thread.start()
        while len(answered) < 500 and not failures:
            time.sleep(0.02)
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 0
        for thread in newcomers:
            thread.join(60)
            assert not thread.is_alive()
    assert failures == []


def test_flags_and_environment_of_text_embeddings_inference(minilm):
    flags = ["--model-id", minilm, "--hostname", "127.0.0.1", "--max-batch-tokens", 4096, "--auto-truncate",
             "--prometheus-port", 9000, "--json-output", "--dtype", "float32"]  # fmt: skip
    environment = {
        "MAX_CLIENT_BATCH_SIZE": "7",
        "API_KEY": "from-env",
        "SERVED_MODEL_NAME": "named",
        "HOSTNAME": "elsewhere",
    }
    with process(*flags, **environment) as child:
        connection = http.client.HTTPConnection(child.host, child.port, timeout=60)
        connection.request("GET", "/info", headers={"authorization": "Bearer from-env", "x-request-id": "one"})
        info = json.loads(connection.getresponse().read())
        connection.request("GET", "/info")
        assert connection.getresponse().status == 401
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 0
    child.reader.join(10)
    assert info["max_batch_tokens"] == 4096
    assert info["max_client_batch_size"] == 7
    assert info["served_model_name"] == "named"
    assert info["auto_truncate"] is True
    note, *rest = child.lines
    assert note.startswith("--prometheus-port does nothing: metrics are at /metrics")
    lines = [json.loads(line) for line in rest]
    assert any(line.get("request_id") == "one" and line["status"] == 200 for line in lines)
    assert "from-env" not in "".join(child.lines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name a model"),
        (["no/such/model"], "was not found"),
        (["MODEL", "--json-output", "true"], "flags other than --auto-truncate take no value"),
        (["MODEL", "--compat", "tgi"], "compat is 'tgi'; it is one of openai, tei"),
        (["MODEL", "MODEL"], "is named twice"),
        (["MODEL", "--ssl-certfile", "MODEL"], "TLS needs both files"),
        (["MODEL", "--ssl-keyfile", "no.pem"], "'no.pem' does not exist"),
        (["MODEL", "--api-key-file", "no.txt"], "'no.txt' does not exist"),
        (["MODEL", "--api-key", ""], "an API key is empty"),
        (["MODEL", "--served-model-name", "a", "--served-model-name", "b"], "2 served model names for 1 models"),
        (["MODEL", "--dtype", "float8"], "float8"),
        (["MODEL", "--port", "99999"], "65535"),
        (["MODEL", "--port", "TAKEN"], "in use; use another --port (0 = any free one)"),
    ],
)
def test_bad_input_is_said(minilm, arguments, said):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {"MODEL": str(minilm), "TAKEN": str(taken.getsockname()[1])}
        result = CliRunner().invoke(app, ["serve", *(names.get(argument, argument) for argument in arguments)])
    assert result.exit_code != 0
    assert said in " ".join(re.sub(r"[│\s]+", " ", result.output).split())


def test_every_setting_has_an_option():
    help = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    for field in dataclasses.fields(Settings):
        assert "--" + field.name.replace("_", "-") in help, field.name
    assert "(needs fastbert-engine[otel])" in help  # to rich a word in brackets is a style
    assert CliRunner().invoke(app, ["serve", "--help"]).exit_code == 0
