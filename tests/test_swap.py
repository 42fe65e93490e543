"""`accelerate` on live transformers models: same numbers, same names, same objects, and what runs around them."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface

from fastbert.swap import (
    FastbertFallbackWarning,
    FastbertPaddingWarning,
    accelerate,
    accelerated,
    attach,
    encoders,
    restore,
)
from fastbert.testing import GRADIENT_FACTOR, assert_within_budget

pytestmark = [
    pytest.mark.filterwarnings("error::fastbert.swap.FastbertFallbackWarning"),
    pytest.mark.filterwarnings("ignore::fastbert.swap.FastbertPaddingWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small tensors do not gain from threads, and on a busy machine they lose much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SMALL = {
    "vocab_size": 97,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 40,
    "initializer_range": 0.1,  # Hugging Face's 0.02 hides a wrong GELU or eps
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "classifier_dropout": 0.0,
}
NARROW = SMALL | {"embedding_size": 16}
ALBERT = NARROW | {"num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2, "classifier_dropout_prob": 0.0}
DISTIL = {
    "vocab_size": 97,
    "dim": 24,
    "n_layers": 2,
    "n_heads": 3,
    "hidden_dim": 40,
    "max_position_embeddings": 40,
    "initializer_range": 0.1,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "qa_dropout": 0.0,
    "seq_classif_dropout": 0.0,
}
B, L = 5, 12


@dataclasses.dataclass(frozen=True)
class Family:
    """A row: the prefix of transformers' class names, a small configuration, heads."""

    name: str
    config: dict
    heads: tuple[str, ...]

    def __str__(self):
        return self.name

    def model(self, head: str = "Model", seed: int = 0, attention: str = "eager", **config):
        """A model in fp64 whose biases and norms are random: zeros and ones hide swapped ones."""
        torch.manual_seed(seed)
        kind = getattr(transformers, self.name + head)
        model = kind(kind.config_class(**(self.config | config), attn_implementation=attention)).double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0, 0.1)
                elif "norm" in name.lower():
                    parameter.normal_(1, 0.1)
        return model.eval()


COMMON = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
FAMILIES = [
    Family("Bert", SMALL, ("Model", *COMMON, "ForPreTraining", "ForMultipleChoice")),
    Family("Roberta", SMALL, ("Model", "ForMaskedLM", "ForSequenceClassification")),
    Family("XLMRoberta", SMALL, ("Model", "ForTokenClassification")),
    Family("Camembert", SMALL, ("Model", "ForMaskedLM")),
    Family("Electra", NARROW, ("Model", "ForPreTraining", "ForSequenceClassification")),
    Family("Albert", ALBERT, ("Model", "ForMaskedLM", "ForSequenceClassification")),
    Family("DistilBert", DISTIL, ("Model", *COMMON)),
    Family("MPNet", SMALL, ("Model", "ForMaskedLM", "ForSequenceClassification")),
]
BERT, MPNET = FAMILIES[0], FAMILIES[-1]
families = pytest.mark.parametrize("family", FAMILIES, ids=str)


def mask_of(family: Family) -> torch.Tensor:
    """Right padding, a hole (not for MPNet, which counts it), one token, no padding; about half of the tokens."""
    mask = torch.zeros(B, L, dtype=torch.long)
    for row, length in enumerate((6, 3, 1, L, 8)):
        mask[row, :length] = 1
    if family is not MPNET:
        mask[4, 2:4] = 0
    return mask


def inputs_for(family: Family, head: str) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    ids, mask = torch.randint(5, 97, (B, L), generator=g), mask_of(family)
    labels = torch.randint(0, 2, (B, L), generator=g).masked_fill(mask == 0, -100)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if head == "ForMultipleChoice":
        choices = {k: v[:4].view(2, 2, L) for k, v in inputs.items()}
        return choices | {"labels": torch.tensor([0, 1])}
    if head == "ForPreTraining" and family.name == "Electra":
        return inputs | {"labels": labels.clamp(min=0)}
    if head == "ForPreTraining":
        return inputs | {"labels": labels, "next_sentence_label": torch.tensor([0, 1, 1, 0, 1])}
    if head in ("ForMaskedLM", "ForTokenClassification"):
        return inputs | {"labels": labels}
    if head == "ForSequenceClassification":
        return inputs | {"labels": torch.tensor([0, 1, 1, 0, 1])}
    return inputs


def real_values(outputs, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """All outputs, without padding where they have tokens: Hugging Face's values there mean nothing."""
    values = {}
    for name, value in outputs.items():
        for i, v in enumerate(value if isinstance(value, tuple) else (value,)):
            values[f"{name}[{i}]"] = v[mask.bool()] if v.shape[:2] == mask.shape else v
    return values


def loss_of(outputs, mask: torch.Tensor) -> torch.Tensor:
    if outputs.get("loss") is not None:
        return outputs["loss"]
    weights = torch.Generator().manual_seed(1)
    return sum(
        (v * torch.randn(v.shape, generator=weights, dtype=v.dtype)).sum() for v in real_values(outputs, mask).values()
    )


def run(model, inputs) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Outputs and the gradients of all parameters."""
    model.zero_grad()
    mask = inputs["attention_mask"]
    mask = mask.view(-1, mask.shape[-1])
    outputs = model(**inputs)
    loss_of(outputs, mask).backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    return {k: v.detach() for k, v in real_values(outputs, mask).items()}, grads


def assert_equal_to_rounding(ours: dict, theirs: dict) -> None:
    """fp64 wiring: 1e-12 of the largest value."""
    assert ours.keys() == theirs.keys()
    largest = max(v.abs().max().item() for v in theirs.values())
    for name, value in theirs.items():
        assert ours[name].shape == value.shape, name
        error = (ours[name] - value).abs().max().item()
        assert error <= 1e-12 * largest, f"{name}: error {error:.2e}, largest value {largest:.2e}"


def assert_parity(model, inputs) -> None:
    theirs = run(model, inputs)
    with accelerated(model):
        ours = run(model, inputs)
    for a, b in zip(ours, theirs, strict=True):
        assert_equal_to_rounding(a, b)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(("family", "head"), [(f, h) for f in FAMILIES for h in f.heads], ids=lambda x: str(x))
def test_outputs_and_gradients_equal_hf(family, head, mode):
    assert_parity(family.model(head).train(mode == "train"), inputs_for(family, head))


@pytest.mark.parametrize("act", ["gelu_new", "gelu_fast", "relu"])
def test_activations(act):
    assert_parity(BERT.model(hidden_act=act), inputs_for(BERT, "Model"))


def test_feed_forward_in_chunks_is_the_same_number():
    assert_parity(BERT.model(chunk_size_feed_forward=2), inputs_for(BERT, "Model"))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@families
def test_arguments(family, attention):
    """Left padding, embeddings for ids, positions, every form of a mask that Hugging Face reads right, no mask."""
    if family is MPNET and attention == "sdpa":
        return  # transformers refuses it: MPNet is eager only
    model = family.model(attention=attention)
    ids, mask = torch.randint(5, 97, (B, L)), mask_of(family).flip(1)
    additive = (1.0 - mask.double()) * torch.finfo(torch.float64).min
    positions = torch.arange(L).expand(B, L) + 2
    embeds = torch.randn(B, L, family.config.get("embedding_size", 24)).double()
    calls = [
        ((ids, mask), {}),
        ((ids,), {"attention_mask": mask.bool(), "position_ids": positions}),
        ((), {"inputs_embeds": embeds, "attention_mask": mask.double()}),
        ((ids, mask.bool()[:, None, None] if attention == "sdpa" else additive[:, None, None]), {}),
        ((ids, additive[:, None, None].expand(B, 1, L, L)), {}),
        ((ids,), {}),
    ]
    for i, (args, kwargs) in enumerate(calls):
        keep = torch.ones(B, L).bool() if i == len(calls) - 1 else mask.bool()
        with torch.no_grad():
            theirs = model(*args, **kwargs).last_hidden_state
            with accelerated(model):
                ours = model(*args, **kwargs).last_hidden_state
        assert_equal_to_rounding({"kept": ours[keep]}, {"kept": theirs[keep]})
        assert (ours[~keep] == 0).all()


@families
def test_hidden_states_and_tuples(family):
    model, mask = family.model(), mask_of(family)
    inputs = inputs_for(family, "Model")
    with torch.no_grad():
        theirs = model(**inputs, output_hidden_states=True)
        tuples = model(**inputs, output_hidden_states=True, return_dict=False)
        accelerate(model)
        before = model(**inputs).last_hidden_state
        ours = model(**inputs, output_hidden_states=True)
        ours_tuples = model(**inputs, output_hidden_states=True, return_dict=False)
        after = model(**inputs).last_hidden_state
    assert_equal_to_rounding(real_values(ours, mask), real_values(theirs, mask))
    assert [h.shape for h in ours.hidden_states] == [h.shape for h in theirs.hidden_states]
    assert len(ours.hidden_states) > 2
    assert [type(t) for t in ours_tuples] == [type(t) for t in tuples]
    torch.testing.assert_close(before, after, rtol=0, atol=1e-13)


def test_selected_hidden_states():
    model, inputs, mask = accelerate(BERT.model()), inputs_for(BERT, "Model"), mask_of(BERT)
    every = model(**inputs, output_hidden_states=True).hidden_states
    some = model(**inputs, output_hidden_states=[0, -1]).hidden_states
    assert some[1] is None
    for i in (0, 2):
        assert torch.equal(some[i][mask.bool()], every[i][mask.bool()])


def test_a_row_without_tokens_is_zero_and_an_empty_batch_works():
    model, mask = accelerate(BERT.model()), mask_of(BERT)
    mask[2] = 0
    out = model(torch.randint(5, 97, (B, L)), mask).last_hidden_state
    assert torch.isfinite(out).all()
    assert (out[2] == 0).all()
    assert (model(torch.randint(5, 97, (B, L)), torch.zeros_like(mask)).last_hidden_state == 0).all()


# What stays


def anatomy(model) -> dict:
    """Everything about the modules of a model that is not a tensor's value."""
    return {
        name: (
            type(m),
            {k: id(v) if isinstance(v, torch.Tensor) else str(v) for k, v in vars(m).items() if k != "_modules"},
            {k: id(v) for k, v in m._parameters.items()},
        )
        for name, m in model.named_modules()
    }


@families
def test_restore_is_exact(family):
    model, inputs = family.model(), inputs_for(family, "Model")
    before, expected = anatomy(model), model(**inputs).last_hidden_state
    keys, objects = list(model.state_dict()), [id(p) for p in model.parameters()]
    accelerate(accelerate(model))
    assert anatomy(model) != before
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == objects
    model(**inputs)
    assert restore(restore(model)) is model
    assert anatomy(model) == before
    assert torch.equal(model(**inputs).last_hidden_state, expected)


def test_nested_blocks_keep_an_accelerated_model():
    model = accelerate(BERT.model())
    with accelerated(model):
        pass
    assert isinstance(model.encoder, encoders.BertEncoder)
    with pytest.raises(RuntimeError, match="inside"), accelerated(restore(model)):
        raise RuntimeError("inside")
    assert type(model.encoder) is transformers.models.bert.modeling_bert.BertEncoder


def test_saved_files_are_hfs(tmp_path):
    model = BERT.model("ForSequenceClassification")
    model.save_pretrained(tmp_path / "theirs")
    accelerate(model).save_pretrained(tmp_path / "ours")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "ours")
    assert set(again.state_dict()) == set(load_file(tmp_path / "ours" / "model.safetensors"))


def test_copies_and_pickles_stay_accelerated():
    model, inputs = accelerate(BERT.model()), inputs_for(BERT, "Model")
    expected = model(**inputs).last_hidden_state
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other.encoder, encoders.BertEncoder)
        assert torch.equal(other(**inputs).last_hidden_state, expected)
        other.encoder.layer[0].output.dense.weight.data.zero_()
        assert not torch.equal(other(**inputs).last_hidden_state, expected)
    assert torch.equal(model(**inputs).last_hidden_state, expected)


def test_optimizer_goes_on_through_accelerate_and_restore():
    inputs, losses = inputs_for(BERT, "ForMaskedLM"), []
    for swap in (False, True):
        model = BERT.model("ForMaskedLM").train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(6):
            if swap and step == 2:
                accelerate(model)
            if swap and step == 4:
                restore(model)
            loss = model(**inputs).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:6] == pytest.approx(losses[6:], rel=1e-10)
    assert losses[5] < losses[0]


def test_hooks_on_outputs_see_padded_tensors():
    model, inputs, seen = accelerate(BERT.model("ForTokenClassification")), inputs_for(BERT, "Model"), []
    for module in (model.bert, model.bert.encoder, model.bert.encoder.layer[1], model.classifier):
        module.register_forward_hook(lambda m, i, o: seen.append((o if torch.is_tensor(o) else o[0]).shape))
    model.bert.encoder.layer[0].register_forward_pre_hook(lambda m, i: seen.append(i[0].shape))
    model(**inputs)
    assert [tuple(s) for s in seen] == [(B, L, 24)] * 4 + [(B, L, 2)]


# Where the speed comes from


class CountRows(TorchDispatchMode):
    """Rows that reach matrix products with a weight, and layer norms."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name in ("aten::addmm", "aten::mm", "aten::linear"):  # the last under inference_mode
            self.linear.append(args[1 if name == "aten::addmm" else 0].shape[:-1].numel())
        if name == "aten::native_layer_norm":
            self.norm.append(args[0].shape[:-1].numel())
        return func(*args, **(kwargs or {}))


@families
def test_only_tokens_reach_the_layers(family):
    model, mask = accelerate(family.model()), torch.zeros(B, L, dtype=torch.long)
    mask[:, : L // 2] = 1
    with torch.no_grad(), CountRows() as count:
        model(torch.randint(5, 97, (B, L)), mask)
    layers = sum(isinstance(m, attach.PackedLayer) for m in model.modules())
    layers = 4 * 2 if family.name == "Albert" else layers  # its layers run more than once
    assert count.linear.count(B * L // 2) >= 4 * layers
    assert set(count.linear) <= {B * L // 2, B} | ({B * L} if family.name == "Electra" else set())
    assert count.norm.count(B * L // 2) == 2 * layers
    assert count.norm.count(B * L) == 1  # the embeddings stay Hugging Face's


# What packing cannot honour


def assert_falls_back(model, match: str, *args, **kwargs):
    """The call warns, and gives what Hugging Face gives."""
    accelerate(model)
    with pytest.warns(FastbertFallbackWarning, match=match):
        ours = model(*args, **kwargs)
    theirs = restore(model)(*args, **kwargs)
    assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)
    return ours, theirs


@families
def test_attentions_are_hfs(family):
    inputs = inputs_for(family, "Model")
    ours, theirs = assert_falls_back(family.model(), "output_attentions", **inputs, output_attentions=True)
    assert len(ours.attentions) > 0
    assert all(torch.equal(a, b) for a, b in zip(ours.attentions, theirs.attentions, strict=True))
    model = accelerate(family.model(output_attentions=True))
    with pytest.warns(FastbertFallbackWarning, match="output_attentions"):
        model(**inputs)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_per_query(attention):
    ids = torch.randint(5, 97, (B, L))
    causal = torch.full((L, L), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1).expand(B, 1, L, L)
    assert_falls_back(BERT.model(attention=attention), "see different keys", ids, causal)


def test_hooks_inside_layers():
    model, seen = BERT.model(), []
    model.encoder.layer[1].output.dense.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    assert_falls_back(model, "hook inside a layer, on Linear", **inputs_for(BERT, "Model"))
    assert seen == [(B, L, 24)] * 2


def test_patched_modules():
    model = BERT.model()
    part = model.encoder.layer[0].attention.self
    part.forward = lambda x, *args, **kwargs: (torch.zeros_like(x), None)
    assert_falls_back(model, "forward of its own", **inputs_for(BERT, "Model"))
    model.encoder.layer[0].forward = lambda x, *args, **kwargs: x
    with pytest.raises(TypeError, match="not transformers' own layer"):
        accelerate(model)


def test_holes_in_mpnets_mask():
    mask = mask_of(MPNET)
    mask[3, 5] = 0
    assert_falls_back(MPNET.model(), "holes", torch.randint(5, 97, (B, L)), mask)


def test_causal_on_request():
    assert_falls_back(BERT.model(attention="sdpa"), "is_causal", **inputs_for(BERT, "Model"), is_causal=True)


def test_wrapped_parts_are_called():
    """Linears and norms of another class than torch's compute by themselves, on tokens."""

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Shifted(torch.nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) + 1

    model = BERT.model()
    for layer in model.encoder.layer:
        for linear in (layer.attention.self.query, layer.intermediate.dense):
            linear.__class__ = Doubled
        layer.output.LayerNorm.__class__ = Shifted
    assert_parity(model, inputs_for(BERT, "Model"))


def test_what_is_refused():
    with pytest.raises(TypeError, match="holds no encoder"):
        accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="is_decoder"):
        accelerate(BERT.model(is_decoder=True))

    class OwnLayer(transformers.models.bert.modeling_bert.BertLayer):
        pass

    model = BERT.model()
    model.encoder.layer[1].__class__ = OwnLayer
    before = anatomy(model)
    with pytest.raises(TypeError, match="OwnLayer"):
        accelerate(model)
    assert anatomy(model) == before


# The traps of transformers' own ways to run packed or with another attention


def test_trap_packed_rows_do_not_see_one_another():
    """Fact 1: with eager or sdpa transformers ignores the bounds of packed sequences without a word."""
    model, lengths = BERT.model(attention="sdpa"), [5, 1, 6]
    ids = torch.randint(5, 97, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    bounds = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    packed = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 6, "max_length_k": 6}
    alone = torch.cat([model(i).last_hidden_state[0] for i in ids.split(lengths, dim=1)])
    contaminated = model(ids, position_ids=positions, **packed).last_hidden_state[0]
    assert (contaminated - alone).abs().max() > 1e-3  # the trap itself: else this test shows nothing
    accelerate(model)
    assert_equal_to_rounding(
        {"packed": model(ids, position_ids=positions, **packed).last_hidden_state[0]}, {"packed": alone}
    )
    with pytest.raises(ValueError, match="start again"):
        model(ids, position_ids=positions)
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, position_ids=positions, output_attentions=True, **packed)
    with pytest.raises(ValueError, match="one row"):
        model(ids.view(2, 6), **packed)


def test_trap_attention_registered_without_its_mask():
    """Fact 2: a name that only one registry knows loses the padding mask."""

    def attend(module, query, key, value, mask, **kwargs):
        seen.append(mask)
        return torch.zeros_like(query).transpose(1, 2), None

    seen = []
    AttentionInterface.register("half_registered", attend)
    model, inputs = BERT.model(), inputs_for(BERT, "Model")
    model.set_attn_implementation("half_registered")
    model(**inputs)
    assert seen == [None, None]  # the trap itself
    with accelerated(model), pytest.raises(ValueError, match="AttentionMaskInterface"):
        model(**inputs)
    AttentionMaskInterface.register("half_registered", lambda attention_mask, **kwargs: attention_mask)
    assert_falls_back(model, "half_registered", **inputs)
    assert seen[-1].dtype == torch.bool


def test_mutant_that_drops_the_mask(monkeypatch):
    monkeypatch.setattr(encoders, "keep_mask", lambda mask, shape, device: torch.ones(shape, dtype=torch.bool))
    for family in FAMILIES:
        with pytest.raises(AssertionError, match="error"):
            assert_parity(family.model(), inputs_for(family, "Model"))


# What runs around a model


@families
def test_dropout_sites_are_hfs(family):
    """Each dropout module of the layers changes the output in training exactly where it does in Hugging Face's code."""
    model, inputs = family.model().train(), inputs_for(family, "Model")
    layers = model.transformer if family.name == "DistilBert" else model.encoder
    sites = [(name, m) for name, m in layers.named_modules() if isinstance(m, torch.nn.Dropout)]
    assert len(sites) >= 4

    def active(name, dropout):
        torch.manual_seed(0)
        before = model(**inputs).last_hidden_state
        dropout.p = 0.5
        after, again = model(**inputs).last_hidden_state, model(**inputs).last_hidden_state
        torch.manual_seed(0)
        first = model(**inputs).last_hidden_state
        torch.manual_seed(0)
        assert torch.equal(model(**inputs).last_hidden_state, first), f"{name} ignores the seed"
        assert torch.equal(model.eval()(**inputs).last_hidden_state, before), f"{name} is active in eval"
        model.train()
        dropout.p = 0.0
        return not torch.equal(after, before) and not torch.equal(after, again)

    theirs = {name: active(name, m) for name, m in sites}
    accelerate(model)
    assert {name: active(name, m) for name, m in sites} == theirs
    assert any(theirs.values())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    inputs, grads, counts = inputs_for(BERT, "ForMaskedLM"), [], []
    for checkpointing in (False, True):
        model = accelerate(BERT.model("ForMaskedLM", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1))
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(5)
        with CountRows() as count:
            loss = model.train()(**inputs).loss
            forward = len(count.linear)
            loss.backward()
        counts.append((forward, len(count.linear) - forward))
        grads.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    (forward, backward), (same_forward, more) = counts
    assert forward == same_forward
    assert more == backward + 4 * 2  # the linears of each layer a second time
    assert_equal_to_rounding(grads[1], grads[0])


def test_autocast_within_budget():
    inputs = inputs_for(BERT, "ForSequenceClassification")
    model = BERT.model("ForSequenceClassification").float()
    exact = run(copy.deepcopy(model).double(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        same = run(model, inputs)
        ours = run(accelerate(model), inputs)
    assert ours[0]["logits[0]"].dtype == torch.bfloat16
    assert_within_budget(ours[0]["logits[0]"], same[0]["logits[0]"], exact[0]["logits[0]"], what="logits")

    def together(grads):
        return torch.cat([g.flatten() for g in grads.values()])

    assert_within_budget(together(ours[1]), together(same[1]), together(exact[1]), GRADIENT_FACTOR, "gradients")


def test_torch_compile():
    """One reason to break the graph: the encoder. The embeddings and the head around it are still compiled."""
    model, inputs = accelerate(BERT.model("ForSequenceClassification")), inputs_for(BERT, "ForSequenceClassification")
    expected = run(model, inputs)
    torch._dynamo.reset()
    breaks = torch._dynamo.utils.counters["graph_break"]
    breaks.clear()
    compiled = torch.compile(model, backend="eager")  # dynamo's part; inductor compiles only Hugging Face's
    for a, b in zip(run(compiled, inputs), expected, strict=True):
        assert_equal_to_rounding({k.removeprefix("_orig_mod."): v for k, v in a.items()}, b)
    assert len(breaks) == 1
    assert "PackedEncoder.forward" in next(iter(breaks))
    shorter = {k: v[:3] for k, v in inputs.items()}
    torch.testing.assert_close(compiled(**shorter).logits, expected[0]["logits[0]"][:3], rtol=0, atol=1e-12)
    torch._dynamo.reset()


def test_ddp(tmp_path):
    inputs = inputs_for(BERT, "ForMaskedLM")
    expected = run(BERT.model("ForMaskedLM"), inputs)[1]
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = torch.nn.parallel.DistributedDataParallel(accelerate(BERT.model("ForMaskedLM")))
        grads = run(model, inputs)[1]
        assert_equal_to_rounding({k.removeprefix("module."): v for k, v in grads.items()}, expected)
        restore(model)
        assert type(model.module.bert.encoder) is transformers.models.bert.modeling_bert.BertEncoder
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("order", ["accelerate first", "peft first"])
def test_peft_lora(order):
    from peft import LoraConfig, get_peft_model

    def lora(model):
        torch.manual_seed(2)
        config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], init_lora_weights=False)
        return get_peft_model(model, config).double()

    inputs = inputs_for(BERT, "ForSequenceClassification")
    theirs = run(lora(BERT.model("ForSequenceClassification")), inputs)
    model = BERT.model("ForSequenceClassification")
    model = lora(accelerate(model)) if order == "accelerate first" else accelerate(lora(model))
    ours = run(model, inputs)
    for a, b in zip(ours, theirs, strict=True):
        assert_equal_to_rounding(a, b)
    assert any("lora_A" in name for name in ours[1])
    merged = model.merge_and_unload()
    assert_equal_to_rounding(run(merged, inputs)[0], theirs[0])


def test_trainer_follows_hf_step_by_step(tmp_path):
    g = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": torch.randint(5, 97, (n,), generator=g).tolist(), "labels": n % 2}
        for n in (3, 9, 4, 7, 1, 12, 5, 8) * 2
    ]

    def collate(batch):
        longest = max(len(r["input_ids"]) for r in batch)
        ids = torch.tensor([r["input_ids"] + [0] * (longest - len(r["input_ids"])) for r in batch])
        return {
            "input_ids": ids,
            "attention_mask": (ids != 0).long(),
            "labels": torch.tensor([r["labels"] for r in batch]),
        }

    curves = []
    for swap in (False, True):
        model = BERT.model("ForSequenceClassification")
        arguments = transformers.TrainingArguments(
            tmp_path / str(swap), max_steps=6, per_device_train_batch_size=4, learning_rate=5e-3, logging_steps=1,
            report_to=[], save_strategy="no", use_cpu=True, seed=1, disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(
            accelerate(model) if swap else model, arguments, train_dataset=rows, data_collator=collate
        )
        trainer.train()
        curves.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert len(curves[0]) == 6
    assert len(set(curves[0])) > 3
    assert curves[1] == pytest.approx(curves[0], rel=1e-9)


TEXTS = ["a short one", "", "Berlin is the capital of Germany, " * 6, "naïve café", "two words", "x " * 40]


def test_sentence_transformer(minilm):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm), device="cpu")
    theirs = model.encode(TEXTS, convert_to_tensor=True)
    with accelerated(model), CountRows() as count:
        ours = model.encode(TEXTS, convert_to_tensor=True, batch_size=len(TEXTS))
    assert (ours - theirs).abs().max().item() <= 2e-6
    tokens = model.preprocess(TEXTS)["attention_mask"]
    assert set(count.linear) - {len(TEXTS)} == {int(tokens.sum())}  # the pooler sees one row a text


def test_cross_encoder(minilm, tmp_path):
    from sentence_transformers import CrossEncoder

    config = SMALL | {"vocab_size": 30522, "max_position_embeddings": 128, "num_labels": 1}
    Family("Bert", config, ()).model("ForSequenceClassification").float().save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(minilm).save_pretrained(tmp_path)
    model = CrossEncoder(str(tmp_path), device="cpu")
    pairs = [("where is Berlin?", text) for text in TEXTS]
    theirs = model.predict(pairs, convert_to_tensor=True)
    with accelerated(model):
        ours = model.predict(pairs, convert_to_tensor=True)
    assert (ours - theirs).abs().max().item() <= 2e-6
    assert theirs.std() > 1e-3


def test_transformers_is_imported_only_when_asked_for():
    code = "import sys, fastbert; assert 'transformers' not in sys.modules; import fastbert.packing, fastbert.models;"
    code += "assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_question_answering_says_what_changes():
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    with pytest.warns(FastbertPaddingWarning, match="softmax over padding"):
        accelerate(transformers.BertForQuestionAnswering(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerate(transformers.BertForTokenClassification(config))
