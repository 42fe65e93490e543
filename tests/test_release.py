"""Weights that are let go once packed: the same bits, less memory, and a clear error for whatever needs them."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import test_engine
import torch

import fastbert
from fastbert import Embedder, machine, native
from fastbert.engine import dtypes, use_engine
from fastbert.engine.release import Released
from fastbert.models.quantize import Int8Linear, quantize_int8
from fastbert.serve.served import Served

if not native.available():
    pytest.skip("the native extension was not built", allow_module_level=True)

TEXTS = ["a cat sat on the mat", "an entirely different sentence about trains", ""]


def released(name: str = "bert"):
    model = test_engine.build(name)
    fastbert.release_weights(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("name", ["bert", "electra", "albert-groups", "mpnet"])
def test_the_same_bits(name, dtype):
    model = test_engine.build(name)
    model = quantize_int8(model) if dtype == torch.int8 else model.to(dtype)
    batch = test_engine.batch_of(model)
    expected = test_engine.engine_run(model, batch)
    with torch.no_grad():
        plan = model.execution_plan()
        fastbert.release_weights(model)
        assert model.execution_plan() == plan
    assert torch.equal(test_engine.engine_run(model, batch), expected)
    linears = [m for m in model.encoder.modules() if isinstance(m, (torch.nn.Linear, Int8Linear))]
    assert all(isinstance(linear.weight, Released) for linear in linears)


NEEDS = {
    "ops": lambda m: m.forward_packed(test_engine.batch_of(m)),  # autograd records
    "hidden states": lambda m: m(torch.ones(1, 3, dtype=torch.long), output_hidden_states=True),
    "training": lambda m: m.train().forward_packed(test_engine.batch_of(m)),
    "state_dict": lambda m: m.state_dict(),
    "another dtype": lambda m: m.bfloat16(),
    "copy": copy.deepcopy,
    "quantising": quantize_int8,
}


@pytest.mark.parametrize("what", NEEDS)
def test_what_needs_the_weights_says_so(what):
    model = released()
    expected = test_engine.engine_run(model, test_engine.batch_of(model))
    with pytest.raises(RuntimeError, match=r"were let go when its engine had packed them \(keep_weights=False\)"):
        NEEDS[what](model)
    if what != "another dtype":  # which has changed the tables by then
        assert torch.equal(test_engine.engine_run(model.eval(), test_engine.batch_of(model)), expected)


def test_saving_leaves_no_half_folder(tmp_path):
    with pytest.raises(RuntimeError, match="were let go"):
        released().save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_a_change_that_is_undone_finds_the_panels_again():
    model = released()
    batch = test_engine.batch_of(model)
    expected = test_engine.engine_run(model, batch)
    handle = model.encoder.layer[1].register_forward_hook(lambda module, args, out: out * 0)
    assert "has let its weight go" in model.execution_plan()
    with pytest.raises(RuntimeError, match="were let go"):
        model.forward_packed(batch)
    handle.remove()
    assert torch.equal(test_engine.engine_run(model, batch), expected)
    with use_engine("off"), pytest.raises(RuntimeError, match="were let go"):
        model.forward_packed(batch)


@torch.no_grad()
def test_new_weights_are_packed():
    model, other = released(), test_engine.build("bert", seed=1)
    model.load_state_dict(other.state_dict(), assign=True)
    batch = test_engine.batch_of(model)
    assert torch.equal(test_engine.engine_run(model, batch), test_engine.engine_run(other, batch))


def test_a_model_that_needs_ops_keeps_its_weights():
    model = test_engine.build("bert").double()
    with pytest.raises(
        ValueError, match=r"cannot be let go \(keep_weights=False\), since ops need them: .*torch.float64"
    ):
        fastbert.release_weights(model)
    with pytest.raises(ValueError, match="training mode"):
        fastbert.release_weights(test_engine.build("bert").train())
    assert not any(isinstance(p, Released) for p in model.parameters())


def test_tied_weights_stay_tied():
    torch.manual_seed(0)
    masked = fastbert.BertForMaskedLM(fastbert.BertConfig(**test_engine.SMALL)).eval()
    ids = torch.randint(5, 97, (2, 9))
    with torch.no_grad():
        expected = masked(ids).logits
        fastbert.release_weights(masked)
        assert torch.equal(masked(ids).logits, expected)
    assert masked.get_output_embeddings().weight is masked.get_input_embeddings().weight


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_embedder_and_server(minilm, dtype):
    kept = Embedder.from_pretrained(minilm, dtype, device="cpu").encode(TEXTS)
    embedder = Embedder.from_pretrained(minilm, dtype, device="cpu", keep_weights=False)
    assert (embedder.encode(TEXTS) == kept).all()
    with pytest.raises((RuntimeError, ValueError), match=r"were let go|cannot be saved"):
        embedder.save_pretrained("anywhere")
    served = Served.load(minilm, dtype=dtype, device="cpu", keep_weights=False)
    assert served.fingerprint == Served.load(minilm, dtype=dtype, device="cpu").fingerprint
    assert (served.embedder.encode(TEXTS) == kept).all()


_MEMORY = """
import re, sys
import torch
import fastbert.embedder
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
torch.randn(300, 300) @ torch.randn(300, 300)
before = resident()
embedder = fastbert.Embedder.from_pretrained(sys.argv[1], sys.argv[2], device="cpu", keep_weights=sys.argv[3] == "True")
embedder.encode(["some words of a text " * 20] * 200)
with torch.no_grad():
    left = [t for t in (*embedder.model.parameters(), *embedder.model.buffers()) if not t.is_meta]
    for tensor in left:
        tensor.max()  # mapped or not, it is read
from fastbert.engine.choice import _compiled
print(resident() - before, _compiled[embedder.model].nbytes, sum(t.nbytes for t in left))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_resident_memory(minilm, dtype):
    resident = {}
    for keep in (True, False):
        command = [sys.executable, "-c", _MEMORY, str(minilm), dtype, str(keep)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        resident[keep], panels, left = map(int, done.stdout.split())
    limit = panels + left + 64 * 2**20
    assert resident[False] <= limit, (resident[False] / 2**20, panels / 2**20, left / 2**20)
    assert resident[False] < resident[True]
    if dtype == "float32":  # else the panels lie where weights of another dtype lay while they were made
        assert resident[True] > limit, "the limit would be kept without letting go"


# dtype="auto".


@pytest.mark.parametrize(
    ("isa", "vendor", "dtype", "reason"),
    [
        ("amx", "GenuineIntel", "bfloat16", "AMX multiplies it"),
        ("avx512bf16", "AuthenticAMD", "bfloat16", "twice the rate"),
        ("avx512bf16", "GenuineIntel", "float32", "this is GenuineIntel"),
        ("avx512bf16", "", "float32", "this is another CPU"),
        ("avx512vnni", "AuthenticAMD", "float32", "avx512vnni does not multiply bfloat16"),
        (None, "AuthenticAMD", "float32", "was not built"),
    ],
)
def test_auto_is_bfloat16_where_that_is_faster(isa, vendor, dtype, reason, monkeypatch, minilm):
    monkeypatch.setattr(native, "available", lambda: isa is not None)
    monkeypatch.setattr(native, "isa", lambda: isa)
    monkeypatch.setattr(machine, "cpu", lambda: machine.Cpu("x", vendor, (), 2, 2, None))
    cpu = torch.device("cpu")
    assert dtypes.auto_on_cpu()[0] == dtypes.resolve_dtype("auto", cpu) == dtype
    assert reason in dtypes.auto_on_cpu()[1]
    assert dtypes.resolve_dtype(None, cpu) == "float32"
    assert Embedder.from_pretrained(minilm, "auto", device="cpu").model.dtype == getattr(torch, dtype)
    assert Embedder.from_pretrained(minilm, device="cpu").model.dtype == torch.float32
