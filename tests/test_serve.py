"""The server against the library it serves, against clients of other servers, and against clients that misbehave."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import re
import socket
import threading
import time
from contextlib import closing

import httpx
import numpy as np
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

import fastbert
from fastbert.serve.metrics import Histogram
from fastbert.serve.scores import normalize
from fastbert.serve.series import Series
from fastbert.serve.work import Overloaded
from tests.serving import live, tiny_model

NAME = "sentence-transformers/all-MiniLM-L6-v2"
TEXTS = [
    "What is the capital of France?",
    "Paris is the capital and largest city of France.",
    "x",
    "A ferry crosses the bay in the storm. " * 6,
    "Ünïcödé, 漢字 and 🚢 in one text",
]


@pytest.fixture(scope="module")
def embedder(minilm):
    return fastbert.Embedder.from_pretrained(minilm)


@pytest.fixture(scope="module")
def server(minilm):
    with live({NAME: minilm}, "first-key", "zweiter-schlüssel", warmup=False, payload_limit=200_000) as found:
        yield found


@pytest.fixture
def client(server):
    headers = {"authorization": "Bearer first-key"}
    with httpx.Client(base_url=server.address, headers=headers, timeout=30) as found:
        yield found


def post(client, path, body, **headers):
    return client.post(path, json=body, headers=headers)


# Numbers


def test_every_format_has_the_bits_of_encode(client, embedder):
    exact = embedder.encode(TEXTS, normalize_embeddings=True)
    assert exact.dtype == np.float32
    found = {
        "json": np.array(post(client, "/embed", {"inputs": TEXTS}).json(), dtype=np.float32),
        "raw": _raw(post(client, "/embed", {"inputs": TEXTS}, accept="application/octet-stream")),
        "npy": np.load(io.BytesIO(post(client, "/embed", {"inputs": TEXTS}, accept="application/x-npy").content)),
        "base64": _base64(post(client, "/embed", {"inputs": TEXTS, "encoding_format": "base64"}).json()),
        "cohere": np.array(post(client, "/v2/embed", {"texts": TEXTS}).json()["embeddings"]["float"], np.float32),
    }
    for name, array in found.items():
        assert array.dtype == np.float32, name
        assert np.array_equal(array, exact), name
    assert not np.array_equal(found["json"], normalize(exact)), "scaled twice"


def _raw(response):
    shape = [int(n) for n in response.headers["x-embedding-shape"].split(",")]
    return np.frombuffer(response.content, response.headers["x-embedding-dtype"]).reshape(shape)


def _base64(rows):
    return np.stack([np.frombuffer(base64.b64decode(row), "<f4") for row in rows])


@pytest.mark.parametrize("options", [{"normalize": False}, {"dimensions": 64}, {"dimensions": 64, "normalize": False}])
def test_options_have_the_bits_of_encode(client, embedder, options):
    exact = embedder.encode(
        TEXTS, normalize_embeddings=options.get("normalize", True), truncate_dim=options.get("dimensions")
    )
    found = np.array(post(client, "/embed", {"inputs": TEXTS, **options}).json(), dtype=np.float32)
    assert np.array_equal(found, exact)


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_precisions_are_those_of_encode(client, embedder, precision):
    exact = embedder.encode(TEXTS, normalize_embeddings=True, precision=precision)
    response = post(client, "/embed", {"inputs": TEXTS, "precision": precision}, accept="application/octet-stream")
    assert np.array_equal(_raw(response), exact)
    assert np.array_equal(post(client, "/embed", {"inputs": TEXTS, "precision": precision}).json(), exact)
    cohere = post(client, "/v2/embed", {"texts": TEXTS, "embedding_types": [precision]}).json()
    assert np.array_equal(cohere["embeddings"][precision], exact)


def test_token_vectors_and_similarity_are_those_of_the_embedder(client, embedder):
    exact = embedder.encode(TEXTS, output_value="token_embeddings")
    found = post(client, "/embed_all", {"inputs": TEXTS}).json()
    for row, tensor in zip(found, exact, strict=True):
        assert np.array_equal(np.array(row, dtype=np.float32), tensor.numpy())
    vectors = embedder.encode(TEXTS)
    body = {"inputs": {"source_sentence": TEXTS[0], "sentences": TEXTS[1:]}}
    cosines = np.array(post(client, "/similarity", body).json(), dtype=np.float32)
    assert np.array_equal(cosines, embedder.similarity(vectors[:1], vectors[1:])[0].numpy())


def test_token_ids_are_used_as_sent(client, embedder):
    ids = embedder.tokenizer.encode(TEXTS).ids
    found = np.array(post(client, "/embed", {"inputs": ids}).json(), dtype=np.float32)
    assert np.array_equal(found, embedder.encode(TEXTS, normalize_embeddings=True))
    unusual = [7592, 7592, 102]  # no [CLS]: an id list is not tokenised again
    assert (
        post(client, "/embed", {"inputs": unusual}).json() != post(client, "/embed", {"inputs": "hello hello"}).json()
    )


def test_concurrent_requests_have_the_bits_of_encode(server, embedder):
    exact = {text: embedder.encode([text], normalize_embeddings=True)[0] for text in TEXTS}

    async def ask(client, i):
        chosen = [TEXTS[(i + k) % len(TEXTS)] for k in range(1 + i % 4)]
        body = {"input": chosen, "encoding_format": "base64", "model": NAME}
        response = await client.post(
            "/v1/embeddings", json=body, headers={"x-priority": ("bulk", "interactive")[i % 2]}
        )
        rows = _base64([row["embedding"] for row in response.json()["data"]])
        return all(np.array_equal(row, exact[text]) for row, text in zip(rows, chosen, strict=True))

    async def run():
        headers = {"x-api-key": "first-key"}
        async with httpx.AsyncClient(base_url=server.address, headers=headers, timeout=60) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(64)))

    assert all(asyncio.run(run()))


def test_one_after_another_has_the_bits_of_encode(server, client, embedder, monkeypatch):
    exact = embedder.encode(TEXTS, normalize_embeddings=True)
    model, threads = server.state.models[0], set()
    compute = model.served.compute

    def seen(*arguments):
        threads.add(threading.current_thread().name)
        return compute(*arguments)

    monkeypatch.setattr(model.served, "compute", seen)
    assert model.batcher.lone_s > 0
    monkeypatch.setattr(model.batcher, "lone_s", 60.0)
    for i in range(40):
        found = _base64(post(client, "/embed", {"inputs": TEXTS[i % 5], "encoding_format": "base64"}).json())
        assert np.array_equal(found[0], exact[i % 5])
    assert len(threads) == 2, "the queue's, and then the loop's"


def test_openai_client_gets_the_bits_of_encode(server, embedder):
    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="first-key", max_retries=0)
    exact = embedder.encode(TEXTS, normalize_embeddings=True)
    for options in ({}, {"encoding_format": "float"}):
        answer = client.embeddings.create(model=NAME, input=TEXTS, **options)
        found = np.array([row.embedding for row in answer.data], dtype=np.float32)
        assert np.array_equal(found, exact)
    assert answer.usage.prompt_tokens == sum(map(len, embedder.tokenizer.encode(TEXTS).ids))
    small = client.embeddings.create(model=NAME, input=TEXTS, dimensions=32)
    cut = embedder.encode(TEXTS, normalize_embeddings=True, truncate_dim=32)
    assert np.array_equal(np.array([row.embedding for row in small.data], dtype=np.float32), cut)
    assert [model.id for model in client.models.list().data] == [NAME]
    with pytest.raises(openai.BadRequestError, match="tiktoken") as caught:
        client.embeddings.create(model=NAME, input=[[15339, 1917, 100257]])
    assert caught.value.code == "invalid_token_ids"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.address}/v1", api_key="wrong", max_retries=0).models.list()


# Who may ask, and how much


def test_keys(server):
    with httpx.Client(base_url=server.address) as client:
        for path in ("/health", "/live", "/ready", "/ping", "/", "/metrics", "/stats", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200, path
        assert client.get("/info").status_code == 401
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Basic first-key"},
            {"x-api-key": "x"},
        ):
            response = client.post("/embed", json={"inputs": "a"}, headers=headers)
            assert response.status_code == 401, headers
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error_type"] == "Unauthorized"
            assert client.post("/", json={"inputs": "a"}, headers=headers).status_code == 401
        for key in ("first-key", "zweiter-schlüssel"):
            for headers in ({"authorization": f"bearer {key}".encode()}, {"x-api-key": key.encode()}):
                assert client.post("/embed", json={"inputs": "a"}, headers=headers).status_code == 200


def test_metrics_can_be_protected(minilm, tmp_path):
    file = tmp_path / "keys"
    file.write_text("# keys of the test\nfrom-file\n\n")
    settings = fastbert_settings(api_key_file=file, api_key=("given",))
    assert settings.keys() == ("given", "from-file")
    file.write_text("# none\n")
    with pytest.raises(ValueError, match="has no key"):
        settings.keys()
    with pytest.raises(ValueError, match="an API key is empty"):
        fastbert_settings(api_key=(" ",)).keys()
    with (
        live({NAME: minilm}, "k", warmup=False, protect_metrics=True) as server,
        httpx.Client(base_url=server.address) as client,
    ):
        assert client.get("/metrics").status_code == 401
        assert client.get("/metrics", headers={"x-api-key": "k"}).status_code == 200
        assert client.get("/health").status_code == 200


def fastbert_settings(**options):
    from fastbert.serve.settings import Settings

    return Settings(**options)


def test_bodies_have_a_limit(server, client):
    response = post(client, "/embed", {"inputs": "a" * 200_000})
    assert response.status_code == 413
    assert response.json()["error"].startswith("Failed to buffer the request body: length limit exceeded")

    def endless():
        for _ in range(1000):
            yield b" " * 10_000

    headers = {"content-type": "application/json"}
    assert client.post("/embed", content=endless(), headers=headers).status_code == 413
    assert post(client, "/embed", {"inputs": "a"}).status_code == 200


def test_deadlines(client):
    late = post(client, "/embed", {"inputs": TEXTS}, **{"x-deadline-ms": "0.001"})
    assert late.status_code == 504
    assert late.json()["error_type"] == "Timeout"
    assert post(client, "/embed", {"inputs": "a"}, **{"x-deadline-ms": "20000"}).status_code == 200
    for wrong in ("soon", "-1", "inf", "nan"):
        response = post(client, "/embed", {"inputs": "a"}, **{"x-deadline-ms": wrong})
        assert response.status_code == 422, wrong
        assert "x-deadline-ms" in response.json()["error"]
    assert post(client, "/embed", {"inputs": "a"}, **{"x-priority": "urgent"}).status_code == 422


def test_overload_is_refused_at_once(server, client, monkeypatch):
    async def full(work):
        raise Overloaded(2.3, 10, 100, 100)

    (model,) = server.state.models
    monkeypatch.setattr(model, "submit", full)
    native = post(client, "/embed", {"inputs": "a"})
    assert (native.status_code, native.headers["retry-after"]) == (429, "3")
    assert native.json() == {"error": "Model is overloaded", "error_type": "Overloaded"}
    other = post(client, "/v1/embeddings", {"input": "a"})
    assert (other.status_code, other.json()["error"]["code"]) == (429, "rate_limit_exceeded")


def test_nan_is_never_sent(server, client, monkeypatch):
    (model,) = server.state.models
    original = model.served.compute

    def broken(batch, outputs, prompt_lengths=None, share=1):
        values = original(batch, outputs, prompt_lengths, share)
        for value, length in zip(values, np.diff(batch.cu_seqlens.numpy()), strict=True):
            value[:1] = np.nan if length == 3 else value[:1]
        return values

    monkeypatch.setattr(model.served, "compute", broken)
    bad, good = post(client, "/embed", {"inputs": "a"}), post(client, "/embed", {"inputs": "a longer text"})
    assert (bad.status_code, bad.json()["error_type"]) == (424, "Backend")
    assert good.status_code == 200
    assert post(client, "/v1/embeddings", {"input": "a"}).status_code == 500


def test_a_defect_is_a_500_without_its_details(server, client, monkeypatch, caplog):
    async def broken(work):
        raise ZeroDivisionError("the secret text")

    (model,) = server.state.models
    monkeypatch.setattr(model, "submit", broken)
    logging.getLogger("fastbert.serve").propagate = True
    response = post(client, "/embed", {"inputs": "a"}, **{"x-request-id": "my-id"})
    assert response.status_code == 500
    assert response.json()["error"] == "ZeroDivisionError; the log has it under request my-id"
    assert "my-id" in caplog.text


# Clients that misbehave


def _connect(server):
    return socket.create_connection(("127.0.0.1", int(server.address.rsplit(":", 1)[1])), timeout=20)


def test_slow_clients_are_let_go(minilm):
    limits = {"header_timeout_s": 0.3, "body_timeout_s": 0.3}
    with live({NAME: minilm}, warmup=False, **limits) as server:
        with closing(_connect(server)) as silent:
            assert silent.recv(100) == b""
        with closing(_connect(server)) as slow:
            slow.sendall(b"POST /embed HTTP/1.1\r\nhost: x\r\n")
            assert slow.recv(1000).startswith(b"HTTP/1.1 408")
        with closing(_connect(server)) as endless:
            endless.sendall(b"GET /live HTTP/1.1\r\nx-long: " + b"a" * 70_000)
            assert endless.recv(1000).startswith(b"HTTP/1.1 431")
        with closing(_connect(server)) as half:
            half.sendall(b"POST /embed HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{")
            assert half.recv(1000).startswith(b"HTTP/1.1 408")
        with closing(_connect(server)) as nonsense:
            nonsense.sendall(b"\x16\x03\x01 no HTTP\r\n\r\n")
            answer = nonsense.recv(1000)
            assert answer.startswith(b"HTTP/1.1 400")
            assert b'"error_type":"Validation"' in answer
        with closing(_connect(server)) as patient:  # a quick client that keeps its connection is not let go
            for _ in range(2):
                patient.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
                assert patient.recv(1000).startswith(b"HTTP/1.1 200")
                time.sleep(0.5)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_requests_sent_in_one_piece_are_answered_in_order(server, version):
    def request(texts):
        body = json.dumps({"inputs": texts}).encode()
        head = f"POST /embed HTTP/{version}\r\ncontent-type: application/json\r\nx-api-key: first-key\r\n"
        return f"{head}x-request-id: {len(texts)}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body

    wanted = [b"1"] if version == "1.0" else [b"1", b"2", b"3"]  # 1.0 closes after the first
    with closing(_connect(server)) as connection:
        connection.sendall(b"".join(request(["a"] * n) for n in (1, 2, 3)))
        received, found = b"", []
        while len(found) < len(wanted):
            received += connection.recv(1 << 16)
            found = re.findall(rb"HTTP/1.1 200 OK\r\n(?:.*\r\n)*?x-request-id: (\d)\r\n", received)
    assert found == wanted


def test_a_client_that_reads_nothing_is_let_go(minilm):
    with live({NAME: minilm}, warmup=False, write_timeout_s=0.3) as server, closing(_connect(server)) as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps({"inputs": ["a"] * 2000}).encode()
        head = f"POST /embed HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        lazy.sendall(head.encode() + body)
        end = time.monotonic() + 20
        while not server.server_state.connections and time.monotonic() < end:
            time.sleep(0.01)
        while server.server_state.connections and time.monotonic() < end:
            time.sleep(0.05)
        assert not server.server_state.connections


def test_work_of_a_client_that_left_is_taken_back(server, client, monkeypatch):
    (model,) = server.state.models
    waiting, left = threading.Event(), threading.Event()

    async def endless(work):
        waiting.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            left.set()
            raise

    monkeypatch.setattr(model, "submit", endless)
    before = server.state.series.cancelled.values[()]
    body = b'{"inputs":"a"}'
    head = b"POST /embed HTTP/1.1\r\nauthorization: Bearer first-key\r\ncontent-type: application/json\r\n"
    with closing(_connect(server)) as gone:
        gone.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        assert waiting.wait(20)
    assert left.wait(20)
    end = time.monotonic() + 20
    while server.state.series.cancelled.values[()] == before and time.monotonic() < end:
        time.sleep(0.01)
    assert server.state.series.cancelled.values[()] == before + 1
    assert server.state.inflight == 0


def test_what_cannot_be_finished_in_time_is_said(minilm, monkeypatch):
    with live({NAME: minilm}, warmup=False, drain_timeout_s=0.3) as server:
        waiting = threading.Event()

        async def endless(work):
            waiting.set()
            await asyncio.sleep(60)

        monkeypatch.setattr(server.state.models[0], "submit", endless)
        answers = []
        asking = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{server.address}/embed", json={"inputs": "a"}, timeout=30))
        )
        asking.start()
        assert waiting.wait(20)
        server.should_exit = True
        asking.join(20)
    (answer,) = answers
    assert answer.status_code == 503
    assert answer.json()["error_type"] == "Unhealthy"
    assert answer.headers["retry-after"] == "1"
    assert not server.clean


# What can be seen from outside


def test_metrics_are_teis(server, client):
    def read():
        # The parser appends _total to the names of counters, which TEI's do not have.
        text = client.get("/metrics").text.replace(" counter\n", " gauge\n")
        families = text_string_to_metric_families(text)
        return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}

    before = read()
    assert post(client, "/embed", {"inputs": "one"}).status_code == 200
    assert post(client, "/embed", {"inputs": ["one", "two words"]}).status_code == 200
    assert post(client, "/embed", {"inputs": ""}).status_code == 400
    after = read()

    def grown(name, **labels):
        key = name, tuple(sorted(labels.items()))
        return after[key] - before.get(key, 0)

    assert grown("te_request_count", method="single") == 2
    assert grown("te_request_success", method="single") == 1
    assert grown("te_request_count", method="batch") == grown("te_request_success", method="batch") == 1
    assert grown("te_request_failure", err="tokenization") == 1
    assert grown("te_embed_count") == 4
    assert grown("te_embed_success") == 3
    for part in ("", "_tokenization", "_queue", "_inference"):
        assert grown(f"te_request{part}_duration_count") == 2
        assert grown(f"te_embed{part}_duration_count") == 3
        assert grown(f"te_embed{part}_duration_bucket", le="+Inf") == 3
    assert grown("te_request_input_length_sum") == grown("fastbert_tokens_total", kind="real") == 3 + 3 + 4
    assert grown("te_batch_next_tokens_sum") == 10
    assert grown("te_batch_next_size_sum") == 3
    assert after["fastbert_inflight_requests", ()] == 0, "to ask for this is no work"
    names = {name for name, _ in after}
    for name in ("te_queue_size", "te_predict_count", "te_predict_success", "te_predict_queue_duration_count"):
        assert name in names
    edges = [dict(labels)["le"] for name, labels in after if name == "te_request_duration_bucket"]
    assert len(edges) == 36
    assert float(edges[0]) == pytest.approx(1.5e-5)
    lengths = [dict(labels)["le"] for name, labels in after if name == "te_request_input_length_bucket"]
    assert lengths == [str(2**k) for k in range(9)] + ["+Inf"]  # MiniLM reads 256 tokens


def test_stages_add_up_to_the_whole(client):
    response = post(client, "/embed", {"inputs": TEXTS})
    timing = {}
    for part in response.headers["server-timing"].split(", "):
        name, _, value = part.partition(";dur=")
        timing[name] = float(value)
    assert list(timing) == ["parse", "tokenize", "queue", "compute", "serialize", "total"]
    assert all(value > 0 for value in timing.values())
    assert sum(timing.values()) - timing["total"] <= timing["total"]


def test_logs_are_json_without_keys_and_texts(server, client):
    from fastbert.serve.records import JSONLines

    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JSONLines())
    logger = logging.getLogger("fastbert.serve.requests")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
        post(client, "/embed", {"inputs": "confidential words"}, traceparent=trace, **{"x-request-id": "r-1"})
        client.post("/embed", json={"inputs": 3}, headers={"authorization": "Bearer guessed-key"})
        end = time.monotonic() + 10
        while stream.getvalue().count("\n") < 2 and time.monotonic() < end:
            time.sleep(0.01)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert (first["request_id"], first["status"], first["path"]) == ("r-1", 200, "/embed")
    assert first["trace_id"] == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert first["tokens"] == 4
    assert first["compute_ms"] > 0
    assert second["status"] == 401
    for secret in ("confidential", "first-key", "guessed-key"):
        assert secret not in stream.getvalue()


def test_spans_continue_the_callers_trace(minilm):
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from fastbert.serve.tracing import Tracer

    exporter = InMemorySpanExporter()
    with live({NAME: minilm}, warmup=False, tracer=Tracer("test", exporter)) as server:
        trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
        with httpx.Client(base_url=server.address, timeout=30) as client:
            assert post(client, "/embed", {"inputs": "a"}, traceparent=trace).status_code == 200
    (span,) = exporter.get_finished_spans()  # the end of the server sends what is left
    assert f"{span.context.trace_id:x}" == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert f"{span.parent.span_id:016x}" == "00f067aa0ba902b7"
    assert span.name == "POST /embed"
    assert span.attributes["http.response.status_code"] == 200
    assert span.attributes["fastbert.tokens"] == 3
    assert span.attributes["fastbert.compute_ms"] > 0


def test_cors_lets_the_key_through(minilm):
    with (
        live({NAME: minilm}, "k", warmup=False, cors_allow_origin=("https://page.example",)) as server,
        httpx.Client(base_url=server.address) as client,
    ):
        asked = {
            "origin": "https://page.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type,x-deadline-ms",
        }
        before = client.options("/embed", headers=asked)
        assert before.status_code == 200
        assert before.headers["access-control-allow-origin"] == "https://page.example"
        assert "authorization" in before.headers["access-control-allow-headers"].lower()
        assert client.options("/embed", headers={**asked, "origin": "https://other.example"}).status_code == 400
        found = client.get("/live", headers={"origin": "https://page.example"})
        assert "server-timing" in found.headers["access-control-expose-headers"]


def test_models_are_chosen_by_name(minilm, tmp_path):
    tiny = tiny_model("classifier", tmp_path, minilm)
    with (
        live({NAME: minilm, "tiny": tiny}, warmup=False) as server,
        httpx.Client(base_url=server.address, timeout=30) as client,
    ):
        assert [row["id"] for row in client.get("/v1/models").json()["data"]] == [NAME, "tiny"]
        assert all(model.batcher.lone_s == 0 for model in server.state.models), "none stands in the other's way"
        body = {"inputs": "a"}
        assert post(client, "/embed", body).status_code == 200
        assert post(client, "/predict", body).status_code == 424
        assert post(client, "/predict?model=tiny", body).status_code == 200
        assert post(client, "/predict", body, **{"x-model": "tiny"}).status_code == 200
        assert post(client, "/v1/embeddings", {"input": "a", "model": NAME}).status_code == 200
        unknown = post(client, "/v1/embeddings", {"input": "a", "model": "none"})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    with live({NAME: minilm}, warmup=False) as server, httpx.Client(base_url=server.address, timeout=30) as client:
        # A lone model answers to every name, as text-embeddings-inference does.
        assert post(client, "/v1/embeddings", {"input": "a", "model": "text-embedding-3-small"}).json()["model"] == NAME


def test_prompts(minilm, embedder, tmp_path):
    import shutil

    folder = tmp_path / "prompted"
    shutil.copytree(minilm, folder)
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "ask: "}}))
    asked = embedder.encode(["ask: a"], normalize_embeddings=True).tolist()
    plain = embedder.encode(["a"], normalize_embeddings=True).tolist()
    with live({"p": folder}, warmup=False) as server, httpx.Client(base_url=server.address, timeout=30) as client:
        assert _same(post(client, "/embed", {"inputs": "a", "prompt_name": "query"}).json(), asked)
        assert _same(post(client, "/embed", {"inputs": "a"}).json(), plain)
        for kind in ("query", "search_query"):
            cohere = post(client, "/v2/embed", {"texts": ["a"], "input_type": kind}).json()
            assert _same(cohere["embeddings"]["float"], asked)
        tokens = post(client, "/tokenize", {"inputs": "a", "prompt_name": "query"}).json()[0]
        assert [(t["text"], t["start"], t["stop"]) for t in tokens[1:-1]] == [("ask", 0, 3), (":", 3, 4), ("a", 5, 6)]
    with (
        live({"p": folder}, warmup=False, default_prompt="ask: ") as server,
        httpx.Client(base_url=server.address, timeout=30) as client,
    ):
        assert _same(post(client, "/embed", {"inputs": "a"}).json(), asked)
    with pytest.raises(Exception, match="none-such"), live({"p": folder}, default_prompt_name="none-such"):
        pass


def _same(found, exact):
    return np.array_equal(np.array(found, np.float32), np.array(exact, np.float32))


def test_the_cache_answers_repeats(minilm, embedder):
    with (
        live({NAME: minilm}, warmup=False, cache_mb=1) as server,
        httpx.Client(base_url=server.address, timeout=30) as client,
    ):
        first, second = (post(client, "/embed", {"inputs": TEXTS}).json() for _ in range(2))
        assert first == second
        assert _same(first, embedder.encode(TEXTS, normalize_embeddings=True))
        assert server.state.models[0].batcher.counters.sequences == len(TEXTS)
        assert client.get("/stats").json()["cache_hit_rate"] == 0.5


def test_tls(minilm, tmp_path):
    import subprocess

    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        capture_output=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip(f"openssl made no certificate: {made.stderr.decode()[-200:]}")
    import ssl

    trusted = ssl.create_default_context(cafile=str(certificate))
    with (
        live({NAME: minilm}, warmup=False, ssl_certfile=certificate, ssl_keyfile=key) as server,
        httpx.Client(base_url=server.address, verify=trusted) as client,
    ):
        assert server.address.startswith("https://")
        assert client.get("/live").status_code == 200
    with pytest.raises(ValueError, match="TLS needs both files"):
        fastbert_settings(ssl_certfile=certificate)


def test_openapi_describes_every_route(client):
    schema = client.get("/openapi.json").json()
    assert schema == client.get("/api-doc/openapi.json").json()
    assert schema["security"] == [{"key": []}]
    posts = {path for path, methods in schema["paths"].items() if "post" in methods}
    assert posts == {
        "/", "/invocations", "/embed", "/embed_all", "/embed_sparse", "/similarity", "/predict", "/rerank", "/tokenize",
        "/decode", "/vertex", "/embeddings", "/v1/embeddings", "/v2/embed", "/v1/rerank", "/v2/rerank",
        "/token-classification", "/fill-mask", "/classify",
    }  # fmt: skip
    body = schema["paths"]["/embed"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    fields = schema["components"]["schemas"][body["$ref"].rsplit("/", 1)[1]]["properties"]
    assert {"inputs", "truncate", "truncation_direction", "prompt_name", "normalize", "dimensions"} <= set(fields)
    assert fields["normalize"]["default"] is True
    assert "429" in schema["paths"]["/embed"]["post"]["responses"]


def test_answers_of_a_size_that_would_fill_the_memory_are_refused(client):
    response = post(client, "/embed_all", {"inputs": ["a " * 254] * 200})
    assert response.status_code == 422
    assert "send fewer inputs" in response.json()["error"]


def test_rates_are_of_the_time_that_the_server_has_been_up():
    series = Series(512)
    now = time.monotonic()
    series.window.extend((now - 1.0, 0.01, 40) for _ in range(20))
    series.began = now - 10.0
    assert series.rolling()["requests_per_s"] == pytest.approx(2.0, rel=0.05)
    assert series.rolling()["tokens_per_s"] == pytest.approx(80.0, rel=0.05)
    series.began = now - 1000.0
    assert series.rolling()["requests_per_s"] == pytest.approx(20 / 60, rel=0.05)


def test_what_is_counted_together_is_what_is_counted_one_by_one():
    rng = np.random.default_rng(0)
    bounds = (0.1, 0.5, 2.0)
    values = [*rng.exponential(1.0, 200).tolist(), *bounds]
    times = rng.integers(1, 5, len(values)).tolist()
    together, single = (Histogram("h", "", bounds, ["a"]) for _ in range(2))
    together.observe_all(values[:50], "x")
    together.observe_all(values[50:], "x", times=times[50:])
    for i, value in enumerate(values):
        single.observe(value, "x", times=1 if i < 50 else times[i])
    assert together.series[("x",)][0] == single.series[("x",)][0]
    assert together.series[("x",)][1] == pytest.approx(single.series[("x",)][1])
