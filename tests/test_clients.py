"""Clients that others wrote, unmodified, against a live server: the vectors are `Embedder.encode`'s, bit for bit."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import servers
from fastbert import BertForSequenceClassification, Embedder

KEY = "a key of the test"
QUICK = ("--threads", "1", "--no-warmup", "--drain-grace-s", "0")
TEXTS = [
    "A ferry crosses the bay in the storm.", "", "The boat did not sail.", "naïve Ångström 東京 🙂", "word " * 700, "x",
    "line\nbreak\tand  spaces", "How do I reset my password?",
]  # fmt: skip
WORDS = [text for text in TEXTS if text]  # OpenAI's API has no empty texts


def needs(module: str) -> pytest.MarkDecorator:
    package = module.replace("_", "-")
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"pip install {package}")


@pytest.fixture(scope="module")
def server(minilm: Path) -> Iterator[servers.Server]:
    with servers.start("fastbert", str(minilm), *QUICK, "--api-key", KEY, served_name="minilm") as server:
        yield server


@pytest.fixture(scope="module")
def expected(minilm: Path) -> np.ndarray:
    with pytest.warns(UserWarning, match="were cut"):
        return Embedder.from_pretrained(minilm, "float32").encode(WORDS, normalize_embeddings=True)


def same_bits(vectors: object, expected: np.ndarray) -> None:
    """Not close: the same float32 numbers."""
    found = np.asarray(vectors, dtype=np.float64)  # a float32 number in JSON's shortest digits reads back to itself
    np.testing.assert_array_equal(found.astype(np.float32), expected)


def test_same_bits_sees_one_bit(expected):
    other = expected.copy()
    other[3, 7] = np.nextafter(other[3, 7], np.float32(1))
    with pytest.raises(AssertionError):
        same_bits(other, expected)


@needs("openai")
class TestOpenAI:
    @pytest.fixture(scope="class")
    def client(self, server):
        import openai

        return openai.OpenAI(base_url=server.url("/v1"), api_key=KEY, max_retries=0)

    @pytest.mark.parametrize("encoding", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
    def test_vectors(self, client, expected, encoding):
        answer = client.embeddings.create(model="minilm", input=WORDS, **encoding)
        rows = [row.embedding for row in answer.data]
        if encoding.get("encoding_format") == "base64":  # then the client hands on what it got
            import base64

            rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
        same_bits(rows, expected)
        assert [row.index for row in answer.data] == list(range(len(WORDS)))
        assert answer.model == "minilm"
        assert answer.usage.prompt_tokens == answer.usage.total_tokens > 256

    def test_one_text_and_fewer_dimensions(self, client, minilm):
        answer = client.embeddings.create(model="minilm", input=TEXTS[0], dimensions=64)
        embedder = Embedder.from_pretrained(minilm, "float32")
        same_bits([answer.data[0].embedding], embedder.encode(TEXTS[:1], normalize_embeddings=True, truncate_dim=64))

    def test_token_ids_are_used_as_sent(self, client, minilm):
        embedder = Embedder.from_pretrained(minilm, "float32")
        ids = embedder.tokenizer.encode(TEXTS[:1]).ids[0]
        answer = client.embeddings.create(model="minilm", input=[ids])
        same_bits([answer.data[0].embedding], embedder.encode(TEXTS[:1], normalize_embeddings=True))

    def test_many_at_once(self, server, expected):
        import openai

        async def ask() -> list[list[list[float]]]:
            async with openai.AsyncOpenAI(base_url=server.url("/v1"), api_key=KEY, max_retries=0) as client:
                parts = [WORDS[i % len(WORDS) :] for i in range(64)]
                made = [client.embeddings.create(model="minilm", input=part) for part in parts]
                return [[row.embedding for row in answer.data] for answer in await asyncio.gather(*made)]

        for i, rows in enumerate(asyncio.run(ask())):
            same_bits(rows, expected[i % len(WORDS) :])

    def test_models(self, client):
        assert [model.id for model in client.models.list()] == ["minilm"]

    def test_errors_are_the_clients_own(self, client, server):
        import openai

        with pytest.raises(openai.BadRequestError, match="30521") as caught:
            client.embeddings.create(model="minilm", input=[[101, 99_999, 102]])
        assert "99999" in caught.value.message
        assert "tiktoken" in caught.value.message
        with pytest.raises(openai.BadRequestError, match="empty"):
            client.embeddings.create(model="minilm", input=[])
        with pytest.raises(openai.BadRequestError, match="dimension"):
            client.embeddings.create(model="minilm", input="a", dimensions=100_000)
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=server.url("/v1"), api_key="another", max_retries=0).models.list()
        with pytest.raises(openai.NotFoundError):
            client.files.list()


def node_modules() -> str | None:
    """Where npm's openai package is: beside a NODE_PATH, or among npm's global packages."""
    if shutil.which("node") is None:
        return None
    places = os.environ.get("NODE_PATH", "").split(os.pathsep)
    if shutil.which("npm"):
        found = subprocess.run(["npm", "root", "-g"], capture_output=True, text=True, check=False)
        places.append(found.stdout.strip())
    return next((place for place in places if place and (Path(place) / "openai").is_dir()), None)


NODE = """
const { OpenAI } = require("openai");
(async () => {
  const client = new OpenAI({ baseURL: process.env.URL, apiKey: process.env.KEY, maxRetries: 0 });
  const input = JSON.parse(process.env.TEXTS);
  const rows = async more => (await client.embeddings.create({ model: "minilm", input, ...more })).data.map(r => r.embedding);
  let refused = null;
  try { await client.embeddings.create({ model: "minilm", input: [[101, 99999, 102]] }); }
  catch (error) { refused = { status: error.status, name: error.constructor.name, message: error.message }; }
  console.log(JSON.stringify({ plain: await rows({}), float: await rows({ encoding_format: "float" }), refused }));
})();
"""  # noqa: E501


def test_openai_of_npm(server, expected):
    modules = node_modules()
    if modules is None:
        pytest.skip("npm install -g openai, or NODE_PATH to the node_modules that has it")
    environment = {"URL": server.url("/v1"), "KEY": KEY, "TEXTS": json.dumps(WORDS), "NODE_PATH": modules}
    run = subprocess.run(
        ["node", "-e", NODE], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout)
    same_bits(answer["plain"], expected)
    same_bits(answer["float"], expected)
    assert (answer["refused"]["status"], answer["refused"]["name"]) == (400, "BadRequestError")
    assert "30521" in answer["refused"]["message"]


class TestInferenceClient:
    @pytest.fixture(autouse=True)
    def online(self, monkeypatch):
        """The tests forbid the hub; this client asks nobody but our server."""
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def test_feature_extraction(self, server, expected):
        from huggingface_hub import InferenceClient

        client = InferenceClient(model=server.url("/embed"), token=KEY)
        same_bits(np.concatenate([client.feature_extraction(text) for text in WORDS]), expected)
        root = InferenceClient(model=server.url("/"), token=KEY)  # an embedding model embeds there
        same_bits(root.feature_extraction(WORDS[0], normalize=True, truncate=True), expected[:1])

    def test_feature_extraction_raw(self, server, minilm):
        from huggingface_hub import InferenceClient

        client = InferenceClient(model=server.url("/embed"), token=KEY)
        raw = Embedder.from_pretrained(minilm, "float32").encode(TEXTS[:1], normalize_embeddings=False)
        same_bits(client.feature_extraction(TEXTS[0], normalize=False), raw)

    def test_sentence_similarity(self, server, minilm):
        from huggingface_hub import InferenceClient

        client = InferenceClient(model=server.url("/similarity"), token=KEY)
        found = client.sentence_similarity(WORDS[0], other_sentences=WORDS[1:3])
        embedder = Embedder.from_pretrained(minilm, "float32")
        vectors = embedder.encode(WORDS[:3])
        same_bits(found, embedder.similarity(vectors[:1], vectors[1:])[0].numpy())

    def test_errors_say_what_the_server_said(self, server):
        from huggingface_hub import InferenceClient
        from huggingface_hub.errors import HfHubHTTPError

        client = InferenceClient(model=server.url("/embed"), token=KEY)
        with pytest.raises(HfHubHTTPError, match="smaller than the maximum embedding dimension"):
            client.feature_extraction("a", dimensions=100_000)

    def test_text_classification(self, minilm, tmp_path):
        from huggingface_hub import InferenceClient

        torch.manual_seed(0)
        labels = {0: "calm", 1: "storm", 2: "fog"}
        model = BertForSequenceClassification.from_pretrained(minilm, num_labels=3, id2label=labels).eval()
        torch.nn.init.normal_(model.classifier.weight)
        model.save_pretrained(tmp_path)
        embedder = Embedder.from_pretrained(minilm, "float32")
        embedder.tokenizer.save(tmp_path)
        ids = torch.tensor([embedder.tokenizer.encode([WORDS[0]]).ids[0]])
        with torch.inference_mode():
            scores = model(ids).logits.softmax(1)[0].tolist()
        with servers.start("fastbert", str(tmp_path), *QUICK) as server:
            found = InferenceClient(model=server.url("/predict")).text_classification(WORDS[0], top_k=3)
        assert [element.label for element in found] == [labels[i] for i in np.argsort(scores)[::-1]]
        np.testing.assert_allclose([element.score for element in found], sorted(scores, reverse=True), rtol=1e-6)


@needs("langchain_openai")
class TestLangChain:
    @pytest.fixture
    def local_tiktoken(self, monkeypatch):
        """OpenAI's vocabularies are downloads: one of the same shape, whose ids are past BERT's, stands in for them."""
        import tiktoken

        ranks = {bytes([byte]): 90_000 + byte for byte in range(256)}
        encoding = tiktoken.Encoding("local", pat_str=r".", mergeable_ranks=ranks, special_tokens={})
        monkeypatch.setattr(tiktoken, "encoding_for_model", lambda name: encoding)
        monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)

    def embeddings(self, server, **more):
        from langchain_openai import OpenAIEmbeddings

        return OpenAIEmbeddings(model="minilm", base_url=server.url("/v1"), api_key=KEY, max_retries=0, **more)

    def test_texts_as_they_are(self, server, expected):
        plain = self.embeddings(server, check_embedding_ctx_length=False)
        same_bits(plain.embed_documents(WORDS), expected)
        same_bits([plain.embed_query(WORDS[0])], expected[:1])
        same_bits(
            self.embeddings(server, check_embedding_ctx_length=False, chunk_size=2).embed_documents(WORDS), expected
        )
        same_bits(asyncio.run(plain.aembed_documents(WORDS)), expected)

    def test_its_default_sends_ids_of_another_tokenizer_and_is_told_so(self, server, local_tiktoken):
        import openai

        with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False") as caught:
            self.embeddings(server).embed_documents(WORDS[:1])
        assert "30521" in caught.value.message
