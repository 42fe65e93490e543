"""Every family's heads against Hugging Face: loss, logits and each parameter's gradient, ragged masks."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import cross_entropy as ce
from torch.nn.functional import gelu

import fastbert
from fastbert import models
from fastbert.models.activations import activation
from fastbert.models.encoder import Dropout, Layer, SelfAttention
from fastbert.testing import GRADIENT_FACTOR, assert_within_budget

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 40,
    "initializer_range": 0.1,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
B, L, N = 5, 20, 3


@dataclasses.dataclass(frozen=True)
class Head:
    """A row: the class's name (the same on both sides), its configuration, and what kind of labels it takes."""

    name: str
    labels: str
    config: dict[str, Any] = dataclasses.field(default_factory=lambda: SMALL)
    variant: str = ""
    holes: bool = True  # may masks drop tokens between others

    @property
    def ours(self):
        return getattr(fastbert, self.name)

    @property
    def theirs(self):
        return getattr(transformers, self.name)

    @property
    def kinked(self) -> bool:
        """ReLU's slope jumps at 0, where one rounding in bf16 flips it: its gradient has no error budget there."""
        relu = "DistilBertForSequenceClassification", "DistilBertForMultipleChoice"
        return self.name in relu or "relu" in self.config.values()

    def __str__(self):
        return self.name + self.variant


def _heads(prefix: str, config: dict, kinds: dict[str, str], holes: bool = True) -> list[Head]:
    return [Head(f"{prefix}For{task}", labels, config, holes=holes) for task, labels in kinds.items()]


COMMON = {
    "MaskedLM": "tokens",
    "SequenceClassification": "class",
    "TokenClassification": "token_class",
    "QuestionAnswering": "span",
    "MultipleChoice": "choice",
}
ROBERTA = SMALL | {"max_position_embeddings": 42, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1}
DISTILBERT = {
    "vocab_size": 97,
    "dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 80,
    "max_position_embeddings": 40,
    "initializer_range": 0.1,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "qa_dropout": 0.0,
    "seq_classif_dropout": 0.0,
}
ELECTRA = SMALL | {"embedding_size": 20, "summary_last_dropout": 0.0}
VOCABULARY = ("tokens", "pretraining", "pretraining_order")  # kinds with logits over the vocabulary
ALBERT = SMALL | {"embedding_size": 20, "num_hidden_groups": 2, "inner_group_num": 2, "classifier_dropout_prob": 0.0}
MPNET = SMALL | {"layer_norm_eps": 1e-5, "pad_token_id": 1, "hidden_act": "gelu_new"}  # lm_head is erf all the same
MULTI = SMALL | {"num_labels": N, "problem_type": "multi_label_classification"}

HEADS = [
    *_heads("Bert", SMALL, COMMON | {"NextSentencePrediction": "class2", "PreTraining": "pretraining"}),
    *_heads("Albert", ALBERT, COMMON | {"PreTraining": "pretraining_order"}),
    Head("AlbertForMaskedLM", "tokens", ALBERT | {"tie_word_embeddings": False}, "-untied"),
    *_heads("MPNet", MPNET, COMMON, holes=False),
    Head("MPNetForSequenceClassification", "regression", MPNET | {"num_labels": 1}, "-regression", holes=False),
    Head("BertForSequenceClassification", "regression", SMALL | {"num_labels": 1}, "-regression"),
    Head("BertForSequenceClassification", "multi", MULTI, "-multi"),
    Head("BertForMaskedLM", "tokens", SMALL | {"tie_word_embeddings": False}, "-untied"),
    *_heads("Roberta", ROBERTA, COMMON),
    *_heads("XLMRoberta", ROBERTA, COMMON),
    *_heads("Camembert", ROBERTA, COMMON),
    Head("RobertaForMaskedLM", "tokens", ROBERTA | {"hidden_act": "relu"}, "-relu"),
    *_heads("DistilBert", DISTILBERT, COMMON),
    Head("DistilBertForMaskedLM", "tokens", DISTILBERT | {"activation": "relu"}, "-relu"),
    *_heads("Electra", ELECTRA, COMMON | {"PreTraining": "replaced"}),
    Head("ElectraForMaskedLM", "tokens", ELECTRA | {"hidden_act": "relu"}, "-relu"),
    Head("ElectraForMaskedLM", "tokens", ELECTRA | {"tie_word_embeddings": False}, "-untied"),
    Head("ElectraForPreTraining", "replaced", ELECTRA | {"hidden_act": "relu"}, "-relu"),
    Head("ElectraForMultipleChoice", "choice", ELECTRA | {"summary_activation": "tanh"}, "-tanh"),
    Head("ElectraForMultipleChoice", "choice", ELECTRA | {"summary_use_proj": False}, "-bare"),
]
heads = pytest.mark.parametrize("head", HEADS, ids=str)


def inputs_of(head: Head, seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(inputs, labels); column 0 is always kept, since Hugging Face pools it."""
    g = torch.Generator().manual_seed(seed)
    choices = 2 if head.labels == "choice" else 1
    shape = (B * choices, L)
    ids = torch.randint(5, head.config["vocab_size"], shape, generator=g)
    mask = (torch.arange(L) < torch.randint(2, L + 1, (shape[0], 1), generator=g)).long()
    if head.holes:
        mask[1] = (torch.rand(L, generator=g) > 0.4).long()
    mask[:, 0] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "pad_token_id" in head.config:  # families that count positions from it: at padding, and once where it is kept
        ids[mask == 0] = head.config["pad_token_id"]
        ids[0, 0] = head.config["pad_token_id"]
    if head.config.get("type_vocab_size", 2) == 2:
        inputs["token_type_ids"] = torch.randint(0, 2, shape, generator=g)
    if choices > 1:
        inputs = {k: v.view(B, choices, L) for k, v in inputs.items()}
    kept = mask.bool() & (torch.rand(shape, generator=g) < 0.4)
    tokens = torch.where(kept, torch.randint(5, head.config["vocab_size"], shape, generator=g), -100)
    labels = {
        "tokens": lambda: {"labels": tokens},
        "class": lambda: {"labels": torch.randint(0, 2, (B,), generator=g)},
        "class2": lambda: {"labels": torch.randint(0, 2, (B,), generator=g)},
        "regression": lambda: {"labels": torch.randn(B, generator=g)},
        "multi": lambda: {"labels": torch.randint(0, 2, (B, N), generator=g).float()},
        "token_class": lambda: {"labels": torch.where(kept, torch.randint(0, 2, shape, generator=g), -100)},
        "span": lambda: {"start_positions": torch.zeros(B).long(), "end_positions": torch.tensor([0, 1, 0, 99, 0])},
        "choice": lambda: {"labels": torch.randint(0, 2, (B,), generator=g)},
        "replaced": lambda: {"labels": torch.randint(0, 2, shape, generator=g)},
        "pretraining": lambda: {"labels": tokens, "next_sentence_label": torch.randint(0, 2, (B,), generator=g)},
        "pretraining_order": lambda: {
            "labels": tokens,
            "sentence_order_label": torch.randint(0, 2, (B,), generator=g),
        },
    }[head.labels]()
    return inputs, labels


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # zeros and ones hide swapped biases and norms
            if parameter.ndim == 1:
                norm = "norm" in name.lower() and name.endswith("weight")
                parameter.normal_(1.0 if norm else 0.0, 0.1)
            else:
                parameter.normal_(0.0, 0.1)
    return model


def pair(head: Head, tmp_path, seed: int):
    theirs = randomise(head.theirs(head.theirs.config_class(**head.config, attn_implementation="eager")), seed).eval()
    theirs.save_pretrained(tmp_path)
    return head.ours.from_pretrained(tmp_path), theirs


def their_loss(head: Head, out, inputs, labels) -> torch.Tensor:
    """Hugging Face's loss; for spans without the probability that its garbage at padding takes."""
    if head.labels == "replaced":  # Hugging Face rounds this loss to fp32 even in fp64: hold it to that, do it again
        kept = inputs["attention_mask"].bool()
        loss = bce(out.logits[kept], labels["labels"][kept].to(out.logits.dtype))
        assert abs(loss - out.loss) <= 4 * max(torch.finfo(d).eps for d in (torch.float32, out.logits.dtype))
        return loss
    if head.labels != "span":
        return out.loss
    fill = torch.finfo(out.start_logits.dtype).min
    mask = inputs["attention_mask"].bool()
    start, end = (torch.where(mask, x, fill) for x in (out.start_logits, out.end_logits))
    targets = (labels["start_positions"].clamp(0, L), labels["end_positions"].clamp(0, L))
    return sum(ce(x, y, ignore_index=L) for x, y in zip((start, end), targets, strict=True)) / 2


def results(head: Head, model, inputs, labels, dtype, *, ours: bool) -> dict[str, torch.Tensor]:
    """Loss, logits at real positions, and every parameter's gradient under Hugging Face's name."""
    labels = {k: v.to(dtype) if v.is_floating_point() else v for k, v in labels.items()}
    model = model.to(dtype)
    model.zero_grad()
    out = model(**inputs, **labels, **({"output_logits": True} if head.labels in VOCABULARY and ours else {}))
    loss = out.loss if ours else their_loss(head, out, inputs, labels)
    loss.backward()
    named = {"loss": loss.detach().to(dtype)}
    mask = inputs["attention_mask"].bool()
    for key, value in out.items():
        if "logits" in key:
            named[key] = (value[mask] if value.shape[:2] == mask.shape and mask.ndim == 2 else value).detach()
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if ours:
        values = {id(p): p.data for p in model.parameters()}
        for p in model.parameters():
            p.data = p.grad
        named |= {f"grad {k}": v.clone() for k, v in model.state_dict().items()}
        for p in model.parameters():
            p.data = values[id(p)]
    else:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        named |= {f"grad {k}": parameters[k].grad.clone() for k in model.state_dict() if k in parameters}
    return named


@heads
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fp64_equals_hugging_face(head, seed, tmp_path):
    ours, theirs = pair(head, tmp_path, seed)
    inputs, labels = inputs_of(head, seed)
    a = results(head, ours, inputs, labels, torch.float64, ours=True)
    b = results(head, theirs, inputs, labels, torch.float64, ours=False)
    assert a.keys() == b.keys()
    largest = max(v.abs().max().item() for k, v in b.items() if k.startswith("grad"))
    for key, exact in b.items():
        scale = largest if key.startswith("grad") else max(1.0, exact.abs().max().item())
        assert (a[key] - exact).abs().max().item() <= 1e-12 * scale, key


@heads
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_within_budget_of_hugging_face(head, dtype, tmp_path):
    ours, theirs = pair(head, tmp_path, 0)
    inputs, labels = inputs_of(head, 0)
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    a = results(head, ours, inputs, labels, dtype, ours=True)
    same = results(head, theirs, inputs, labels, dtype, ours=False)
    exact = results(head, theirs, inputs, labels, torch.float64, ours=False)
    everything = []
    for results_ in (a, same, exact):  # gradients share one budget: the smallest tensors have no error to compare with
        everything.append(torch.cat([results_[k].flatten() for k in exact if k.startswith("grad")]))
    if dtype == torch.float32 or not head.kinked:
        assert_within_budget(*everything, factor=GRADIENT_FACTOR, what="gradients")
    for key in exact:
        if "logits" in key:
            assert_within_budget(a[key], same[key], exact[key], what=key)


@heads
def test_training_mode_needs_no_full_logits_and_tuples_skip_none(head, tmp_path):
    ours, _ = pair(head, tmp_path, 0)
    inputs, labels = inputs_of(head, 0)
    evaluated = ours(**inputs, **labels)
    trained = ours.train()(**inputs, **labels)
    torch.testing.assert_close(trained.loss, evaluated.loss, rtol=1e-5, atol=1e-6)
    if head.labels in VOCABULARY:
        assert "logits" not in trained
        assert "prediction_logits" not in trained
    as_tuple = ours.eval()(**inputs, **labels, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == len(evaluated)
    assert torch.equal(as_tuple[0], evaluated.loss)
    assert "loss" not in ours(**inputs)


ALL = 1 - 1e-7  # as a dropout probability: deterministic on both sides, each site gives zeros


def trained_logits(head: Head, model, inputs) -> list[torch.Tensor]:
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        logits = [v for k, v in model.double().train()(**inputs).items() if "logits" in k]
    return [x[mask] if x.shape[:2] == mask.shape and mask.ndim == 2 else x for x in logits]


def dropout_fields(head: Head) -> dict[str, Any]:
    """Name and default of each probability; those that are not None make dropout on their own."""
    return {f.name: f.default for f in dataclasses.fields(head.ours.config_class) if "dropout" in f.name}


def dropping(head: Head, name: str) -> Head:
    off = {k: 0.0 for k, default in dropout_fields(head).items() if default is not None}
    return dataclasses.replace(head, config=head.config | off | {name: ALL})


@heads
def test_dropout_sites(head, tmp_path):
    for name in dropout_fields(head):
        ours, theirs = pair(dropping(head, name), tmp_path / name, 0)
        inputs, _ = inputs_of(head, 0)
        for a, b in zip(*(trained_logits(head, model, inputs) for model in (ours, theirs)), strict=True):
            assert (a - b).abs().max().item() <= 1e-12 * max(1.0, b.abs().max().item()), name


def _no_dropout_in_the_embeddings(ours):
    ours.base_model.embeddings.dropout_p = 0.0


def _no_dropout_after_attention(ours):
    for module in ours.modules():
        if isinstance(module, Layer):
            module.attention_LayerNorm.dropout_p = 0.0


def _dropout_after_attention(ours):
    for module in ours.modules():
        if isinstance(module, Layer):
            module.attention_LayerNorm.dropout_p = ALL


def _dropout_after_the_feed_forward(ours):
    for module in ours.modules():
        if isinstance(module, Layer):
            module.output_LayerNorm.dropout_p = ALL


def _dropout_of_probabilities_ignored(ours):
    for module in ours.modules():
        if isinstance(module, SelfAttention):
            module.dropout_p = 0.0


def _no_dropout_in_the_classifier(ours):
    for module in ours.modules():
        if isinstance(module, Dropout):
            module.p = 0.0


@pytest.mark.parametrize(
    ("name", "field", "mutate"),
    [
        ("BertForTokenClassification", "hidden_dropout_prob", _no_dropout_in_the_classifier),
        ("BertForTokenClassification", "attention_probs_dropout_prob", _dropout_of_probabilities_ignored),
        ("BertForMaskedLM", "hidden_dropout_prob", _no_dropout_in_the_embeddings),
        ("BertForMaskedLM", "hidden_dropout_prob", _no_dropout_after_attention),
        ("AlbertForMaskedLM", "hidden_dropout_prob", _dropout_after_the_feed_forward),
        ("AlbertForSequenceClassification", "classifier_dropout_prob", _no_dropout_in_the_classifier),
        ("MPNetForMaskedLM", "attention_probs_dropout_prob", _dropout_of_probabilities_ignored),
        ("MPNetForSequenceClassification", "hidden_dropout_prob", _no_dropout_in_the_classifier),
        ("RobertaForMultipleChoice", "hidden_dropout_prob", _no_dropout_in_the_classifier),
        ("RobertaForSequenceClassification", "classifier_dropout", _no_dropout_in_the_classifier),
        ("DistilBertForMaskedLM", "dropout", _dropout_after_attention),
        ("DistilBertForQuestionAnswering", "qa_dropout", _no_dropout_in_the_classifier),
        ("DistilBertForSequenceClassification", "seq_classif_dropout", _no_dropout_in_the_classifier),
        ("ElectraForMultipleChoice", "summary_last_dropout", _no_dropout_in_the_classifier),
        ("ElectraForMultipleChoice", "summary_first_dropout", _no_dropout_in_the_classifier),
    ],
)
def test_dropout_mutant_fails(name, field, mutate, tmp_path):
    head = next(h for h in HEADS if h.name == name)
    ours, theirs = pair(dropping(head, field), tmp_path, 0)
    mutate(ours)
    inputs, _ = inputs_of(head, 0)
    both = (trained_logits(head, model, inputs) for model in (ours, theirs))
    assert max((a - b).abs().max().item() for a, b in zip(*both, strict=True)) > 1e-6


MODELS = [n for n in models.__all__ if not n.startswith("Auto") and hasattr(getattr(models, n), "forward")]


@pytest.mark.parametrize("name", MODELS)
def test_arguments_are_in_hugging_faces_order(name):
    ours, theirs = (list(inspect.signature(getattr(m, name).forward).parameters) for m in (fastbert, transformers))
    assert ours[:5] == theirs[:5]
    assert [n for n in ours if n in theirs] == [n for n in theirs if n in ours]


@heads
def test_save_is_what_transformers_loads(head, tmp_path):
    ours, theirs = pair(head, tmp_path / "theirs", 0)
    ours.save_pretrained(tmp_path / "ours")
    again, info = head.theirs.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = theirs.state_dict()
    for key, value in again.state_dict().items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("head", [h for h in HEADS if h.labels == "tokens"], ids=str)
def test_resize_token_embeddings(head, tmp_path):
    ours, _ = pair(head, tmp_path, 0)
    inputs, labels = inputs_of(head, 0)
    before = ours(**inputs).logits
    table = ours.resize_token_embeddings(100, pad_to_multiple_of=8)
    assert table.num_embeddings == ours.config.vocab_size == ours.base_model.config.vocab_size == 104
    assert table.training == ours.training
    assert ours.get_input_embeddings() is table
    after = ours(**inputs, **labels)
    assert after.logits.shape[-1] == 104
    assert torch.equal(after.logits[..., :97], before)
    after.loss.backward()
    decoder = ours.get_output_embeddings()
    assert (decoder.weight is table.weight) == ours.config.tie_word_embeddings
    ours.save_pretrained(tmp_path / "resized")
    again = head.theirs.from_pretrained(tmp_path / "resized").eval()
    torch.testing.assert_close(again(**inputs).logits[inputs["attention_mask"].bool()],
                               after.logits[inputs["attention_mask"].bool()], rtol=1e-4, atol=1e-5)  # fmt: skip
    assert ours.resize_token_embeddings(50).num_embeddings == 50
    with pytest.raises(ValueError, match="at least 1 row"):
        ours.resize_token_embeddings(0)


def test_base_file_into_a_head_warns_and_initialises(tmp_path):
    base = fastbert.BertModel(fastbert.BertConfig(**SMALL))
    base.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"classifier\.bias, classifier\.weight"):
        model = fastbert.BertForSequenceClassification.from_pretrained(tmp_path, num_labels=4)
    assert model.classifier.weight.shape == (4, 48)
    assert 0.02 < model.classifier.weight.std() < 0.3
    assert torch.equal(model.bert.pooler.dense.weight, base.pooler.dense.weight)
    model.save_pretrained(tmp_path / "head")
    again, info = fastbert.BertModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert sorted(info["unexpected_keys"]) == ["classifier.bias", "classifier.weight"]
    assert torch.equal(again.encoder.layer[0].attention.qkv.weight, base.encoder.layer[0].attention.qkv.weight)


def test_wrong_labels_are_named():
    model = fastbert.BertForSequenceClassification(fastbert.BertConfig(**SMALL))
    ids = torch.ones(2, 3).long()
    with pytest.raises(IndexError, match="label 2 is outside the 2 classes"):
        model(ids, labels=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="multi_label_classification: labels have shape"):
        model(ids, labels=torch.ones(2))
    model.config = model.config.replace(problem_type="ranking")
    with pytest.raises(ValueError, match="'ranking'"):
        model(ids, labels=torch.ones(2))


# Mutants: the head's own mistakes must not pass the fp64 test.


def _relu_in_the_transform(ours):
    ours.cls.predictions.transform.act = torch.relu


def _decoder_bias_lost(ours):
    ours.cls.predictions.decoder.bias = None


def _last_token_pooled(ours):
    ours.bert.pooler.forward = lambda h, batch: torch.tanh(ours.bert.pooler.dense(h[batch.cu_seqlens[1:].long() - 1]))


def _erf_for_tanh(ours):
    ours.predictions.act = torch.nn.functional.gelu


def _order_reversed(ours):
    head = ours.sop_classifier.forward
    ours.sop_classifier.forward = lambda pooled: head(pooled).flip(-1)


def _tanh_for_erf(ours):
    head = ours.lm_head
    head.forward = lambda h: head.decoder(head.layer_norm(gelu(head.dense(h), approximate="tanh")))


def _relu_for_tanh(ours):
    ours.classifier.act = torch.relu


def _labels_shifted(ours):
    forward = ours.forward
    ours.forward = lambda labels, **rest: forward(labels=labels.roll(1, dims=1), **rest)


def _classifier_without_tanh(ours):
    ours.classifier.act = torch.relu


def _tanh_gelu_in_the_classifier(ours):
    ours.classifier.act = activation("gelu_new")


def _positions_from_zero(ours):
    ours.base_model.padded_positions = lambda ids, shape: None


def _relu_skipped(ours):
    ours.pre_classifier = torch.nn.Sequential(ours.pre_classifier, torch.nn.Softplus())


def _act_of_the_config(ours):
    ours.lm_head.forward = lambda h: ours.lm_head.decoder(ours.lm_head.layer_norm(torch.relu(ours.lm_head.dense(h))))


@pytest.mark.parametrize(
    ("name", "mutate"),
    [
        ("BertForMaskedLM", _relu_in_the_transform),
        ("BertForMaskedLM", _decoder_bias_lost),
        ("BertForSequenceClassification", _last_token_pooled),
        ("BertForNextSentencePrediction", _last_token_pooled),
        ("BertForMultipleChoice", _last_token_pooled),
        ("BertForTokenClassification", _labels_shifted),
        ("AlbertForMaskedLM", _erf_for_tanh),
        ("AlbertForPreTraining", _order_reversed),
        ("MPNetForMaskedLM", _tanh_for_erf),
        ("MPNetForSequenceClassification", _relu_for_tanh),
        ("RobertaForSequenceClassification", _classifier_without_tanh),
        ("RobertaForTokenClassification", _positions_from_zero),
        ("RobertaForMaskedLM", _act_of_the_config),
        ("DistilBertForSequenceClassification", _relu_skipped),
        ("DistilBertForMultipleChoice", _relu_skipped),
        ("ElectraForSequenceClassification", _tanh_gelu_in_the_classifier),
        ("ElectraForPreTraining", _labels_shifted),
    ],
)
def test_mutant_fails(name, mutate, tmp_path):
    head = next(h for h in HEADS if h.name == name)
    ours, theirs = pair(head, tmp_path, 0)
    mutate(ours)
    inputs, labels = inputs_of(head, 0)
    a = results(head, ours, inputs, labels, torch.float64, ours=True)
    b = results(head, theirs, inputs, labels, torch.float64, ours=False)
    assert max((a[k] - b[k]).abs().max().item() for k in b if k in a and "grad" not in k) > 1e-6


def test_a_head_says_what_its_encoder_runs_on():
    model = fastbert.BertForMaskedLM(fastbert.BertConfig(**SMALL))
    assert model.execution_plan() == model.bert.execution_plan()
    assert "autograd records" in model.execution_plan()
    with torch.no_grad():
        assert "training mode" in model.train().execution_plan()
        assert model.eval().execution_plan() == model.bert.execution_plan()
        assert "autograd" not in model.execution_plan()
