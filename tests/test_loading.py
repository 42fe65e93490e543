"""Files that older writers left behind, and files of one class read into another: every form loads as what it means."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fastbert

SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
}
DISTILBERT = {
    "vocab_size": 61,
    "dim": 24,
    "n_layers": 2,
    "n_heads": 3,
    "hidden_dim": 40,
    "max_position_embeddings": 16,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A row: the classes' common stem, a small configuration, and the masked-LM head's tied names."""

    stem: str
    config: dict
    prefix: str
    bias: str
    decoder: str

    def ours(self, task: str):
        return getattr(fastbert, self.stem + task)

    def theirs(self, task: str):
        return getattr(transformers, self.stem + task)

    def __str__(self):
        return self.stem


BERT = Family("Bert", SMALL, "bert.", "cls.predictions.bias", "cls.predictions.decoder")
ROBERTA = Family("Roberta", SMALL, "roberta.", "lm_head.bias", "lm_head.decoder")
FAMILIES = [
    BERT,
    ROBERTA,
    Family("DistilBert", DISTILBERT, "distilbert.", "vocab_projector.bias", "vocab_projector"),
    Family("Electra", SMALL | {"embedding_size": 12}, "electra.", "generator_lm_head.bias", "generator_lm_head"),
]
families = pytest.mark.parametrize("family", FAMILIES, ids=str)
with_two_biases = pytest.mark.parametrize("family", [BERT, ROBERTA], ids=str)


def saved(family: Family, task: str, folder) -> dict[str, torch.Tensor]:
    """A small checkpoint as transformers writes it; its state dict, in which tied names are all present."""
    torch.manual_seed(0)
    model = family.theirs(task)(family.theirs("Config")(**family.config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(folder)
    return {k: v.clone() for k, v in model.state_dict().items()}


def rewrite(folder, change) -> None:
    """Apply `change` to the tensors of the file."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file({k: v.clone() for k, v in state.items()}, folder / "model.safetensors")


def load(model_class, folder):
    """The model and its loading info; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return model_class.from_pretrained(folder, output_loading_info=True)


def assert_state(model, expected: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(state[key], value), key


def assert_tied(family: Family, model) -> None:
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if family in (BERT, ROBERTA):
        assert model.get_output_embeddings().bias is model.get_parameter(family.bias)


@with_two_biases
@pytest.mark.parametrize("weight", ["absent", "present", "stale"])
@pytest.mark.parametrize("bias", ["followed only", "decoder only", "both", "stale decoder"])
def test_every_form_of_the_tied_head(family, weight, bias, tmp_path):
    expected = saved(family, "ForMaskedLM", tmp_path)

    def change(state):
        for key in (family.bias, family.decoder + ".bias", family.decoder + ".weight"):
            state.pop(key, None)
        if weight != "absent":
            state[family.decoder + ".weight"] = expected[family.decoder + ".weight"] + (weight == "stale")
        if bias != "decoder only":
            state[family.bias] = expected[family.bias]
        if bias != "followed only":
            state[family.decoder + ".bias"] = expected[family.bias] + (bias == "stale decoder")

    rewrite(tmp_path, change)
    model, info = load(family.ours("ForMaskedLM"), tmp_path)
    assert info == {"missing_keys": [], "unexpected_keys": []}
    assert_state(model, expected)
    assert_tied(family, model)


@families
@pytest.mark.parametrize("present", [False, True])
def test_tied_decoder_weight(family, present, tmp_path):
    expected = saved(family, "ForMaskedLM", tmp_path)

    def change(state):
        state.pop(family.decoder + ".weight", None)
        if present:
            state[family.decoder + ".weight"] = expected[family.decoder + ".weight"]

    rewrite(tmp_path, change)
    model, _ = load(family.ours("ForMaskedLM"), tmp_path)
    assert_state(model, expected)
    assert_tied(family, model)


@families
def test_word_table_only_in_the_decoder(family, tmp_path):
    expected = saved(family, "ForMaskedLM", tmp_path)

    def change(state):
        word = state.pop(family.prefix + "embeddings.word_embeddings.weight", None)
        state[family.decoder + ".weight"] = expected[family.decoder + ".weight"] if word is None else word

    rewrite(tmp_path, change)
    assert_state(load(family.ours("ForMaskedLM"), tmp_path)[0], expected)


@families
def test_a_head_without_its_bias_is_reported(family, tmp_path):
    saved(family, "ForMaskedLM", tmp_path)
    rewrite(tmp_path, lambda state: [state.pop(k) for k in list(state) if k in (family.bias, family.decoder + ".bias")])
    with pytest.warns(UserWarning, match=family.bias):
        model = family.ours("ForMaskedLM").from_pretrained(tmp_path)
    assert model.get_output_embeddings().bias.abs().max() == 0


@families
def test_gamma_beta_and_buffers_below_the_prefix(family, tmp_path):
    expected = saved(family, "ForMaskedLM", tmp_path)

    def to_legacy(state):
        for key in list(state):
            if "LayerNorm" in key:
                state[key.replace("weight", "gamma").replace("bias", "beta")] = state.pop(key)
        state[family.prefix + "embeddings.position_ids"] = torch.arange(16)[None]
        state[family.prefix + "embeddings.token_type_ids"] = torch.zeros(1, 16).long()

    rewrite(tmp_path, to_legacy)
    model, info = load(family.ours("ForMaskedLM"), tmp_path)
    assert not info["unexpected_keys"]
    assert_state(model, expected)


@families
def test_a_head_file_into_the_base_model(family, tmp_path):
    head = saved(family, "ForTokenClassification", tmp_path)
    arguments = {"add_pooling_layer": False} if family in (BERT, ROBERTA) else {}
    model, info = family.ours("Model").from_pretrained(tmp_path, output_loading_info=True, **arguments)
    expected = {k.removeprefix(family.prefix): v for k, v in head.items() if k.startswith(family.prefix)}
    assert_state(model, expected)
    assert info == {"missing_keys": [], "unexpected_keys": ["classifier.bias", "classifier.weight"]}


@families
@pytest.mark.parametrize("prefixed", [False, True])
def test_a_base_file_into_a_head(family, prefixed, tmp_path):
    base = saved(family, "Model", tmp_path)
    if prefixed:  # as the hub's base checkpoints of the older families are
        rewrite(tmp_path, lambda state: [state.update({family.prefix + k: state.pop(k)}) for k in list(state)])
    with pytest.warns(UserWarning, match=r"has no weights for classifier\.bias, classifier\.weight"):
        model, info = family.ours("ForTokenClassification").from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == ["classifier.bias", "classifier.weight"]
    assert all("pooler" in key for key in info["unexpected_keys"])
    for key, value in model.base_model.state_dict().items():
        assert torch.equal(value, base[key]), key


@with_two_biases
def test_a_file_with_a_pooler_into_a_model_without(family, tmp_path):
    expected = saved(family, "ForMaskedLM", tmp_path)
    extra = {f"{family.prefix}pooler.dense.{k}": torch.ones(24) for k in ("weight", "bias")}
    rewrite(tmp_path, lambda state: state.update(extra))
    model, info = load(family.ours("ForMaskedLM"), tmp_path)
    assert info["unexpected_keys"] == sorted(extra)
    assert_state(model, expected)


@families
def test_another_familys_file_is_refused(family, tmp_path):
    saved(family, "Model", tmp_path)
    other = fastbert.BertModel if family != BERT else fastbert.RobertaModel
    with pytest.raises(ValueError, match="says model_type"):
        other.from_pretrained(tmp_path)


@families
def test_fresh_weights(family):
    torch.manual_seed(0)
    config = family.ours("Config")(**family.config, initializer_range=0.1)
    model = family.ours("ForMaskedLM")(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            rows = module.weight.abs().amax(1) == 0
            assert rows.nonzero().flatten().tolist() == ([] if module.padding_idx is None else [module.padding_idx])
            assert 0.08 < module.weight.std() < 0.12
        elif isinstance(module, torch.nn.LayerNorm):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
        if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm):
            assert module.bias.abs().max() == 0
    assert_tied(family, model)


def test_sinusoidal_positions_start_as_transformers_makes_them():
    config = DISTILBERT | {"sinusoidal_pos_embds": True}
    ours = fastbert.DistilBertForMaskedLM(fastbert.DistilBertConfig(**config))
    theirs = transformers.DistilBertModel(transformers.DistilBertConfig(**config))
    table = ours.distilbert.embeddings.position_embeddings.weight
    assert torch.equal(table, theirs.embeddings.position_embeddings.weight)


@families
def test_norms_and_biases_are_not_decayed(family):
    """The Trainer reads names and types: what it decays must be what it decays of Hugging Face's model."""
    ours = family.ours("ForMaskedLM")(family.ours("Config")(**family.config))
    theirs = family.theirs("ForMaskedLM")(family.theirs("Config")(**family.config))
    forbidden = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    counts = []
    for model in (ours, theirs):
        names = transformers.trainer_pt_utils.get_parameter_names(model, [torch.nn.LayerNorm], forbidden)
        parameters = dict(model.named_parameters())
        counts.append(sum(parameters[n].numel() for n in names if n in parameters))
    assert counts[0] == counts[1] > 0
