"""The CPU engine sees whatever changes a model, and steps aside where it cannot honour a call."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from engine_models import MODELS, SMALL, assert_engine_within_budget, batch_of, build, engine_run, plan_of

import fastbert
from fastbert import native, use_backend
from fastbert.engine import choice, cpu, use_engine
from fastbert.models.activations import activation
from fastbert.models.encoder import EncoderModel
from fastbert.models.quantize import quantize_int8

if not native.available():
    pytest.skip("the native extension was not built", allow_module_level=True)


# Freshness: whatever changes a weight, a setting or a module is seen by the next call.


def _optimizer_step(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    with torch.enable_grad():
        model.forward_packed(batch_of(model)).square().sum().backward()
    optimizer.step()


def _load_state_dict(model):
    model.load_state_dict(build("bert", seed=1).state_dict())


def _assign_state_dict(model):
    model.load_state_dict(build("bert", seed=1).state_dict(), assign=True)


def _round_trip_through_bfloat16(model):
    model.to(torch.bfloat16).to(torch.float32)


def _embedding_row(model):
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[5:].mul_(2)


def _new_table(model):
    model.set_input_embeddings(torch.nn.Embedding(97, 48))


def _new_activation(model):
    for layer in model.encoder.layer:
        layer.feed_forward.act = activation("relu")


def _new_eps(model):
    model.encoder.layer[1].output_LayerNorm.eps = 1.0


def _layer_dropped(model):
    del model.encoder.layer[0]


def _data_pointer(model):
    model.encoder.layer[0].attention.dense.weight.data = torch.randn(48, 48)


def _written_behind_torch(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.1)


@pytest.mark.parametrize(
    "change",
    [
        _written_behind_torch,
        _optimizer_step,
        _load_state_dict,
        _assign_state_dict,
        _round_trip_through_bfloat16,
        _embedding_row,
        _new_table,
        _new_activation,
        _new_eps,
        _layer_dropped,
        _data_pointer,
    ],
)
def test_a_change_is_seen(change, monkeypatch):
    model, stale = build("bert"), build("bert")
    before = engine_run(model, batch_of(model))
    change(model)
    model.eval()
    assert not torch.equal(engine_run(model, batch_of(model)), before)
    assert_engine_within_budget(model, batch_of(model))
    if change not in (_embedding_row, _new_table):  # tables of embeddings are read where they lie
        engine_run(stale, batch_of(stale))
        monkeypatch.setattr(cpu.Engine, "is_fresh", lambda self, model: True)
        change(stale)
        stale.eval()
        with pytest.raises(AssertionError, match="budget"):
            assert_engine_within_budget(stale, batch_of(stale))


def test_a_pinned_model_is_computed_as_it_was():
    model, other = build("bert"), build("bert")
    engine = choice.pin(model)
    before = engine_run(model, batch_of(model))
    for changed in (model, other):
        _new_eps(changed)
        changed.eval()
    assert torch.equal(engine_run(model, batch_of(model)), before)
    assert torch.equal(engine.run(batch_of(model)), before)
    assert not torch.equal(engine_run(other, batch_of(other)), before), "nobody pinned this one"
    with use_engine("off"):
        assert choice.pin(build("bert")) is None


def test_dtypes_come_and_go():
    model = build("bert")
    first = engine_run(model, batch_of(model))
    assert engine_run(model.bfloat16(), batch_of(model)).dtype == torch.bfloat16
    rounded = engine_run(model.float(), batch_of(model))
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, first)
    assert_engine_within_budget(model, batch_of(model))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_packed_once(name):
    model = build(name)
    engine_run(model, batch_of(model))
    engine = choice._compiled[model]
    engine_run(model, batch_of(model))
    assert choice._compiled[model] is engine


def test_tied_weights_are_seen():
    torch.manual_seed(0)
    masked = fastbert.BertForMaskedLM(fastbert.BertConfig(**SMALL)).eval()
    before = engine_run(masked.bert, batch_of(masked.bert))
    with torch.no_grad():
        masked.get_output_embeddings().weight.add_(0.5)  # the table of words by its other name
        masked.get_output_embeddings().weight[:, ::2].mul_(3)
    assert not torch.equal(engine_run(masked.bert, batch_of(masked.bert)), before)


def test_copies_and_collected_models_leave_nothing():
    model = build("bert")
    engine_run(model, batch_of(model))
    held = len(choice._compiled)
    twin = copy.deepcopy(model)
    assert len(choice._compiled) == held
    del model
    assert len(choice._compiled) == held - 1
    engine_run(twin, batch_of(twin))


# Stepping aside: a call that the engine cannot honour runs as ops, and says so.


class _Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _hook(model):
    model.encoder.layer[1].register_forward_hook(lambda module, args, out: out * 0)


def _forward_on_the_instance(model):
    model.encoder.layer[1].feed_forward.forward = lambda x: (x * 0, None)


def _another_linear(model):
    model.encoder.layer[1].attention.dense = _Doubled(48, 48)


def _inner_training(model):
    model.encoder.layer[1].attention.train()


def _mixed(model):
    model.encoder.layer[1].to(torch.bfloat16)


def _other_activation(model):
    for layer in model.encoder.layer:
        layer.feed_forward.act = torch.nn.functional.mish


def _half_quantised(model):
    twin = quantize_int8(copy.deepcopy(model))
    model.encoder.layer[1].feed_forward = twin.encoder.layer[1].feed_forward


def _layers_differ(model):
    model.encoder.layer[1].attention.num_heads = 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_hook, "layer.1 (Layer) has a forward hook"),
        (_forward_on_the_instance, "layer.1.feed_forward (FeedForward) has a forward of its own"),
        (_another_linear, "layer.1.attention.dense (_Doubled) is not a module that the engine knows"),
        (_inner_training, "layer.1.attention (SelfAttention) is in training mode"),
        (_mixed, "torch.bfloat16 and torch.float32"),
        (_other_activation, "has an activation that the engine lacks"),
        (_layers_differ, "the layers differ"),
        (lambda model: model.double(), "torch.float64"),
        (_half_quantised, "some of its linear layers have 8-bit weights and some have not"),
        (lambda model: quantize_int8(model.bfloat16()), "torch.bfloat16 and torch.float32"),
        (lambda model: model.train(), "training mode"),
    ],
)
def test_the_engine_steps_aside(change, words):
    model = build("bert")
    engine_run(model, batch_of(model))
    change(model)
    with torch.no_grad():
        plan = model.execution_plan()
        assert plan.startswith("ops: ")
        assert words in plan
        if change is _mixed:
            return
        out = model.forward_packed(batch_of(model))
        with use_engine("off"):
            expected = model.forward_packed(batch_of(model))
    if not model.training and change is not _inner_training:
        assert torch.equal(out, expected)


def test_a_model_past_the_engine_is_warned_about_once():
    model = build("bert")
    _other_activation(model)
    choice._warn.cache_clear()
    slower = pytest.warns(UserWarning, match=r"chain of ops, slower than on an engine: .*has an activation")
    with slower, torch.no_grad():
        model.forward_packed(batch_of(model))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        model.forward_packed(batch_of(model))
        with use_engine("off"):
            build("bert").forward_packed(batch_of(model))
    choice._warn.cache_clear()
    with warnings.catch_warnings(), use_engine("off"), torch.no_grad():
        warnings.simplefilter("error")  # who asks for ops is not told that they are slower
        model.forward_packed(batch_of(model))


def test_a_configuration_that_asks_for_more_is_in_the_plan():
    model = build("bert")
    assert "padded calls as ops" not in plan_of(model)
    for name in ("output_hidden_states", "output_attentions"):
        config = fastbert.BertConfig(**SMALL, **{name: True})
        assert plan_of(fastbert.BertModel(config).eval()).startswith("cpu engine: float32")
        assert plan_of(fastbert.BertModel(config).eval()).endswith(
            "; padded calls as ops: the configuration asks for more than the last layer"
        )


def test_circumstances_step_aside():
    model = build("bert")
    assert model.execution_plan().startswith("ops: autograd records")
    with torch.no_grad():
        with use_engine("off"):
            assert model.execution_plan() == 'ops: use_engine("off") is in force'
        with use_backend("native"):
            assert "'native' is forced" in model.execution_plan()
        with torch.autocast("cpu", torch.bfloat16):
            assert model.execution_plan() == "ops: autocast is on"
        handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
        assert "global forward hook" in model.execution_plan()
        handle.remove()
        assert model.execution_plan() == (
            f"cpu engine: float32, {native.isa()}, {torch.get_num_threads()} threads, 3 layers in "
            f"{model_megabytes(model):.1f} MB of panels"
        )
    with pytest.raises(ValueError, match="unknown mode 'on'; the modes are auto, off"), use_engine("on"):
        pass


def model_megabytes(model: EncoderModel) -> float:
    return cpu.compile(model).nbytes / 1e6


def test_an_engine_made_in_inference_mode_serves():
    with torch.inference_mode():
        model = build("bert")
        assert "made in inference_mode" in model.execution_plan()
        assert model.forward_packed(batch_of(model)).isfinite().all()


def test_what_is_asked_for_is_recorded():
    model = build("bert")
    ids = torch.randint(5, 97, (2, 9))
    with torch.no_grad():
        out = model(ids, output_hidden_states=True, output_attentions=True)
        plain = model(ids)
    assert len(out.hidden_states) == 4
    assert out.attentions[0].shape == (2, 4, 9, 9)
    torch.testing.assert_close(plain.last_hidden_state, out.last_hidden_state)
