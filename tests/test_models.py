"""Every family against Hugging Face: hidden states within the error budget, same names, honest outputs."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from torch.utils import _pytree as pytree

import fastbert
from fastbert.models import encoder as encoder_module
from fastbert.models import mpnet
from fastbert.packing import pack, pack_padded
from fastbert.testing import assert_within_budget

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 40,
    "initializer_range": 0.1,  # Hugging Face's 0.02 hides a wrong GELU or eps
}
ROBERTA = SMALL | {"max_position_embeddings": 42, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1}
MPNET = SMALL | {"max_position_embeddings": 42, "layer_norm_eps": 1e-5, "pad_token_id": 1}
ALBERT = SMALL | {"embedding_size": 20}
DISTILBERT = {
    "vocab_size": 97,
    "dim": 48,
    "n_layers": 3,
    "n_heads": 4,
    "hidden_dim": 80,
    "max_position_embeddings": 40,
    "initializer_range": 0.1,
    "sinusoidal_pos_embds": True,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A row: our class and Hugging Face's, the configuration of a small model, may masks drop tokens between others."""

    name: str
    ours: type
    theirs: type
    config: dict
    holes: bool = True

    def __str__(self):
        return self.name


FAMILIES = [
    Family("bert", fastbert.BertModel, transformers.BertModel, SMALL),
    Family("bert-tanh", fastbert.BertModel, transformers.BertModel, SMALL | {"hidden_act": "gelu_new"}),
    Family(
        "bert-relu-odd", fastbert.BertModel, transformers.BertModel, SMALL | {"hidden_act": "relu", "hidden_size": 36}
    ),
    Family("roberta", fastbert.RobertaModel, transformers.RobertaModel, ROBERTA),
    Family("roberta-no-padding-ids", fastbert.RobertaModel, transformers.RobertaModel, SMALL),
    Family("xlm-roberta", fastbert.XLMRobertaModel, transformers.XLMRobertaModel, ROBERTA),
    Family("camembert", fastbert.CamembertModel, transformers.CamembertModel, ROBERTA),
    Family("distilbert", fastbert.DistilBertModel, transformers.DistilBertModel, DISTILBERT),
    Family("electra", fastbert.ElectraModel, transformers.ElectraModel, SMALL | {"embedding_size": 20}),
    Family("mpnet", fastbert.MPNetModel, transformers.MPNetModel, MPNET, holes=False),
    Family("albert", fastbert.AlbertModel, transformers.AlbertModel, ALBERT),
    Family(
        "albert-groups",
        fastbert.AlbertModel,
        transformers.AlbertModel,
        ALBERT | {"num_hidden_groups": 2, "inner_group_num": 2},
    ),
    Family("electra-square", fastbert.ElectraModel, transformers.ElectraModel, SMALL | {"embedding_size": 48}),
]
families = pytest.mark.parametrize("family", FAMILIES, ids=str)


def hf_model(family: Family, seed: int, attention: str = "eager", **config):
    torch.manual_seed(seed)
    model = family.theirs(family.theirs.config_class(**(family.config | config), attn_implementation=attention))
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # HF's zeros and ones hide swapped biases and norms
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif "LayerNorm" in name or "layer_norm" in name:
                parameter.normal_(1, 0.1)
    return model.eval()


def pair(family: Family, tmp_path, seed: int = 0, **config):
    theirs = hf_model(family, seed, **config)
    theirs.save_pretrained(tmp_path)
    return family.ours.from_pretrained(tmp_path), theirs


def ragged_inputs(vocab: int, seed: int = 0, length: int = 24) -> dict[str, torch.Tensor]:
    """Right padding, left padding, holes, one token, no padding, no token at all."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, vocab, (6, length), generator=g)
    mask = torch.zeros(6, length, dtype=torch.long)
    mask[0, : length // 2] = 1
    mask[1, length // 3 :] = 1
    mask[2] = torch.rand(length, generator=g) > 0.4
    mask[3, 0] = 1
    mask[4] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.randint(0, 2, ids.shape, generator=g)}


def inputs_of(family: Family, seed: int = 0) -> dict[str, torch.Tensor]:
    """`ragged_inputs`; a row that names its padding id has it at padding, and once more as a token that is kept."""
    inputs = ragged_inputs(family.config["vocab_size"], seed)
    if not family.holes:
        inputs["attention_mask"][2] = (torch.arange(24) - 12).abs() < 7  # padding on both sides
    if "pad_token_id" in family.config:
        inputs["input_ids"][inputs["attention_mask"] == 0] = family.config["pad_token_id"]
        inputs["input_ids"][4, 5] = family.config["pad_token_id"]
    if family.config.get("type_vocab_size", 2) == 1:
        del inputs["token_type_ids"]
    return inputs


def hidden_and_pooled(model, inputs) -> list[torch.Tensor]:
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
    kept = inputs["attention_mask"].bool()
    first = inputs["attention_mask"][:, 0].bool()  # HF pools column 0 even where it is padding
    pooled = [out.pooler_output[first]] if "pooler_output" in out else []
    return [h[kept] for h in out.hidden_states] + pooled


def assert_parity(ours, theirs, inputs, dtype: torch.dtype) -> None:
    same = hidden_and_pooled(theirs.to(dtype), inputs)
    exact = hidden_and_pooled(theirs.double(), inputs)
    for i, (a, b, c) in enumerate(zip(hidden_and_pooled(ours.to(dtype), inputs), same, exact, strict=True)):
        assert_within_budget(a, b, c, what=f"hidden state {i}")


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_hidden_states_within_budget(family, dtype, attention, seed, tmp_path):
    if attention == "sdpa" and not family.theirs._supports_sdpa:
        pytest.skip(f"Hugging Face computes {family} only eagerly")
    ours, theirs = pair(family, tmp_path, seed, attention=attention)
    theirs = theirs.to(dtype)  # both sides start from the same rounded weights
    assert_parity(ours, theirs, inputs_of(family, seed), dtype)


@families
def test_wiring_and_gradients_in_fp64(family, tmp_path):
    ours, theirs = pair(family, tmp_path)
    ours, theirs = ours.double(), theirs.double()
    inputs = inputs_of(family)
    kept = inputs["attention_mask"].bool()
    weight = torch.randn(*kept.shape, ours.config.hidden_size, generator=torch.Generator().manual_seed(1)).double()
    grads = []
    for model in (ours, theirs):
        out = model(**inputs)
        loss = (out.last_hidden_state * weight)[kept].sum()
        if "pooler_output" in out:
            loss = loss + out.pooler_output[kept[:, 0]].pow(2).sum()
        loss.backward()
        state = {k: p.grad for k, p in model.named_parameters()}
        grads.append((loss.item(), state))
    (a, mine), (b, reference) = grads
    assert abs(a - b) <= 1e-12 * abs(b)
    family.ours(ours.config)  # the names below come from a state dict of gradients
    for name, parameter in ours.named_parameters():
        parameter.data = mine[name] if mine[name] is not None else torch.zeros_like(parameter)
    largest = max(g.abs().max().item() for g in reference.values() if g is not None)
    for name, grad in ours.state_dict().items():
        expected = reference[name] if reference[name] is not None else torch.zeros_like(grad)
        assert (grad - expected).abs().max().item() <= 1e-12 * largest, name


def test_bert_base_random_weights_within_budget(tmp_path):
    base = Family("bert-base", fastbert.BertModel, transformers.BertModel, {"initializer_range": 0.1})
    ours, theirs = pair(base, tmp_path)
    assert_parity(ours, theirs, ragged_inputs(30522), torch.float32)


def test_minilm_within_budget(minilm):
    ours = fastbert.BertModel.from_pretrained(minilm)
    for attention in ("eager", "sdpa"):
        theirs = transformers.BertModel.from_pretrained(minilm, attn_implementation=attention)
        assert_parity(ours, theirs.eval(), ragged_inputs(30522, length=60), torch.float32)


# Mutants: each is a plausible mistake, and the parity test above must not let it pass.


def _mask_dropped(ours, monkeypatch):
    def keep_all(input_ids, attention_mask, *rest):
        batch, padding = pack_padded(input_ids, None, *rest)
        return batch, padding

    monkeypatch.setattr(encoder_module, "pack_padded", keep_all)


def _eps_changed(ours, monkeypatch):
    for module in ours.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5


def _tanh_for_erf(ours, monkeypatch):
    for layer in ours.encoder.layer:
        layer.feed_forward.act = encoder_module.activation("gelu_new")


def _boundary_off_by_one(ours, monkeypatch):
    def shifted(*args):
        batch, padding = pack_padded(*args)
        cu = batch.cu_seqlens.clone()
        cu[1:-1] = (cu[1:-1] + 1).clamp(max=int(cu[-1]))
        return dataclasses.replace(batch, cu_seqlens=cu), padding

    monkeypatch.setattr(encoder_module, "pack_padded", shifted)


def _positions_from_the_mask(ours, monkeypatch):
    def counted(input_ids, mask, types, positions):
        return pack_padded(input_ids, mask, types, mask.cumsum(1) - 1)

    monkeypatch.setattr(encoder_module, "pack_padded", counted)


def _segments_ignored(ours, monkeypatch):
    monkeypatch.setattr(encoder_module, "pack_padded", lambda i, m, t, p: pack_padded(i, m, None, p))


def _heads_interleaved(ours, monkeypatch):
    with torch.no_grad():
        for layer in ours.encoder.layer:
            weight = layer.attention.qkv.weight
            q, k, v = weight.chunk(3)
            weight.copy_(torch.stack([q, k, v], 1).flatten(0, 1))


def _positions_from_zero(ours, monkeypatch):
    monkeypatch.setattr(ours, "padded_positions", lambda ids, shape: None)


def _padding_counted(ours, monkeypatch):
    monkeypatch.setattr(ours, "padded_positions", lambda ids, shape: torch.arange(shape[1]) + ours.position_offset)


def _projection_skipped(ours, monkeypatch):
    pad = torch.nn.ZeroPad1d((0, ours.config.hidden_size - ours.config.embedding_size))
    monkeypatch.setattr(ours, "embeddings_project", pad)


def _bias_dropped(ours, monkeypatch):
    torch.nn.init.zeros_(ours.encoder.relative_attention_bias.weight)


def _bias_transposed(ours, monkeypatch):
    with torch.no_grad():
        table = ours.encoder.relative_attention_bias.weight
        table.copy_(table.roll(16, dims=0))  # the halves for keys ahead and behind change places


def _erf_for_tanh(ours, monkeypatch):
    for group in ours.encoder.albert_layer_groups:
        for layer in group.albert_layers:
            layer.feed_forward.act = encoder_module.activation("gelu")


def _groups_in_turn(ours, monkeypatch):
    assert ours.encoder.group_of_layer == [0, 0, 1]
    ours.encoder.group_of_layer = [0, 1, 0]


@pytest.mark.parametrize(
    ("name", "mutate"),
    [
        ("bert", _mask_dropped),
        ("bert", _eps_changed),
        ("bert", _tanh_for_erf),
        ("bert", _boundary_off_by_one),
        ("bert", _positions_from_the_mask),
        ("bert", _segments_ignored),
        ("bert", _heads_interleaved),
        ("mpnet", _bias_dropped),
        ("mpnet", _bias_transposed),
        ("mpnet", _positions_from_zero),
        ("mpnet", _padding_counted),
        ("albert", _erf_for_tanh),
        ("albert-groups", _groups_in_turn),
        ("roberta", _positions_from_zero),
        ("roberta", _padding_counted),
        ("distilbert", _eps_changed),
        ("distilbert", _tanh_for_erf),
        ("electra", _tanh_for_erf),
        ("electra", _projection_skipped),
    ],
)
def test_mutant_fails(name, mutate, tmp_path, monkeypatch):
    family = next(f for f in FAMILIES if f.name == name)
    ours, theirs = pair(family, tmp_path)
    inputs = inputs_of(family)
    assert_parity(ours, theirs, inputs, torch.float32)
    theirs.float()
    mutate(ours, monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        assert_parity(ours, theirs, inputs, torch.float32)


# Outputs.


@families
def test_names_outputs_and_order(family, tmp_path):
    ours, theirs = pair(family, tmp_path)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    inputs = inputs_of(family)
    with torch.no_grad():
        a = ours(**inputs, output_hidden_states=True, output_attentions=True)
        b = theirs(**inputs, output_hidden_states=True, output_attentions=True)
    assert list(a) == [k for k in b if k != "cross_attentions"]  # a decoder's, empty here
    for name in a:
        assert [x.shape for x in pytree.tree_leaves(a[name])] == [x.shape for x in pytree.tree_leaves(b[name])]
    assert a.last_hidden_state is a["last_hidden_state"] is a[0]
    kept = inputs["attention_mask"].bool()
    square = kept[:, None, :, None] & kept[:, None, None, :]
    for x, y in zip(a.attentions, b.attentions, strict=True):
        torch.testing.assert_close(x, torch.where(square, y, 0.0), rtol=0, atol=1e-6)
    plain, as_tuple = ours(**inputs), ours(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert all(torch.equal(x, y) for x, y in zip(as_tuple, plain.values(), strict=True))
    assert hasattr(plain, "pooler_output") == hasattr(b, "pooler_output")
    some = ours(**inputs, output_hidden_states=[-1]).hidden_states
    assert [h is None for h in some] == [True] * (len(a.hidden_states) - 1) + [False]
    assert pickle.loads(pickle.dumps(a)).keys() == a.keys()


def test_padding_is_zero_and_a_masked_row_is_finite(tmp_path):
    ours, _ = pair(FAMILIES[0], tmp_path)
    inputs = ragged_inputs(SMALL["vocab_size"])
    out = ours(**inputs)
    assert out.last_hidden_state[~inputs["attention_mask"].bool()].abs().max() == 0
    assert torch.isfinite(out.last_hidden_state).all()
    assert torch.isfinite(out.pooler_output).all()
    nothing = ours(inputs["input_ids"], attention_mask=torch.zeros_like(inputs["attention_mask"]))
    assert nothing.last_hidden_state.abs().max() == 0


def test_left_padding_pools_the_first_token(tmp_path):
    ours, _ = pair(FAMILIES[0], tmp_path)
    ids = torch.randint(5, 97, (1, 6))
    alone = ours(ids, position_ids=torch.arange(2, 8)[None])
    padded = ours(torch.cat([torch.zeros(1, 2).long(), ids], 1), attention_mask=torch.tensor([[0, 0] + [1] * 6]))
    torch.testing.assert_close(padded.pooler_output, alone.pooler_output, rtol=0, atol=1e-6)


def test_inputs_embeds_equal_ids(tmp_path):
    ours, _ = pair(FAMILIES[0], tmp_path)
    inputs = ragged_inputs(SMALL["vocab_size"])
    embeds = ours.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    rest = {k: v for k, v in inputs.items() if k != "input_ids"}
    a, b = ours(**inputs).last_hidden_state, ours(inputs_embeds=embeds, **rest).last_hidden_state
    assert torch.equal(a, b)
    b.sum().backward()
    padding = ~inputs["attention_mask"].bool()
    assert embeds.grad[padding].abs().max() == 0
    assert embeds.grad[~padding].abs().min() > 0


@families
def test_inputs_embeds_as_hugging_face(family, tmp_path):
    ours, theirs = (model.double() for model in pair(family, tmp_path))
    inputs = inputs_of(family)
    ids, kept = inputs.pop("input_ids"), inputs["attention_mask"].bool()
    states = [
        model(inputs_embeds=model.get_input_embeddings()(ids), **inputs).last_hidden_state for model in (ours, theirs)
    ]
    assert (states[0] - states[1])[kept].abs().max() <= 1e-12


@families
def test_packed_call_equals_padded_call(family, tmp_path):
    ours = pair(family, tmp_path)[0].double()
    sequences = [[7, 8, 9], [11], [5] * 30]
    batch = pack(sequences, position_offset=ours.position_offset)
    for sequence, packed in zip(sequences, batch.split(ours.forward_packed(batch)), strict=True):
        padded = ours(torch.tensor([sequence])).last_hidden_state[0]
        torch.testing.assert_close(packed, padded, rtol=0, atol=1e-12)


def test_only_real_tokens_reach_the_linears(tmp_path):
    ours, _ = pair(FAMILIES[0], tmp_path)
    inputs = ragged_inputs(SMALL["vocab_size"])
    rows = []
    for layer in ours.encoder.layer:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda m, args, out: rows.append(args[0].shape[0]))
    ours(**inputs)
    real, padded = int(inputs["attention_mask"].sum()), inputs["input_ids"].numel()
    assert real < padded
    assert rows == [real] * (4 * ours.config.num_hidden_layers)


def test_a_sequence_alone_equals_itself_in_a_batch(tmp_path):
    ours, _ = pair(FAMILIES[0], tmp_path)
    ours = ours.double()
    sequences = [[7, 8, 9], [11], [5] * 30, [1, 2]]
    together = ours.forward_packed(pack(sequences))
    for sequence, part in zip(sequences, pack(sequences).split(together), strict=True):
        torch.testing.assert_close(ours.forward_packed(pack([sequence])), part, rtol=0, atol=1e-13)


def test_checkpointed_layers_run_twice():
    model = fastbert.BertModel(fastbert.BertConfig(**SMALL)).train()
    calls = []
    for i, layer in enumerate(model.encoder.layer):
        layer.register_forward_pre_hook(lambda *args, i=i: calls.append(i))  # recomputation stops early
    for every, expected in ((1, [0, 1, 2, 2, 1, 0]), (2, [0, 1, 2, 2, 0]), (None, [0, 1, 2])):
        if every is None:
            model.activation_checkpointing_disable()
        else:
            model.activation_checkpointing_enable(every_n_layers=every)
        calls.clear()
        model(torch.ones(1, 3).long()).last_hidden_state.sum().backward()
        assert calls == expected
    with pytest.raises(ValueError, match="offload is True"):
        model.gradient_checkpointing_enable(offload=True)


def test_config_takes_what_training_loops_set():
    config = fastbert.BertConfig(**SMALL)
    config.use_cache = False
    config.id2label = {0: "no", 1: "yes", 2: "maybe"}
    assert config.num_labels == 3
    assert config.label2id["maybe"] == 2
    config.num_labels = 2
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    config.problem_type = "regression"
    assert config.to_dict()["use_cache"] is config.use_cache is False
    with pytest.raises(AttributeError, match=r"config\.replace\(hidden_size=64\)"):
        config.hidden_size = 64
    with pytest.raises(AttributeError, match="has no 'no_such_thing'"):
        config.no_such_thing  # noqa: B018
    assert config.replace(hidden_size=96).hidden_size == 96
    assert config.replace(num_labels=5).num_labels == 5


@pytest.mark.parametrize("name", ["bert", "mpnet", "albert-groups"])
def test_gradient_checkpointing_changes_nothing_but_memory(name, tmp_path):
    family = next(f for f in FAMILIES if f.name == name)
    ours, _ = pair(family, tmp_path, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    ours.train()
    inputs = inputs_of(family)
    results = []
    for enabled in (False, True):
        if enabled:
            ours.gradient_checkpointing_enable(every_n_layers=2)
        assert ours.is_gradient_checkpointing == enabled
        ours.zero_grad()
        torch.manual_seed(5)  # dropout is on: the recomputation must draw the same bits
        ours(**inputs).last_hidden_state.pow(2).sum().backward()
        results.append([p.grad.clone() for p in ours.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m(), ValueError, "exactly one of input_ids or inputs_embeds"),
        (lambda m: m(torch.ones(1, 2).long(), inputs_embeds=torch.ones(1, 2, 48)), ValueError, "exactly one"),
        (lambda m: m(torch.tensor([[5, 97]])), IndexError, r"input_ids has values from 5 to 97 .* 0 to 96"),
        (lambda m: m(torch.tensor([[5, -1]])), IndexError, "input_ids has values from -1"),
        (lambda m: m(torch.ones(1, 41).long()), IndexError, r"position_ids .* 0 to 39"),
        (lambda m: m(torch.ones(1, 3).long(), token_type_ids=torch.tensor([[0, 1, 2]])), IndexError, "type_ids"),
        (lambda m: m(torch.ones(3).long()), ValueError, r"\(batch, length\)"),
        (lambda m: m(torch.ones(1, 3)), ValueError, "must be integers"),
        (
            lambda m: m(torch.ones(1, 3).long(), torch.ones(1, 2)),
            ValueError,
            r"\(1, 2\) but the input has shape \(1, 3\)",
        ),
        (lambda m: m(torch.ones(1, 3).long(), torch.zeros(1, 3) - 1e4), ValueError, "additive"),
        (lambda m: m(inputs_embeds=torch.ones(2, 48)), ValueError, "inputs_embeds must be"),
    ],
)
def test_bad_input_is_named(call, error, message):
    model = fastbert.BertModel(fastbert.BertConfig(**SMALL)).eval()
    with pytest.raises(error, match=message):
        call(model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"is_decoder": True}, "encoders only"),
        ({"hidden_act": "gelo"}, "nearest: gelu"),
        ({"hidden_size": 50}, "not a multiple"),
        ({"hidden_size": "768"}, "must be a whole number"),
        ({"model_type": "roberta"}, "'roberta' but BertConfig reads 'bert'"),
    ],
)
def test_bad_config_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        fastbert.BertConfig.from_dict(SMALL | values)


def test_config_keeps_what_it_does_not_know_and_counts_labels(tmp_path):
    config = fastbert.BertConfig.from_dict(SMALL | {"position_embedding_type": "absolute", "task": "x"}, num_labels=3)
    config.save_pretrained(tmp_path)
    again = fastbert.BertConfig.from_pretrained(tmp_path)
    assert again == config
    assert again.extra["task"] == "x"
    assert again.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert again.replace(num_labels=5).label2id["LABEL_4"] == 4
    assert fastbert.BertConfig(id2label={0: "no", 1: "yes", 2: "maybe"}).num_labels == 3
    assert transformers.BertConfig.from_pretrained(tmp_path).num_labels == 3
    with pytest.raises(TypeError, match=r"num_label'.*nearest: num_labels"):
        fastbert.BertConfig.from_dict(SMALL, num_label=3)


def test_mpnet_buckets_equal_hugging_face_at_every_offset():
    offsets = torch.arange(-600, 601)
    theirs = transformers.models.mpnet.modeling_mpnet.MPNetEncoder.relative_position_bucket(offsets)
    ours = mpnet.relative_buckets(offsets.device)
    assert torch.equal(ours[offsets.clamp(-127, 127) + 127], theirs)


def test_mpnet_long_sequences_and_a_larger_table(tmp_path):
    config = MPNET | {"max_position_embeddings": 302, "relative_attention_num_buckets": 40, "num_hidden_layers": 1}
    ours, theirs = pair(Family("mpnet", fastbert.MPNetModel, transformers.MPNetModel, config), tmp_path)
    ids = torch.randint(5, 97, (1, 300), generator=torch.Generator().manual_seed(0))
    assert_parity(ours, theirs, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.float32)
    with pytest.raises(ValueError, match=r"relative_attention_num_buckets is 31, .* 32 buckets"):
        fastbert.MPNetConfig(relative_attention_num_buckets=31)


def test_mpnet_refuses_masks_with_holes():
    model = fastbert.MPNetModel(fastbert.MPNetConfig(**MPNET)).eval()
    ids = torch.randint(5, 97, (2, 6))
    mask = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0]])
    assert model(ids, mask).last_hidden_state.shape == (2, 6, 48)
    mask[1, 2] = 0
    for holes in (mask, mask.bool()[:, None, None]):
        with pytest.raises(ValueError, match=r"drops tokens between .* left or right"):
            model(ids, holes)


def test_mpnet_takes_arguments_in_hugging_face_order(tmp_path):
    ours, theirs = pair(next(f for f in FAMILIES if f.name == "mpnet"), tmp_path)
    ids, positions = torch.randint(5, 97, (2, 6)), torch.arange(9, 15)[None]
    a, b = ours(ids, None, positions, return_dict=False), theirs(ids, None, positions, return_dict=False)
    torch.testing.assert_close(a[0], b[0], rtol=0, atol=1e-5)
    head = fastbert.MPNetForTokenClassification(ours.config).eval()
    named = head(input_ids=ids, position_ids=positions, labels=ids % 2).loss
    assert torch.equal(head(ids, None, positions, None, ids % 2).loss, named)
    assert not torch.equal(head(ids, None, None, None, ids % 2).loss, named)


def test_import_is_light():
    code = "import sys, fastbert; print(any(m in sys.modules for m in ('transformers', 'fastapi', 'pyarrow', 'rich')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize("sinusoidal", [False, True])
def test_distilbert_takes_more_positions(sinusoidal):
    config = fastbert.DistilBertConfig(
        vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=24, max_position_embeddings=8,
        sinusoidal_pos_embds=sinusoidal,
    )  # fmt: skip
    model = fastbert.DistilBertModel(config).eval()
    ids = torch.randint(5, 50, (1, 8))
    before = model(ids).last_hidden_state
    model.resize_position_embeddings(12)
    assert torch.equal(model(ids).last_hidden_state, before)
    assert model.config.max_position_embeddings == model.get_position_embeddings().num_embeddings == 12
    assert torch.isfinite(model(torch.randint(5, 50, (1, 12))).last_hidden_state).all()
    if sinusoidal:
        longer = fastbert.DistilBertModel(config.replace(max_position_embeddings=12))
        assert torch.equal(longer.get_position_embeddings().weight, model.get_position_embeddings().weight)
    with pytest.raises(ValueError, match="at least 1 position"):
        model.resize_position_embeddings(0)


def test_a_config_of_another_family_is_refused():
    with pytest.raises(TypeError, match="BertModel needs a BertConfig, got RobertaConfig"):
        fastbert.BertModel(fastbert.RobertaConfig())


def test_null_in_a_config_stays_null_where_it_means_something():
    assert fastbert.BertConfig.from_dict(SMALL | {"pad_token_id": None}).pad_token_id is None
    assert fastbert.BertConfig.from_dict(SMALL | {"num_hidden_layers": None}).num_hidden_layers == 12
