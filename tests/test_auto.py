"""The Auto classes against Hugging Face's: the same class for every model type and task, and honest errors."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

import fastbert

TINY = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 12,
}
DISTILBERT = {"vocab_size": 20, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8, "max_position_embeddings": 12}
CONFIGS = {
    "albert": fastbert.AlbertConfig(**TINY, embedding_size=4),
    "bert": fastbert.BertConfig(**TINY),
    "camembert": fastbert.CamembertConfig(**TINY),
    "distilbert": fastbert.DistilBertConfig(**DISTILBERT),
    "electra": fastbert.ElectraConfig(**TINY, embedding_size=4),
    "mpnet": fastbert.MPNetConfig(**TINY),
    "roberta": fastbert.RobertaConfig(**TINY),
    "xlm-roberta": fastbert.XLMRobertaConfig(**TINY),
}
AUTO = (
    "AutoModel",
    "AutoModelForMaskedLM",
    "AutoModelForMultipleChoice",
    "AutoModelForNextSentencePrediction",
    "AutoModelForPreTraining",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
)


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("auto", AUTO)
def test_same_class_as_transformers(auto, model_type, tmp_path):
    config = CONFIGS[model_type]
    config.save_pretrained(tmp_path)
    their_config = transformers.AutoConfig.from_pretrained(tmp_path)
    ours, theirs = getattr(fastbert, auto), getattr(transformers, auto)
    if type(their_config) not in theirs._model_mapping:
        with pytest.raises(ValueError, match=f"{auto} knows no model_type '{model_type}'; it knows bert"):
            ours.from_config(config)
        return
    model = ours.from_config(config)
    assert type(model).__name__ == theirs._model_mapping[type(their_config)].__name__
    assert type(model) is getattr(fastbert, type(model).__name__)
    model.save_pretrained(tmp_path)
    again = ours.from_pretrained(tmp_path, num_labels=2, local_files_only=True)
    assert type(again) is type(model)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_config_options_reach_the_model(tmp_path):
    fastbert.RobertaModel(CONFIGS["roberta"]).save_pretrained(tmp_path)
    config = fastbert.AutoConfig.from_pretrained(tmp_path, num_labels=3, local_files_only=True)
    assert type(config) is fastbert.RobertaConfig
    assert config.num_labels == 3
    assert config.hidden_size == 8
    with pytest.warns(UserWarning, match="classifier"):
        model = fastbert.AutoModelForTokenClassification.from_pretrained(tmp_path, config=config, dtype="bfloat16")
    assert model.classifier.weight.shape == (3, 8)
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("content", [{"model_type": "t5"}, {}])
def test_unknown_model_types_are_named(content, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(content))
    message = rf"knows no model_type {content.get('model_type')!r}; it knows albert, bert, .* xlm-roberta"
    for load in (fastbert.AutoModel.from_pretrained, fastbert.AutoConfig.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


def test_minilm_is_a_bert(minilm):
    assert type(fastbert.AutoModel.from_pretrained(minilm)) is fastbert.BertModel
