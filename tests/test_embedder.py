"""Texts to vectors: equality with sentence-transformers, every spelling of its files, options, threads, int8."""

from __future__ import annotations

import argparse
import collections
import inspect
import json
import logging
import pathlib
import re
import shutil
import subprocess
import threading
import unittest.mock
import urllib.request
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from tokenizers.pre_tokenizers import PreTokenizer
from torch import nn
from transformers import AutoConfig, AutoModel

from fastbert.embedder import Embedder
from fastbert.hub import DEFAULT_MODEL, resolve
from fastbert.models import BertConfig, BertModel
from fastbert.models.quantize import Int8Linear, quantize_int8
from fastbert.ops.int8_linear import int8_linear, quantize_rows
from fastbert.pooling import FLAGS, Pooling
from fastbert.windows import WINDOW, ahead, windows

MINILM = resolve(DEFAULT_MODEL)
TOLERANCE = 2e-6  # of vectors of length 1, fp32: forty times what two orders of summation differ by
pytestmark = pytest.mark.filterwarnings("ignore:.*longer than max_seq_length")


@cache
def sentences() -> list[str]:
    """256 English sentences out of the standard library's documentation, from 4 to 200 words."""
    modules = (argparse, collections, logging, pathlib, subprocess, unittest.mock, urllib.request)
    docs = [inspect.getdoc(o) or "" for m in modules for o in (m, *vars(m).values()) if inspect.isclass(o) or o is m]
    split = (" ".join(s.split()) for doc in docs for s in re.split(r"(?<=[.!?])\s+", doc))
    found = list(dict.fromkeys(s for s in split if len(s.split()) >= 4))[:256]
    assert len(found) == 256
    return found


@pytest.fixture(scope="module")
def minilm() -> Embedder:
    return Embedder.from_pretrained(MINILM, device="cpu")


@pytest.fixture(scope="module")
def theirs() -> np.ndarray:
    return SentenceTransformer(str(MINILM), device="cpu").encode(sentences())


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max())


# --- equality with sentence-transformers on real weights --------------------------------------------------------------


def test_equals_sentence_transformers(minilm, theirs):
    assert error(minilm.encode(sentences()), theirs) <= TOLERANCE


def _cls(embedder: Embedder) -> None:
    embedder.pooling = Pooling(("cls",))


def _not_normalised(embedder: Embedder) -> None:
    embedder.modules = nn.Sequential()


class _NextVector(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.roll(1, 0)


def _shuffled(embedder: Embedder) -> None:
    embedder.modules.append(_NextVector())


def _truncated(embedder: Embedder) -> None:
    embedder.max_seq_length = 16


@pytest.mark.parametrize("mutate", [_cls, _not_normalised, _shuffled, _truncated])
def test_a_mutant_fails_the_same_check(theirs, mutate: Callable[[Embedder], None]):
    embedder = Embedder.from_pretrained(MINILM, device="cpu")
    mutate(embedder)
    assert error(embedder.encode(sentences()[:64]), theirs[:64]) > 100 * TOLERANCE


def test_a_text_alone_equals_itself_in_a_batch(minilm):
    texts = sentences()[:24]
    assert error(np.stack([minilm.encode(text) for text in texts]), minilm.encode(texts)) <= TOLERANCE


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 7}, {"token_budget": 1}, {"token_budget": 100}])
def test_batching_does_not_change_vectors(minilm, options):
    texts = sentences()[:16]
    assert error(minilm.encode(texts, **options), minilm.encode(texts)) <= TOLERANCE


def _cosine(dtype: str, exact: np.ndarray) -> float:
    vectors = Embedder.from_pretrained(MINILM, dtype, device="cpu").encode(sentences()[: len(exact)])
    assert error(vectors, exact) > 1e-4, f"{dtype} was not applied"
    return float((vectors * exact).sum(axis=1).mean())


def test_bfloat16_and_int8_stay_close(minilm, monkeypatch):
    exact = minilm.encode(sentences()[:32])
    assert _cosine("bfloat16", exact) >= 0.9995
    assert _cosine("int8", exact) >= 0.995
    monkeypatch.setattr("fastbert.models.quantize.quantize_rows", _five_bits)
    assert _cosine("int8", exact) < 0.995, "the gate must be able to fail"


def _five_bits(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q, scale = quantize_rows(x)
    return (q.float() / 8).round().to(torch.int8), scale * 8


def test_only_real_tokens_reach_the_linear_layers(minilm):
    rows: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: rows.__setitem__(name, rows.get(name, 0) + inputs[0].shape[0])

    linears = [(n, m) for n, m in minilm.model.named_modules() if isinstance(m, nn.Linear)]
    handles = [module.register_forward_hook(count(name)) for name, module in linears]
    try:
        result = minilm.encode_with_stats(sentences()[:64], batch_size=9)
    finally:
        for handle in handles:
            handle.remove()
    real = sum(len(ids) for ids in minilm.tokenizer.encode(sentences()[:64]).ids)
    assert result.num_tokens == real
    assert rows == {name: real for name, _ in linears}


# --- a tiny model, for everything that is not about real weights ------------------------------------------------------

POOL_MEAN = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
TEXTS = ["", "a", "one two three", "the quick brown fox jumps over the lazy dog", "x y", "long " * 40, "two words"]


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=64,
        initializer_range=0.3,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    shutil.copy(MINILM / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    return folder


@pytest.fixture
def build(tiny_encoder, tmp_path):
    """Make a sentence-transformers folder: pooling's configuration, modules after it, other files by name."""

    def build(pooling=POOL_MEAN, modules=(), prefix="sentence_transformers.models.", transformer="", **files) -> Path:
        shutil.copytree(tiny_encoder, tmp_path / transformer, dirs_exist_ok=True)
        rows = [("Transformer", transformer, None, None), ("Pooling", "1_Pooling", pooling, None)]
        rows += [(kind, f"{i}_{kind}", config, state) for i, (kind, config, state) in enumerate(modules, start=2)]
        listed = []
        for i, (kind, where, config, state) in enumerate(rows):
            (tmp_path / where).mkdir(exist_ok=True)
            if config is not None:
                (tmp_path / where / "config.json").write_text(json.dumps(config))
            if state is not None:
                save_file(state, tmp_path / where / "model.safetensors")
            listed.append({"idx": i, "name": str(i), "path": where, "type": prefix + kind})
        (tmp_path / "modules.json").write_text(json.dumps(listed))
        for name, content in files.items():
            (tmp_path / transformer / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return build


def load(folder: Path, **options) -> Embedder:
    return Embedder.from_pretrained(folder, device="cpu", **options)


def same_as_theirs(folder: Path, **options) -> np.ndarray:
    ours = load(folder).encode(TEXTS, **options)
    expected = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, **options)
    assert ours.shape == expected.shape
    assert ours.dtype == expected.dtype
    assert error(ours, expected) <= 1e-5 * np.abs(expected).max()
    return ours


@pytest.mark.parametrize("mode", FLAGS.values())
@pytest.mark.parametrize("spelling", ["old", "new"])
def test_every_pooling_mode_in_both_spellings(build, mode, spelling):
    flag = next(flag for flag, name in FLAGS.items() if name == mode)
    old = {"word_embedding_dimension": 32, **{f: f == flag for f in FLAGS}}
    ours = same_as_theirs(build(old if spelling == "old" else {"embedding_dimension": 32, "pooling_mode": mode}))
    other = Pooling(("mean" if mode != "mean" else "cls",))
    assert error(ours, _with(load(build(old)), other)) > 1e-3, "the comparison must be able to fail"


def _with(embedder: Embedder, pooling: Pooling) -> np.ndarray:
    embedder.pooling = pooling
    return embedder.encode(TEXTS)


@pytest.mark.parametrize(
    "config",
    [
        {"word_embedding_dimension": 32, "pooling_mode_max_tokens": True, "pooling_mode_cls_token": True},
        {"embedding_dimension": 32, "pooling_mode": ["mean", "lasttoken", "cls"]},
        {"word_embedding_dimension": 32},
        {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode": "max"},
    ],
)
def test_several_modes_none_and_both_spellings_at_once(build, config):
    same_as_theirs(build(config))


@pytest.mark.parametrize("modes", [(mode,) for mode in FLAGS.values()] + [("cls", "weightedmean")])
def test_a_prompt_can_be_left_out_of_the_vector(build, modes):
    config = {"word_embedding_dimension": 32, "pooling_mode": list(modes), "include_prompt": False}
    left_out = same_as_theirs(build(config), prompt="represent this text: ")
    config["include_prompt"] = True
    if modes != ("lasttoken",):
        assert error(left_out, same_as_theirs(build(config), prompt="represent this text: ")) > 1e-3


def test_a_text_that_is_nothing_but_prompt(build):
    folder = build({"word_embedding_dimension": 32, "pooling_mode": ["mean", "max", "cls"], "include_prompt": False})
    vectors = load(folder, max_seq_length=8).encode(["some text", ""], prompt="a b c d e f g h i j k l m n ")
    assert np.isfinite(vectors).all()


def _dense(outputs: int, bias: bool, residual: bool = False, **more) -> tuple[str, dict, dict]:
    generator = torch.Generator().manual_seed(outputs)
    state = {"linear.weight": torch.randn(outputs, 32, generator=generator)}
    if bias:
        state["linear.bias"] = torch.randn(outputs, generator=generator)
    if residual and outputs != 32:
        state["residual.weight"] = torch.randn(outputs, 32, generator=generator)
    return "Dense", {"in_features": 32, "out_features": outputs, "bias": bias, "use_residual": residual, **more}, state


NORM = {"norm.weight": torch.linspace(0.5, 2, 32), "norm.bias": torch.linspace(-1, 1, 32)}


@pytest.mark.parametrize(
    "modules",
    [
        [_dense(48, True, activation_function="torch.nn.modules.activation.Tanh"), ("Normalize", {}, None)],
        [_dense(8, False, activation_function="torch.nn.modules.linear.Identity")],
        [_dense(32, True, residual=True, activation_function="torch.nn.modules.activation.GELU")],
        [_dense(16, True, residual=True)],
        [("LayerNorm", {"dimension": 32}, NORM), ("Normalize", None, None)],
        [("Dropout", {"dropout": 0.5}, None)],
    ],
)
def test_modules_after_pooling(build, modules):
    folder = build(modules=modules)
    vectors = same_as_theirs(folder)
    assert load(folder).get_embedding_dimension() == vectors.shape[1]


def test_dense_weights_in_a_pickle(build):
    kind, config, state = _dense(8, True)
    folder = build(modules=[(kind, config, None)])
    torch.save(state, folder / "2_Dense" / "pytorch_model.bin")
    same_as_theirs(folder)


@pytest.mark.parametrize(
    ("transformer", "types"),
    [
        ("0_Transformer", ["sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling"]),
        (
            "",
            [
                "sentence_transformers.base.modules.transformer.Transformer",
                "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
            ],
        ),
    ],
)
def test_module_paths_and_types(build, transformer, types):
    folder = build(transformer=transformer)
    rows = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([{**row, "type": t} for row, t in zip(rows, types, strict=True)]))
    same_as_theirs(folder)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"])
def test_every_name_of_the_length_configuration(build, name):
    folder = build(**{f"sentence_{name}_config": {"max_seq_length": 12, "do_lower_case": True}})
    assert load(folder).max_seq_length == 12
    assert load(folder, max_seq_length=20).max_seq_length == 20
    same_as_theirs(folder)


def test_lengths_are_bounded_by_the_positions(build):
    embedder = load(build())
    assert embedder.max_seq_length == 64
    with pytest.raises(ValueError, match="max_seq_length is 65 but the model has positions for 64"):
        embedder.max_seq_length = 65
    with pytest.raises(ValueError, match="max_seq_length is 99 but the model has positions for 64"):
        load(build(), max_seq_length=99)
    with pytest.raises(ValueError, match="max_seq_length is 0, but a pair of texts has 3"):
        load(build(), max_seq_length=0)
    assert load(build(sentence_bert_config={"max_seq_length": 512})).max_seq_length == 64
    assert np.isfinite(embedder.encode("word " * 1000)).all(), "no id or position is out of range"


def test_a_plain_encoder_is_mean_pooled_with_a_warning(tiny_encoder):
    with pytest.warns(UserWarning, match="no modules.json"):
        ours = load(tiny_encoder).encode(TEXTS)
    assert error(ours, SentenceTransformer(str(tiny_encoder), device="cpu").encode(TEXTS)) <= 1e-5 * np.abs(ours).max()


@pytest.mark.parametrize("family", ["albert", "bert", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta"])
def test_every_family(build, family):
    """Random weights of transformers' own models; RoBERTa's and MPNet's positions begin at 2."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    names = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
    if family == "distilbert":
        sizes = {names.get(name, "hidden_dim"): size for name, size in sizes.items()}
    if family in ("albert", "electra"):
        sizes["embedding_size"] = 16
    offset = 2 if family in ("mpnet", "roberta", "xlm-roberta") else 0
    config = AutoConfig.for_model(
        family, **sizes, vocab_size=30522, max_position_embeddings=40 + offset, initializer_range=0.3,
        pad_token_id=1 if offset else 0,
    )  # fmt: skip
    folder = build()
    AutoModel.from_config(config).save_pretrained(folder)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 40}')
    same_as_theirs(folder)
    exact, int8 = (load(folder, dtype=dtype).encode(TEXTS) for dtype in ("float32", "int8"))
    assert 1e-4 < error(int8, exact) / np.abs(exact).max() < 0.1
    assert load(folder).encode_with_stats(["w " * 99]).num_tokens == 40
    with pytest.raises(ValueError, match="has positions for 40 tokens"):
        load(folder, max_seq_length=41)


PROMPTS = {"prompts": {"query": "find: ", "passage": "text: "}, "default_prompt_name": "passage"}


@pytest.mark.parametrize("options", [{}, {"prompt_name": "query"}, {"prompt": "my own: "}, {"prompt": ""}])
def test_prompts(build, options):
    folder = build(config_sentence_transformers=PROMPTS)
    same_as_theirs(folder, **options)
    expected = load(folder).encode(["find: a b"], prompt="")
    assert error(load(folder).encode(["a b"], prompt_name="query"), expected) <= 1e-6
    assert error(load(folder).encode(["a b"], prompt=""), expected) > 1e-3, "an ignored prompt must show"


def test_query_and_document_prompts(build):
    folder = build(config_sentence_transformers=PROMPTS)
    ours, theirs = load(folder), SentenceTransformer(str(folder), device="cpu")
    assert ours.prompts == theirs.prompts
    for name in ("encode_query", "encode_document"):
        assert error(getattr(ours, name)(TEXTS), getattr(theirs, name)(TEXTS)) <= 1e-5
        assert error(getattr(ours, name)("a b", prompt="x: "), ours.encode("x: a b", prompt="")) <= 1e-6


def test_unknown_prompts_are_listed(build):
    folder = build(config_sentence_transformers=PROMPTS)
    with pytest.raises(
        ValueError, match=r"'quary' is unknown; the model's prompts are \['document', 'passage', 'query'\]"
    ):
        load(folder).encode("a", prompt_name="quary")
    with pytest.raises(ValueError, match="'nothing' is unknown"):
        load(build(config_sentence_transformers={"default_prompt_name": "nothing"}))


@pytest.mark.parametrize("precision", ["float32", "int8", "uint8", "binary", "ubinary"])
def test_precisions(build, precision):
    ours = load(build()).encode(TEXTS, precision=precision)
    theirs = SentenceTransformer(str(build()), device="cpu").encode(TEXTS, precision=precision)
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    if precision == "float32":
        return
    off = np.abs(ours.astype(int) - theirs.astype(int))
    assert (off > 1).mean() == 0 or precision.endswith("binary")
    assert (off > 0).mean() <= 0.02, "a last bit of fp32 may move a few values over a step"


def test_precision_of_one_vector_or_of_none(build):
    embedder = load(build())
    with pytest.raises(ValueError, match="needs the range of several vectors"):
        embedder.encode("one", precision="int8")
    with pytest.raises(ValueError, match="'int4' is not one of"):
        embedder.encode(TEXTS, precision="int4")
    assert embedder.encode([], precision="binary").shape == (0, 4)
    assert embedder.encode([], precision="uint8").dtype == np.uint8


@pytest.mark.parametrize(
    "options", [{"truncate_dim": 5}, {"truncate_dim": 5, "normalize_embeddings": True}, {"truncate_dim": 99}]
)
def test_truncate_dim(build, options):
    vectors = same_as_theirs(build(modules=[("Normalize", {}, None)]), **options)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6) == (
        options["truncate_dim"] == 99 or len(options) == 2
    )
    declared = load(build(config_sentence_transformers={"truncate_dim": 7}))
    assert declared.get_embedding_dimension() == declared.encode("a").shape[0] == 7
    with pytest.raises(ValueError, match="truncate_dim must be at least 1, got 0"):
        declared.encode("a", truncate_dim=0)


def test_vectors_are_scaled_where_no_module_has_done_it_last(build):
    for modules in ([], [("Normalize", {}, None), _dense(16, True)], [_dense(16, True), ("Normalize", {}, None)]):
        vectors = load(build(modules=modules)).encode(TEXTS, normalize_embeddings=True)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    embedder = load(build(modules=[("Normalize", {}, None)]))
    np.testing.assert_array_equal(embedder.encode(TEXTS, normalize_embeddings=True), embedder.encode(TEXTS))


def test_shapes_and_containers(build):
    embedder = load(build())
    assert embedder.encode("one").shape == (32,)
    assert embedder.encode(["one"]).shape == embedder.encode(("one",)).shape == (1, 32)
    assert embedder.encode([]).shape == (0, 32)
    assert embedder.encode(iter(TEXTS)).shape == embedder.encode(np.array(TEXTS)).shape == (len(TEXTS), 32)
    tensor = embedder.encode(TEXTS, convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor)
    listed = embedder.encode(TEXTS, convert_to_numpy=False)
    assert isinstance(listed, list)
    assert torch.equal(torch.stack(listed), tensor)
    assert isinstance(embedder.encode("one", convert_to_tensor=True), torch.Tensor)


def test_token_embeddings(build):
    ours, theirs = load(build()), SentenceTransformer(str(build()), device="cpu")
    for mine, expected in zip(
        ours.encode(TEXTS, output_value="token_embeddings"),
        theirs.encode(TEXTS, output_value="token_embeddings"),
        strict=True,
    ):
        assert mine.shape == expected.shape
        assert torch.allclose(mine, expected, atol=1e-5)
    out = ours.encode("one two", output_value=None)
    assert out["input_ids"].tolist() == ours.tokenizer.encode(["one two"]).ids[0]
    assert torch.allclose(out["token_embeddings"].mean(0), out["sentence_embedding"], atol=1e-6)


def test_pairs(build):
    pairs = [("one two", "three"), ("a", "b c d e f")]
    ours, theirs = load(build()), SentenceTransformer(str(build()), device="cpu")
    assert error(ours.encode(pairs, prompt="p: "), theirs.encode(pairs, prompt="p: ")) <= 1e-5
    assert error(ours.encode([("one", "two")]), ours.encode(["one two"])) > 1e-3


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarities(build, name):
    folder = build(config_sentence_transformers={"similarity_fn_name": name})
    ours, theirs = load(folder), SentenceTransformer(str(folder), device="cpu")
    a, b = np.random.default_rng(0).normal(size=(2, 5, 32)).astype(np.float32)
    assert torch.allclose(ours.similarity(a, b[:3]), theirs.similarity(a, b[:3]), atol=1e-5)
    assert torch.allclose(ours.similarity_pairwise(a, list(b)), theirs.similarity_pairwise(a, b), atol=1e-5)
    assert ours.similarity(a[0], b).shape == (1, 5)
    with pytest.raises(ValueError, match="'cosinus' is not one of"):
        ours.similarity_fn_name = "cosinus"


@pytest.mark.filterwarnings("default:.*longer than max_seq_length")
def test_truncation_is_counted_and_warned_about_once(build):
    embedder = load(build(), max_seq_length=8)
    texts = ["w " * n for n in range(12)]
    assert embedder.encode_with_stats(texts, batch_size=2).num_truncated == 5
    with pytest.warns(
        UserWarning, match="5 of 12 texts are longer than max_seq_length=8 .*can be set up to 64"
    ) as caught:
        embedder.encode(texts, batch_size=2)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embedder.encode(texts[:6])


def test_hostile_texts(build):
    embedder = load(build())
    hostile = ["\0", "a\0b", "\ud800", "\u200b", "x" * 10**6, " " * 10**6, "word " * 10**5, "中" * 10**4, "\U0010ffff"]
    vectors = embedder.encode(hostile)
    assert np.isfinite(vectors).all()
    assert error(vectors[1], embedder.encode("ab")) <= 1e-5, "a NUL is no character to BERT"


@pytest.mark.parametrize("bad", [None, 3, b"bytes", {"text": "a"}, 1.5])
def test_wrong_types(build, bad):
    embedder = load(build())
    with pytest.raises(TypeError, match=f"texts must be a str or a list of str, it is a {type(bad).__name__}"):
        embedder.encode(bad)
    with pytest.raises(TypeError, match=rf"texts\[1\] must be a str or a pair of str, it is a {type(bad).__name__}"):
        embedder.encode(["fine", bad], prompt="p: ")


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"token_budget": 0}, {"output_value": "x"}, {"device": "cuda"}])
def test_wrong_options(build, options):
    with pytest.raises(ValueError, match=r"at least 1|output_value|the model is on cpu"):
        load(build()).encode(TEXTS, **options)


@pytest.mark.parametrize(("dtype", "message"), [("float16", "is for GPUs"), ("fp32", "is not one of")])
def test_wrong_dtypes(build, dtype, message):
    with pytest.raises(ValueError, match=message):
        load(build(), dtype=dtype)


def test_eight_threads_get_what_one_thread_gets(build):
    embedder = load(build())
    lists = [[f"{text} {i}" for text in TEXTS * 3] for i in range(24)]
    serial = [embedder.encode(texts) for texts in lists]
    with ThreadPoolExecutor(8) as pool:
        threaded = list(pool.map(embedder.encode, lists))
    assert all(np.array_equal(a, b) for a, b in zip(serial, threaded, strict=True))


# --- long lists: a thread tokenises one part ahead --------------------------------------------------------------------


def test_long_lists_are_computed_in_windows(build, monkeypatch):
    embedder = load(build())
    texts = [f"{'w ' * (i % 9)}{i}" for i in range(50)]
    expected = embedder.encode(texts)
    monkeypatch.setattr("fastbert.windows.WINDOW", 7)
    monkeypatch.setattr("fastbert.vectors.COPY", 11)
    sizes = []
    encode = type(embedder.tokenizer).encode
    monkeypatch.setattr(
        type(embedder.tokenizer),
        "encode",
        lambda self, t, first, _: (sizes.append((first, len(t))), encode(self, t))[1],
    )
    assert np.array_equal(embedder.encode(texts), expected)
    assert sizes == [(7 * i, 7) for i in range(7)] + [(49, 1)]
    states = embedder.encode(texts, output_value="token_embeddings")
    assert error(np.stack([s.mean(0) for s in states]), expected) <= 1e-5


def test_windows_cover_the_list_and_begin_small():
    texts = ["word " * 60] * 3000 + [("a" * 30, "b" * 30)] * 40 + ["x" * 10**6] * 3 + [""] * 20000
    bounds = windows(texts, max_length=256, budget_tokens=2048)
    assert [i for first, last in bounds for i in range(first, last)] == list(range(len(texts)))
    sizes = [last - first for first, last in bounds]
    assert sizes[0] < sizes[1] < sizes[2] < sizes[3] == sizes[4], "1, 2, 4, then 8 budgets"
    assert sizes[3] * 102 < 8 * 2048 + 102
    assert all(last > first and last - first <= WINDOW for first, last in bounds)
    assert windows(["a"] * 99, max_length=256, budget_tokens=1) == [(0, 99)], "tiny batches make no tiny parts"
    assert windows([], max_length=256, budget_tokens=2048) == []
    # A megabyte that is cut to 256 tokens counts as 256: three of them share a part with short texts.
    assert len(windows(["x" * 10**6] * 3, max_length=256, budget_tokens=2048)) == 1


def test_the_next_part_is_made_while_this_one_is_used():
    started = [threading.Event() for _ in range(5)]
    places = []

    def work(i):
        started[i].set()
        places.append(threading.current_thread())
        return i * i

    seen = []
    for i, value in enumerate(ahead(work, range(5))):
        seen.append(value)
        assert i == 4 or started[i + 1].wait(30), "nobody works ahead"
        assert not any(event.is_set() for event in started[i + 2 :]), "one part ahead, not more"
    assert seen == [0, 1, 4, 9, 16]
    assert threading.current_thread() not in places
    places.clear()
    assert list(ahead(work, [3])) == [9]
    assert places == [threading.current_thread()], "a single part pays no hop to a thread"
    assert list(ahead(work, [])) == []


def test_an_error_ahead_comes_in_its_place_and_leaves_no_thread():
    before = threading.active_count()
    made = ahead(lambda i: 1 // (2 - i), range(4))
    assert [next(made), next(made)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(made)
    dropped = ahead(str, range(9))
    next(dropped)
    dropped.close()
    assert threading.active_count() == before


def test_a_short_list_is_tokenised_by_its_callers_thread(build, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    embedder, seen = load(build()), set()

    class Spy:
        def pre_tokenize(self, text):
            seen.add(threading.get_ident())

    embedder.tokenizer.backend.pre_tokenizer = PreTokenizer.custom(Spy())
    here, texts = {threading.get_ident()}, ["a short text"] * 40
    expected = embedder.encode(texts)
    assert seen == here
    monkeypatch.setattr("fastbert.windows._ALONE", 0)
    assert np.array_equal(embedder.encode(texts), expected)
    assert seen > here, "a long list wakes the threads of tokenizers"


def test_a_bad_text_far_down_the_list_is_named_by_its_place(build, monkeypatch):
    monkeypatch.setattr("fastbert.windows.WINDOW", 4)
    with pytest.raises(TypeError, match=r"texts\[10\] must be a str or a pair of str, it is a int: 7"):
        load(build()).encode(["fine"] * 10 + [7, "fine"], prompt="p: ")


def test_the_progress_bar_goes_to_stderr(build, capsys):
    load(build()).encode(TEXTS, show_progress_bar=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "7/7" in err
    assert "tokens/s" in err
    load(build()).encode(TEXTS)
    assert capsys.readouterr() == ("", "")


def test_saved_models_load_here_and_in_sentence_transformers(build, tmp_path):
    modules = [
        _dense(16, True),
        ("LayerNorm", {"dimension": 16}, {k: v[:16].clone() for k, v in NORM.items()}),
        ("Normalize", {}, None),
    ]
    pooling = {"word_embedding_dimension": 32, "pooling_mode": "max", "include_prompt": False}
    original = load(
        build(pooling, modules, config_sentence_transformers={**PROMPTS, "truncate_dim": 9}), max_seq_length=20
    )
    original.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "1_Pooling" / "config.json").read_text())
    assert written["pooling_mode"] == "max"
    assert [flag for flag in FLAGS if written[flag]] == ["pooling_mode_max_tokens"]
    again = load(tmp_path / "saved")
    theirs = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert again.max_seq_length == theirs.max_seq_length == 20
    assert np.array_equal(again.encode(TEXTS), original.encode(TEXTS))
    assert error(theirs.encode(TEXTS), original.encode(TEXTS)) <= 1e-5


@pytest.mark.parametrize("modes", [("mean",), ("cls", "mean"), ("mean", "cls")])
def test_pooling_configurations_survive_saving(modes):
    assert Pooling.from_config(Pooling(modes, False).to_config(32)) == Pooling(modes, False)


# --- folders that do not fit ------------------------------------------------------------------------------------------


def test_missing_and_corrupt_files_are_named(build):
    for name, error_type in (("1_Pooling/config.json", FileNotFoundError), ("config.json", FileNotFoundError)):
        folder = build()
        (folder / name).unlink()
        with pytest.raises(error_type, match=re.escape(name)):
            load(folder)
    for name in ("modules.json", "tokenizer.json", "1_Pooling/config.json", "config.json", "model.safetensors"):
        folder = build()
        (folder / name).write_text("{broken")
        with pytest.raises(ValueError, match=re.escape(name)):
            load(folder)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([("CNN", {}, None)], "lists the modules Transformer, Pooling, CNN; computed here are"),
        ([_dense(8, True, activation_function="os.system")], "activation_function 'os.system'; known: "),
        ([_dense(8, True, module_input_name="token_embeddings")], "module_input_name is 'token_embeddings'"),
        ([("Dense", {"in_features": 32}, {})], "out_features is None"),
        ([("Dense", {"in_features": 32, "out_features": 9}, {"linear.weight": torch.zeros(8, 32)})], "do not fit"),
    ],
)
def test_modules_that_are_not_computed_are_named(build, modules, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load(build(modules=modules))


def test_foreign_code_is_never_imported(build):
    with pytest.raises(ValueError, match=r"lists the modules custom_st\.Transformer"):
        load(build(prefix="custom_st."))


def test_unknown_pooling_architecture_and_vocabulary(build):
    with pytest.raises(ValueError, match=r"unknown pooling mode 'men' \(nearest: mean"):
        load(build({"embedding_dimension": 32, "pooling_mode": "men"}))
    folder = build()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    with pytest.raises(ValueError, match="knows no model_type 't5'; it knows albert, bert"):
        load(folder)
    with pytest.raises(ValueError, match="similarity_fn_name 'maxsim' is not one of"):
        load(build(config_sentence_transformers={"similarity_fn_name": "maxsim"}))
    with pytest.raises(ValueError, match="is a model for fill-mask"):
        load(build(sentence_bert_config={"transformer_task": "fill-mask"}))


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(build, tmp_path):
    embedder = load(build())
    small = BertModel(BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=4))
    with pytest.raises(ValueError, match="the tokenizer has 30522 ids but the model's vocab_size is 100"):
        Embedder(small, embedder.tokenizer, embedder._folder)


# --- 8-bit linear layers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("T", "K", "N"), [(0, 8, 4), (1, 5, 7), (3, 384, 64), (17, 37, 29), (40, 1536, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_linear_is_the_exact_integer_product(T, K, N, dtype):
    generator = torch.Generator().manual_seed(T + K)
    x = torch.randn(T, K, generator=generator).to(dtype)
    w, bias = torch.randn(N, K, generator=generator), torch.randn(N, generator=generator)
    weight, weight_scale = quantize_rows(w)
    q, scale = quantize_rows(x)
    total = (q.long()[:, None] * weight.long()[None]).sum(-1)  # int64, no matrix product
    expected = (total.float() * scale[:, None] * weight_scale + bias).to(dtype)
    y = int8_linear(x, weight, weight_scale, bias)
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    assert torch.equal(int8_linear(x, weight.mT.contiguous().mT, weight_scale, bias), expected)


def test_quantised_rows_are_within_half_a_step():
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 50)[:, None]
    x[7] = 0
    q, scale = quantize_rows(x)
    assert ((q * scale[:, None] - x).abs() <= scale[:, None] * 0.5001).all()
    assert q.abs().amax(-1).tolist() == [127 if i != 7 else 0 for i in range(50)]


def test_an_int8_linear_layer_with_16_bits_keeps_its_input():
    torch.manual_seed(0)
    linear, x = nn.Linear(40, 24), torch.randn(9, 40)
    x[:, 3] = 30.0  # which leaves the others few of 255 steps
    with torch.no_grad():
        exact, wide, narrow, mixed = linear(x), *(Int8Linear(linear, n)(x) for n in (0, 24, 7))
    assert (wide - exact).abs().max() < (narrow - exact).abs().max() / 2
    torch.testing.assert_close(mixed, torch.cat([narrow[:, :7], wide[:, 7:]], dim=1))
    weight, scale = quantize_rows(linear.weight.detach())
    torch.testing.assert_close(wide, x @ (weight * scale[:, None]).mT + linear.bias.detach())
    with pytest.raises(ValueError, match="num_narrow is 25 but there are 24 output features"):
        Int8Linear(linear, 25)


def test_int8_linear_says_what_does_not_fit():
    weight, scale = quantize_rows(torch.randn(4, 8))
    with pytest.raises(ValueError, match="weight has 8 features but x has 9"):
        int8_linear(torch.randn(2, 9), weight, scale)
    with pytest.raises(ValueError, match="weight must be int8"):
        int8_linear(torch.randn(2, 8), torch.randn(4, 8), scale)
    with pytest.raises(ValueError, match="weight has 4 rows"):
        int8_linear(torch.randn(2, 8), weight, scale[:3])
    with pytest.raises(RuntimeError, match="has no backward"):
        int8_linear(torch.randn(2, 8, requires_grad=True), weight, scale)


def test_quantising_swaps_all_and_spares_values(build, tmp_path):
    embedder = load(build(), dtype="int8")
    assert not [m for m in embedder.model.modules() if isinstance(m, nn.Linear)]
    wide = {
        n.rpartition(".")[2]: (len(m.weight) - m.num_narrow) / len(m.weight)
        for n, m in embedder.model.named_modules()
        if hasattr(m, "weight_scale")
    }
    assert wide == {"qkv": 1 / 3, "dense": 0, "intermediate": 0, "output": 0}
    again = load(build())
    qkv = quantize_int8(again.model, ("qkv",)).get_submodule("encoder.layer.0.attention.qkv")
    assert (qkv.num_narrow, qkv.weight.shape[0] > 0) == (0, True)
    with torch.inference_mode():
        assert embedder.model.execution_plan().startswith("cpu engine: int8 with ")
    with pytest.raises(ValueError, match="already in int8"):
        quantize_int8(embedder.model)
    with pytest.raises(ValueError, match="an int8 or float8 model cannot be saved"):
        embedder.save_pretrained(tmp_path / "never")
    assert not (tmp_path / "never").exists()
