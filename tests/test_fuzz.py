"""Foreign bytes: mutated files of models and inputs of the packers. Only clear errors come out; nothing crashes.

The suite tries some hundred of each, the same ones each time. `FASTBERT_FUZZ_EXAMPLES=20000 pytest -n 0
tests/test_fuzz.py` draws new ones: a file that shows a fault is kept, as small as it can be made, in `tests/foreign/`
(its README says how), for every later run of the suite; hypothesis's own examples in `.hypothesis/`, for the next long
run. Inputs of the packers that were faults are `@example`s.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import fastbert
from fastbert import Embedder
from fastbert.packing import pack, pack_padded, token_batches
from fastbert.weights import load_weights

FOREIGN = Path(__file__).parent / "foreign"
EXAMPLES = int(os.environ.get("FASTBERT_FUZZ_EXAMPLES", "150"))
LONG = EXAMPLES >= 1000
fuzz = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=not LONG,
    database=DirectoryBasedExampleDatabase(FOREIGN.parent.parent / ".hypothesis" / "examples") if LONG else None,
)  # fmt: skip
TEXTS = ["the quick fox", "", "a \ud800 [MASK] \x00 fox " * 9]
WORDS = ["the", "quick", "fox", "a", "##s"]
# What a user can act on. Anything else (AttributeError, IndexError, RuntimeError, ...) is a bug of ours.
CLEAR = (ValueError, FileNotFoundError)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A whole sentence-transformers folder: encoder, tokenizer, pooling, Dense, Normalize, all configurations."""
    path = tmp_path_factory.mktemp("whole")
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 32, "truncation_side": "right",
        "tokenize_chinese_chars": True, "strip_accents": None, "cls_token": "[CLS]",
        "mask_token": {"content": "[MASK]"},
    }))  # fmt: skip
    (path / "vocab.txt").write_text("\n".join(vocab))
    torch.manual_seed(0)
    config = fastbert.BertConfig(
        vocab_size=len(vocab), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, initializer_range=0.3, id2label={0: "no", 1: "yes", 2: "maybe"},
    )  # fmt: skip
    fastbert.BertModel(config, add_pooling_layer=False).save_pretrained(path)
    kinds = ("Transformer", "Pooling", "Dense", "Normalize")
    wheres = ("", "1_Pooling", "2_Dense", "3_Normalize")
    rows = [
        {"idx": i, "name": str(i), "path": where, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, where) in enumerate(zip(kinds, wheres, strict=True))
    ]
    (path / "modules.json").write_text(json.dumps(rows))
    for where in wheres[1:]:
        (path / where).mkdir()
    (path / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 16, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True,
                    "include_prompt": True})
    )  # fmt: skip
    dense = {"in_features": 16, "out_features": 4, "bias": True,
             "activation_function": "torch.nn.modules.activation.Tanh"}  # fmt: skip
    (path / "2_Dense" / "config.json").write_text(json.dumps(dense))
    from safetensors.torch import save_file

    save_file({"linear.weight": torch.randn(4, 16), "linear.bias": torch.zeros(4)}, path / "2_Dense/model.safetensors")
    (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 16, "do_lower_case": False}))
    (path / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {"query": "q: "}, "default_prompt_name": "query", "similarity_fn_name": "cosine",
                    "truncate_dim": 3})
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert Embedder.from_pretrained(path).encode(TEXTS).shape == (3, 3)
    return path


leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 40), st.sampled_from([2**31, 2**63, 10**400, -1, 0]),
    st.floats(allow_nan=True), st.text(max_size=6),
    st.sampled_from(["", "bert", "roberta", "../x", "/etc", "cls", "mean", "float32", "NaN", "\ud800"]),
)  # fmt: skip
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def places(tree, prefix=()):
    """Paths of all nodes of a JSON value."""
    yield prefix
    if isinstance(tree, dict):
        for key in tree:
            yield from places(tree[key], (*prefix, key))
    elif isinstance(tree, list):
        for i in range(len(tree)):
            yield from places(tree[i], (*prefix, i))


def mutate(draw, tree):
    """The value with one to three of its nodes replaced, dropped or repeated."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(tree))))
        if not path:
            if draw(st.booleans()):
                return draw(values)
            continue
        parent = tree
        for step in path[:-1]:
            parent = parent[step]
        if draw(st.integers(0, 4)) == 0:
            del parent[path[-1]]
        else:
            parent[path[-1]] = draw(values)
    return tree


@contextmanager
def explained() -> Iterator[None]:
    """What is inside may fail, with an error that says something."""
    try:
        yield
    except CLEAR as error:
        if len(str(error)) <= 20:
            raise


FILES = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "modules.json", "1_Pooling/config.json",
    "2_Dense/config.json", "sentence_bert_config.json", "config_sentence_transformers.json",
)  # fmt: skip


def use(path):
    """Load and encode; a model that loads must give finite or not finite, but whole, vectors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        embedder = Embedder.from_pretrained(path)
        vectors = embedder.encode(TEXTS)
    assert vectors.shape == (3, embedder.get_embedding_dimension())


def fuzzed(work: Path, name: str, made: Callable[..., bytes], read: Callable[[], object]) -> None:
    """Files that `made` draws are read, or refused with an error that says something. A long run keeps the file that
    it fails on: the last one tried, which hypothesis has made small."""

    @fuzz
    @given(st.data())
    def run(data):
        (work / name).write_bytes(made(data.draw))
        with explained():
            read()

    try:
        run()
    except BaseException:
        if LONG:
            content = (work / name).read_bytes()
            place = FOREIGN / f"found-{hashlib.sha256(content).hexdigest()[:8]}" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
        raise


@pytest.mark.parametrize("case", sorted(path.name for path in FOREIGN.iterdir() if path.is_dir()))
def test_files_that_were_faults(folder, tmp_path, case):
    """What `tests/foreign/` holds, laid over a whole folder, is answered as its `error.txt` says."""
    for path in (folder, FOREIGN / case):
        shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    if any(tmp_path.glob("*.index.json")):
        (tmp_path / "model.safetensors").unlink()
    said = tmp_path / "error.txt"
    if said.exists():
        with pytest.raises(CLEAR, match=re.escape(said.read_text().strip())):
            use(tmp_path)
        return
    with explained():
        use(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_json_files(folder, tmp_path_factory, name):
    original = json.loads((folder / name).read_text())
    work = tmp_path_factory.mktemp("mutated")
    shutil.copytree(folder, work, dirs_exist_ok=True)

    def read():
        with suppress(MemoryError):
            use(work)

    fuzzed(work, name, lambda draw: json.dumps(mutate(draw, original)).encode(), read)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_weight_headers(folder, tmp_path_factory, name):
    """JSON that says where tensors lie: a safetensors header of the right length, and the index of shards."""
    content = (folder / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    work = tmp_path_factory.mktemp("headers")
    if name.endswith("json"):
        shutil.copy(folder / "model.safetensors", work / "shard.safetensors")
        header = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(header, "shard.safetensors")}
        del header["weight_map"]["__metadata__"]

    def made(draw):
        text = json.dumps(mutate(draw, header)).encode()
        return text if name.endswith("json") else len(text).to_bytes(8, "little") + text + content[end:]

    fuzzed(work, name, made, lambda: load_weights(work))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "2_Dense/model.safetensors", "tokenizer.json", "vocab.txt", "config.json"]
)
def test_bytes(folder, tmp_path_factory, name):
    """Flipped, cut, repeated and inserted bytes, above all in the header."""
    original = (folder / name).read_bytes()
    work = tmp_path_factory.mktemp("bytes")
    shutil.copytree(folder, work, dirs_exist_ok=True)
    if name == "vocab.txt":
        (work / "tokenizer.json").unlink()

    def made(draw):
        content = bytearray(original)
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, min(len(content), 4000)))
            kind = draw(st.sampled_from(["flip", "cut", "insert", "drop"]))
            if kind == "flip" and at < len(content):
                content[at] = draw(st.integers(0, 255))
            elif kind == "cut":
                del content[at:]
            elif kind == "insert":
                content[at:at] = draw(st.binary(max_size=9))
            else:
                del content[at : at + draw(st.integers(1, 9))]
        return bytes(content)

    fuzzed(work, name, made, lambda: use(work))


@fuzz
@given(header=st.binary(max_size=64), length=st.integers(0, 2**64 - 1), tail=st.binary(max_size=32))
def test_safetensors_headers(tmp_path_factory, header, length, tail):
    path = tmp_path_factory.mktemp("header", numbered=True)
    (path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header + tail)
    with pytest.raises(CLEAR):
        load_weights(path)


ids = st.integers(-(2**70), 2**70) | st.integers(0, 40) | st.booleans() | st.none() | st.text(max_size=2) | st.floats()


@fuzz
@example([[2**63]], None)
@example([[-1], [True, 2]], [[0], []])
@given(st.lists(st.lists(ids, max_size=5), max_size=5), st.none() | st.lists(st.lists(ids, max_size=5), max_size=5))
def test_packing_lists(sequences, types):
    try:
        batch = pack(sequences, types)
    except (ValueError, TypeError, OverflowError):
        return
    assert batch.num_tokens == sum(map(len, sequences))
    assert batch.lengths.tolist() == [len(s) for s in sequences]
    assert batch.input_ids.tolist() == [int(i) for s in sequences for i in s]


shapes = st.lists(st.integers(0, 5), max_size=4)
dtypes = st.sampled_from([torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.float16, torch.int8])


@st.composite
def tensors(draw):
    shape, dtype = draw(shapes), draw(dtypes)
    array = np.array(draw(st.lists(st.integers(-2, 100), min_size=int(np.prod(shape)), max_size=int(np.prod(shape)))))
    return torch.tensor(array.reshape(shape)).to(dtype)


@fuzz
@example(torch.zeros(0, 3, dtype=torch.int64), None, None, None)
@example(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0), None, None)
@given(tensors(), st.none() | tensors(), st.none() | tensors(), st.none() | tensors())
def test_packing_tensors(input_ids, mask, types, positions):
    try:
        batch, padding = pack_padded(input_ids, mask, types, positions)
    except ValueError:
        return
    assert batch.num_tokens == padding.indices.shape[0] == int(batch.cu_seqlens[-1])
    assert torch.equal(padding.pack(input_ids).long(), batch.input_ids)


@fuzz
@example([2**40], 1, 1)
@example([0, 0], 1, None)
@given(st.lists(st.integers(-2, 2**40), max_size=20), st.integers(-1, 2**40), st.none() | st.integers(-1, 5))
def test_token_batches(lengths, budget, most):
    try:
        batches = token_batches(lengths, budget, most)
    except ValueError:
        assert budget < 1 or (most is not None and most < 1) or min(lengths, default=0) < 0
        return
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= budget
        assert most is None or len(batch) <= most
