"""Ray Data and Ray Serve on a local Ray: rows and answers are `Embedder.encode`'s, bit for bit."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from fastbert import Embedder

if importlib.util.find_spec("ray") is None:
    pytest.skip("pip install 'fastbert-engine[ray]' (some 450 MB)", allow_module_level=True)
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))  # else Ray writes one into the home folder
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")  # a busy machine takes its time

import ray
from ray import serve

from benchmarks.servers import free_port
from fastbert.serve.ray_data import EmbedBatch
from fastbert.serve.ray_serve import application
from fastbert.serve.settings import Settings

TEXTS = [f"text number {i} " * (1 + i % 7) for i in range(40)]


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def expected(minilm: Path) -> np.ndarray:
    return Embedder.from_pretrained(minilm, "float32").encode(TEXTS, normalize_embeddings=True)


def test_rows_keep_their_vectors_across_workers(local_ray, minilm, expected, tmp_path):
    class Spy(EmbedBatch):
        """Says with how many threads a worker computes, and in which process; begins when both workers are there."""

        def __init__(self, here: Path, **options: Any) -> None:
            super().__init__(**options)
            self.here = here
            (here / str(os.getpid())).touch()

        def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            import torch

            end = time.monotonic() + 120
            while len(list(self.here.iterdir())) < 2 and time.monotonic() < end:
                time.sleep(0.05)
            made = super().__call__(batch)
            rows = len(batch["text"])
            return {**made, "threads": np.full(rows, torch.get_num_threads()), "process": np.full(rows, os.getpid())}

    workers, written = tmp_path / "workers", tmp_path / "written"
    workers.mkdir()
    rows = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    dataset = ray.data.from_items(rows, override_num_blocks=20).map_batches(
        Spy,
        fn_constructor_kwargs={"here": workers, "model": str(minilm), "normalize_embeddings": True, "dtype": "float32"},
        compute=ray.data.ActorPoolStrategy(size=2),
        num_cpus=1,
        batch_size=2,
    )
    dataset.write_parquet(str(written))
    table = pq.read_table(written)  # a reader that knows nothing of Ray
    order = np.argsort(table["id"].to_numpy())
    found = np.array(table["vector"].to_pylist(), dtype=np.float32)[order]
    np.testing.assert_array_equal(found, expected)
    assert [table["text"][int(i)].as_py() for i in order] == TEXTS
    assert set(table["threads"].to_pylist()) == {1}  # what `num_cpus` says, not what the machine has
    assert len(set(table["process"].to_pylist())) == 2


class TestErrors:
    @pytest.fixture(scope="class")
    def embed(self, minilm):
        return EmbedBatch(str(minilm), normalize_embeddings=True, dtype="float32")

    def test_outside_ray_it_is_a_function_of_a_batch(self, embed, expected):
        made = embed({"text": np.array(TEXTS[:5], dtype=object), "id": np.arange(5)})
        np.testing.assert_array_equal(made["vector"], expected[:5])
        np.testing.assert_array_equal(made["id"], np.arange(5))

    def test_no_such_column(self, embed):
        with pytest.raises(KeyError, match="no column 'text', they have body, id"):
            embed({"id": np.arange(2), "body": np.array(["a", "b"])})

    def test_a_column_is_not_replaced(self, embed):
        with pytest.raises(ValueError, match="'vector' already"):
            embed({"text": np.array(["a"]), "vector": np.zeros(1)})
        with pytest.raises(ValueError, match="both 'text'"):
            EmbedBatch("not loaded", column="text", output="text")

    def test_a_row_without_text(self, embed):
        with pytest.raises(TypeError, match="row 1 of a batch: 'text' is None"):
            embed({"text": np.array(["a", None], dtype=object)})


class TestServe:
    @pytest.fixture(scope="class")
    def port(self):
        return free_port()

    @pytest.fixture(scope="class")
    def handle(self, local_ray, minilm, port):
        serve.start(http_options={"port": port})
        settings = Settings(warmup=False, served_model_name=("minilm",))
        yield serve.run(application(str(minilm), settings, num_replicas=2, ray_actor_options={"num_cpus": 1}))
        serve.shutdown()

    def test_other_deployments_call_it(self, handle, expected):
        made = [handle.encode.remote(TEXTS[i : i + 5], normalize_embeddings=True) for i in range(0, 40, 5)]
        np.testing.assert_array_equal(np.concatenate([answer.result() for answer in made]), expected)
        assert handle.encode.remote([]).result().shape == (0, 384)

    def test_over_http_it_is_the_server(self, handle, port, expected):
        url, body = f"http://127.0.0.1:{port}", json.dumps({"input": TEXTS, "model": "minilm"}).encode()
        headers = {"content-type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/embeddings", body, headers)) as answer:
            rows = [row["embedding"] for row in json.load(answer)["data"]]
        np.testing.assert_array_equal(np.array(rows, dtype=np.float32), expected)
        with urllib.request.urlopen(f"{url}/ready") as answer:
            assert answer.status == 200

    def test_errors_come_back(self, handle):
        with pytest.raises(Exception, match="prompt"):
            handle.encode.remote(["a"], prompt_name="no such prompt").result()
