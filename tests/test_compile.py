"""torch.compile: every op is a node of the graph, and a model traced whole computes what it computes uncompiled."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastbert
from fastbert import native
from fastbert.models import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
)
from fastbert.models.quantize import quantize_float8, quantize_int8
from fastbert.ops import registered
from fastbert.ops.int8_linear import quantize_rows
from fastbert.packing import pack
from fastbert.testing import CASES, PUBLIC, forward_backward

pytestmark = pytest.mark.skipif(not native.available(), reason="the native extension was not built")

SMALL = {"vocab_size": 60, "num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32}
FAMILIES = {
    BertModel: BertConfig(**SMALL),
    RobertaModel: RobertaConfig(**SMALL),
    AlbertModel: AlbertConfig(**SMALL, embedding_size=8),
    DistilBertModel: DistilBertConfig(vocab_size=60, n_heads=2, n_layers=2, dim=16, hidden_dim=32),
    ElectraModel: ElectraConfig(**SMALL, embedding_size=8),
    MPNetModel: MPNetConfig(**SMALL),
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function):
    """Traced by dynamo and by autograd's tracer, without a break; inductor's code generation is torch's own."""
    return torch.compile(function, backend="aot_eager", fullgraph=True)


class Nodes(TorchDispatchMode):
    """Records calls of the registered ops."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastbert":
            self.calls[func] = args
        return func(*args, **(kwargs or {}))


# Only a kernel is a node: the reference of attention looks at lengths.
NODES = CASES if native.available() else []


@pytest.mark.parametrize("case", NODES, ids=str)
def test_ops_are_nodes(case):
    """The compiled op gives the bits of the eager one, forward and backward; torch's own checks pass for its nodes."""
    inputs = case.inputs(torch.float32)
    eager = forward_backward(PUBLIC[case.op], inputs)
    for key, value in forward_backward(compiled(PUBLIC[case.op]), inputs).items():
        torch.testing.assert_close(value, eager[key], rtol=0, atol=0, equal_nan=True)
    with Nodes() as nodes:
        forward_backward(lambda **kw: _through(registered, case.op, kw), inputs)
    assert {str(f).split(".")[1] for f in nodes.calls} == {f"{case.op}_fwd", f"{case.op}_bwd"}
    for func, args in nodes.calls.items():
        args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        torch.library.opcheck(func, args, test_utils=("test_schema", "test_faketensor"))


def _through(backend, op, inputs):
    """The public op, eager, but on the nodes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module(PUBLIC[op].__module__), "backend_for", lambda name, x: backend)
        return PUBLIC[op](**inputs)


def test_a_wrong_fake_is_found():
    """Mutant: a fake that promises another shape than the kernel gives."""
    wrong = torch.library.Library("fastbert_mutant", "DEF")
    wrong.define("gelu_fwd(Tensor x) -> Tensor")
    wrong.impl("gelu_fwd", lambda x: native.gelu_fwd(x, None, "none"), "CompositeExplicitAutograd")
    torch.library.register_fake("fastbert_mutant::gelu_fwd", lambda x: x.new_empty(x.shape[0] + 1), lib=wrong)
    with pytest.raises(torch.testing._internal.optests.generate_tests.OpCheckError):
        torch.library.opcheck(torch.ops.fastbert_mutant.gelu_fwd.default, (torch.randn(3, 8),))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_encoder_without_a_break(family, training):
    """Packed batches of several shapes, with gradients; without dropout the numbers are those of the plain call."""
    torch.manual_seed(0)
    config = FAMILIES[family].replace(
        **({"dropout": 0.0, "attention_dropout": 0.0} if family is DistilBertModel else
           {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    )  # fmt: skip
    model = family(config).train(training)
    run = compiled(model.forward_packed)
    for sequences in ([[1, 2, 3], [4, 5, 6, 7, 8]], [[9, 8], [7] * 11, [3, 2, 1]], [[5] * 6]):
        batch = pack(sequences, position_offset=model.position_offset)
        grads = []
        for forward in (run, model.forward_packed):
            model.zero_grad()
            hidden = forward(batch)
            (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
            grads.append([hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        assert len(grads[0]) == len(grads[1]) > 10
        for ours, plain in zip(*grads, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_each_run_of_a_compiled_step_drops_other_entries():
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SMALL, hidden_dropout_prob=0.5)).train()
    run, batch = compiled(model.forward_packed), pack([[1, 2, 3, 4, 5]])
    assert not torch.equal(run(batch), run(batch))
    torch.manual_seed(3)
    first = run(batch)
    torch.manual_seed(3)
    torch.testing.assert_close(run(batch), first, rtol=0, atol=0)


def test_padded_call_is_whole_where_dynamic_shapes_are_captured():
    """How many tokens are kept is data: dynamo captures that on request only, and breaks once otherwise."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SMALL, num_labels=3)).eval()
    ids, labels = torch.randint(1, 60, (3, 7)), torch.tensor([0, 1, 2])
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:] = 0
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        run = compiled(model)
        for kept in (mask, mask.flip(1), torch.ones_like(mask)):
            expected = model(ids, attention_mask=kept, labels=labels)
            found = run(ids, attention_mask=kept, labels=labels)
            torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()
    explained = torch._dynamo.explain(model)(ids, attention_mask=mask, labels=labels)
    assert {reason.reason.split("\n")[0] for reason in explained.break_reasons} == {"Dynamic shape operator"}


def test_inference_without_autograd_is_traced_too():
    model = BertForMaskedLM(BertConfig(**SMALL)).eval()
    batch = pack([[1, 2, 3], [4, 5]])
    with torch.no_grad():
        expected = model.base_model.forward_packed(batch)
        found = compiled(model.base_model.forward_packed)(batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_float8], ids=lambda f: f.__name__)
def test_a_quantised_model_is_traced_whole(quantize):
    torch.manual_seed(0)
    model, batch = quantize(BertModel(BertConfig(**SMALL)).eval()), pack([[1, 2, 3], [4, 5]])
    with torch.no_grad(), fastbert.use_engine("off"):
        torch.testing.assert_close(compiled(model.forward_packed)(batch), model.forward_packed(batch), rtol=0, atol=0)


def test_products_of_8_bits_are_nodes():
    weight, scale = quantize_rows(torch.randn(24, 16))
    torch.library.opcheck(registered.int8_linear_fwd.default, (torch.randn(5, 16), weight, scale, torch.randn(24)))
    x, eight = torch.empty(5, 16, device="meta"), torch.empty(24, 16, dtype=torch.float8_e4m3fn, device="meta")
    assert registered.float8_linear_fwd(x, eight, torch.empty(24, device="meta"), None).shape == (5, 24)


def test_a_graph_under_another_backend_says_so():
    with fastbert.use_backend("reference"), pytest.raises(NotImplementedError, match="compile it again"):
        registered.gelu_fwd(torch.randn(3, 8), None, "none")
