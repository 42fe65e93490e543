"""What text-embeddings-inference promises and no golden pair can show: its series, its flags, answers to failures."""

from __future__ import annotations

import json
import shutil

import httpx
import pytest
import torch
from typer.main import get_command

from fastbert import Embedder
from fastbert.cli import app
from fastbert.sentence_folder import Dense
from fastbert.serve.errors import TokenizerError
from fastbert.serve.series import Series
from fastbert.weights import save_weights
from tests.serving import live, tiny_model

NAME = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture(scope="module")
def folders(minilm, tmp_path_factory):
    tiny = {kind: tiny_model(kind, tmp_path_factory.mktemp(kind), minilm) for kind in ("classifier", "reranker")}
    return {"embedding": minilm, **tiny}


@pytest.fixture(scope="module")
def server(folders):
    with live(folders, warmup=False, max_client_batch_size=8) as found:
        yield found


def ask(server, path, body, model="embedding"):
    return httpx.post(f"{server.address}{path}", json=body, headers={"x-model": model}, timeout=30)


def samples(server):
    """Values by the line of the text format without its value, and types by name."""
    text = httpx.get(f"{server.address}/metrics").text
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    types = dict(line.split(" ")[2:] for line in text.splitlines() if line.startswith("# TYPE"))
    return {name: float(value) for name, value in lines}, types


# Series: name, type, bucket edges; the labels show where they are counted, below.

_SECONDS = [1e-5 * 1.5**k for k in range(1, 36)]
_DURATIONS = [f"te_{what}{part}_duration" for what in ("request", "embed", "predict")
              for part in ("", "_tokenization", "_queue", "_inference")]  # fmt: skip
_HISTOGRAMS = {
    **dict.fromkeys(_DURATIONS, _SECONDS),
    "te_request_input_length": [2.0**k for k in range(9)],  # MiniLM, the longest, reads 256 tokens
    "te_batch_next_size": [2.0**k for k in range(13)],
    "te_batch_next_tokens": [2.0**k for k in range(21)],
}
_COUNTERS = ["te_request_count", "te_request_success", "te_request_failure", "te_embed_count", "te_embed_success",
             "te_predict_count", "te_predict_success"]  # fmt: skip


def test_series(server):
    values, types = samples(server)
    wanted = {
        **dict.fromkeys(_HISTOGRAMS, "histogram"),
        **dict.fromkeys(_COUNTERS, "counter"),
        "te_queue_size": "gauge",
    }
    assert {name: kind for name, kind in types.items() if name.startswith("te_")} == wanted
    for name, edges in _HISTOGRAMS.items():
        found = [line.split('le="')[1].rstrip('"}') for line in values if line.startswith(f"{name}_bucket")]
        assert found.pop() == "+Inf"
        assert [float(edge) for edge in found] == pytest.approx(edges, rel=1e-12), name
        assert {f"{name}_sum", f"{name}_count"} <= set(values)


LONG = "word " * 400
REFUSED = {"count_single": 1, "tokenization": 1, "embed": (1, 0)}
BATCH = {"count_batch": 1, "success_batch": 1}


@pytest.mark.parametrize(
    ("model", "path", "body", "grown"),
    [
        ("embedding", "/embed", {"inputs": "a"}, {"count_single": 1, "success_single": 1, "embed": (1, 1)}),
        ("embedding", "/embed", {"inputs": ["a", "b"]}, {**BATCH, "embed": (2, 2)}),
        ("embedding", "/v1/embeddings", {"input": "a"}, {"count_single": 1, "success_single": 1, "embed": (1, 1)}),
        ("embedding", "/embed_all", {"inputs": "a"}, {"count_single": 1, "success_single": 1, "embed": (1, 1)}),
        ("embedding", "/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b"]}},
         {**BATCH, "embed": (2, 2)}),
        ("classifier", "/predict", {"inputs": "a"}, {"count_single": 1, "success_single": 1, "predict": (1, 1)}),
        ("classifier", "/predict", {"inputs": [["a"], ["b"]]}, {**BATCH, "predict": (2, 2)}),
        ("reranker", "/rerank", {"query": "q", "texts": ["a"]}, {**BATCH, "predict": (1, 1)}),
        ("embedding", "/tokenize", {"inputs": "a"}, {}),
        ("embedding", "/embed", {"inputs": []}, REFUSED),
        ("embedding", "/embed", {"inputs": ""}, REFUSED),
        ("embedding", "/embed", {"inputs": LONG, "truncate": False}, REFUSED),
        ("embedding", "/embed", {"inputs": "a", "prompt_name": "x"}, REFUSED),
        ("embedding", "/tokenize", {"inputs": ""}, {"tokenization": 1}),
        ("embedding", "/decode", {"ids": [[1], []]}, {"tokenization": 1}),
        ("embedding", "/embed", {"inputs": ["a"] * 9}, {"count_batch": 1, "batch_size": 1}),
        ("embedding", "/embed", {"inputs": "a", "dimensions": 0}, {"count_single": 1, "validation": 1}),
        ("embedding", "/similarity", {"inputs": {"source_sentence": "a", "sentences": []}}, {"validation": 1}),
        ("embedding", "/rerank", {"query": "q", "texts": []}, {"validation": 1}),
        ("embedding", "/rerank", {"query": "q", "texts": ["a"]}, {"model_type": 1}),
        ("embedding", "/predict", {"inputs": "a"}, {"count_single": 1, "model_type": 1}),
        ("classifier", "/embed", {"inputs": ["a"]}, {"count_batch": 1, "model_type": 1}),
    ],
)  # fmt: skip
def test_what_is_counted(server, model, path, body, grown):
    before, _ = samples(server)
    answer = ask(server, path, body, model)
    after, _ = samples(server)
    for key in ("count_single", "count_batch", "success_single", "success_batch"):
        name, method = key.split("_")
        line = f'te_request_{name}{{method="{method}"}}'
        assert after.get(line, 0) - before.get(line, 0) == grown.get(key, 0), key
    for err in ("overloaded", "tokenization", "inference", "validation", "batch_size", "model_type", "dropped"):
        line = f'te_request_failure{{err="{err}"}}'
        assert after.get(line, 0) - before.get(line, 0) == grown.get(err, 0), err
    answered = answer.status_code == 200 and path != "/tokenize"
    for kind in ("embed", "predict"):
        count, success = grown.get(kind, (0, 0))
        assert after[f"te_{kind}_count"] - before[f"te_{kind}_count"] == count
        assert after[f"te_{kind}_success"] - before[f"te_{kind}_success"] == success
        for part in ("", "_tokenization", "_queue", "_inference"):
            line = f"te_{kind}{part}_duration_count"
            assert after[line] - before[line] == success
            line = f"te_request{part}_duration_count"
            assert after[line] - before[line] == answered


def test_a_single_predict_counts_as_teis_where_asked():
    for compat, counts in (("tei", {"request_count": 1}), ("openai", {"request_success": 1})):
        series = Series(64, compat)
        series.answered("predict", "single", 0.1, [3], 0.0, [0.0], [0.1])
        series.settle()
        for name in ("request_count", "request_success"):
            assert getattr(series, name).values.get(("single",), 0) == counts.get(name, 0)


# Answers to failures


def test_a_failed_forward_pass(server, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no such kernel")

    for model in server.state.models:
        monkeypatch.setattr(model.served, "compute", broken)
    answer = ask(server, "/embed", {"inputs": "a"})
    assert (answer.status_code, answer.json()["error_type"]) == (424, "Backend")
    assert answer.json()["error"].startswith("Backend error: ")
    assert ask(server, "/v1/embeddings", {"input": "a"}).json()["error"]["type"] == "server_error"


def test_a_score_that_is_no_number(server, monkeypatch):
    for model in server.state.models:
        monkeypatch.setattr(model.served, "compute", lambda batch, *rest: [torch.full((3,), torch.nan).numpy()])
    for model, path, body in (
        ("classifier", "/predict", {"inputs": "a"}),
        ("reranker", "/rerank", {"query": "q", "texts": ["a"]}),
    ):
        answer = ask(server, path, body, model)
        assert (answer.status_code, answer.json()) == (424, {"error": "score is NaN", "error_type": "Backend"})


def test_a_tokenizer_that_gives_up(server, monkeypatch):
    async def broken(*arguments, **options):
        raise TokenizerError("tokenizer error: no such word")

    for model in server.state.models:
        monkeypatch.setattr(model.tokens, "encode", broken)
    answer = ask(server, "/embed", {"inputs": "a"})
    assert answer.status_code == 422
    assert answer.json() == {"error": "tokenizer error: no such word", "error_type": "Tokenizer"}


def test_more_requests_than_may_be_in_the_house(server, monkeypatch):
    monkeypatch.setattr(server.state, "inflight", server.state.settings.max_concurrent_requests)
    answer = ask(server, "/embed", {"inputs": "a"})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert answer.json() == {"error": "Model is overloaded", "error_type": "Overloaded"}


@pytest.mark.parametrize("phase", ["starting", "draining"])
def test_a_server_that_is_not_ready(server, monkeypatch, phase):
    monkeypatch.setattr(server.state, "phase", phase)
    for path in ("/health", "/ping", "/"):
        answer = httpx.get(f"{server.address}{path}")
        assert (answer.status_code, answer.json()) == (503, {"error": "unhealthy", "error_type": "Unhealthy"}), path


# Environment and flags


def test_the_task_of_the_environment(server, monkeypatch):
    monkeypatch.setenv("TASK", "sentence-similarity")
    for path in ("/", "/invocations"):
        answer = ask(server, path, {"inputs": {"source_sentence": "a", "sentences": ["a", "b"]}})
        assert answer.json()[0] == pytest.approx(1.0, abs=1e-5)
        assert ask(server, path, {"inputs": "a"}).status_code == 422


def test_vertex_ai_says_where_its_routes_are(minilm, monkeypatch):
    monkeypatch.setenv("AIP_PREDICT_ROUTE", "/v1/models/1:predict")
    monkeypatch.setenv("AIP_HEALTH_ROUTE", "/v1/models/1")
    with live({NAME: minilm}, "key", warmup=False) as server:
        assert httpx.get(f"{server.address}/v1/models/1").status_code == 200
        body, url = {"instances": [{"inputs": "a"}]}, f"{server.address}/v1/models/1:predict"
        assert httpx.post(url, json=body).status_code == 401
        answer = httpx.post(url, json=body, headers={"authorization": "Bearer key"})
        assert len(answer.json()["predictions"][0][0]) == 384


FLAGS = {  # flag -> a value for it; its environment name is the same in capitals
    "--model-id": "m", "--revision": "r", "--tokenization-workers": "2", "--dtype": "float32",
    "--served-model-name": "n", "--pooling": "cls", "--max-concurrent-requests": "5", "--max-batch-tokens": "6",
    "--max-batch-requests": "7", "--max-client-batch-size": "8", "--auto-truncate": "false",
    "--default-prompt-name": "p", "--default-prompt": "q: ", "--dense-path": "2_Dense", "--hf-api-token": "t",
    "--hf-token": "t", "--hostname": "127.0.0.2", "--port": "3001", "--uds-path": "u", "--huggingface-hub-cache": "c",
    "--payload-limit": "9", "--api-key": "k", "--json-output": None, "--disable-spans": None,
    "--otlp-endpoint": "http://e", "--otlp-service-name": "s", "--prometheus-port": "9000", "--cors-allow-origin": "*",
}  # fmt: skip
RENAMED = {"--hostname": "host", "--hf-api-token": "hf_token"}


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_has_its_environment_name(flag, monkeypatch):
    command = get_command(app).commands["serve"]
    name = RENAMED.get(flag, flag[2:].replace("-", "_"))
    unset = command.make_context("serve", []).params[name]
    given = command.make_context("serve", [flag] if FLAGS[flag] is None else [flag, FLAGS[flag]]).params[name]
    assert given not in (unset, None)
    monkeypatch.setenv(flag[2:].replace("-", "_").upper(), FLAGS[flag] or "true")
    by_name = command.make_context("serve", []).params[name]
    assert by_name == (unset if flag == "--hostname" else given)  # a shell sets HOSTNAME to what nobody asked for


@pytest.mark.parametrize(
    ("words", "value"),
    [([], True), (["true"], True), (["false"], False), (["--json-output"], True), (["m"], True)],
)
def test_auto_truncate_may_have_a_value(words, value):
    params = get_command(app).commands["serve"].make_context("serve", ["--auto-truncate", *words]).params
    assert params["auto_truncate"] is value
    assert list(params["model"] or []) == [word for word in words if word == "m"]
    joined = get_command(app).commands["serve"].make_context("serve", ["--auto-truncate=false"]).params
    assert joined["auto_truncate"] is False


def test_a_dense_module_of_ones_own(minilm, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(minilm, folder)
    act = "torch.nn.modules.linear.Identity"
    config = {"in_features": 384, "out_features": 8, "bias": False, "activation_function": act}
    torch.manual_seed(0)
    dense = Dense(config)
    (folder / "2_Dense_8").mkdir()
    save_weights(dense.state_dict(), folder / "2_Dense_8")
    (folder / "2_Dense_8" / "config.json").write_text(json.dumps(config))
    with live({NAME: folder}, warmup=False, dense_path="2_Dense_8") as server:
        found = torch.tensor(httpx.post(f"{server.address}/embed", json={"inputs": "a text"}).json())
    pooled = Embedder.from_pretrained(minilm).encode(["a text"], convert_to_tensor=True)
    torch.testing.assert_close(found, torch.nn.functional.normalize(dense.linear(pooled)), atol=1e-6, rtol=1e-5)
