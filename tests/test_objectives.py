"""Each objective for twenty steps beside the same one in plain PyTorch on a padded Hugging Face model, and mutants."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import plain_objectives as plain
import pytest
import torch
import transformers
from plain_objectives import N, items_of, kinds
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from twin_models import ALBERT, DISTILBERT, ELECTRA, SMALL, V, same

import fastbert
from fastbert.models.electra_pair import ElectraPair, generator_config
from fastbert.pooling import Pooling
from fastbert.train import objectives
from fastbert.train.batch import TrainBatch, collate
from fastbert.train.masking import Masking
from fastbert.train.objectives import Loss

NUM_STEPS = 20


# The two sides of each objective.


class Vectors(nn.Module):
    """A mean-pooled encoder."""

    def __init__(self, base_model):
        super().__init__()
        self.base_model = base_model

    def logits(self, encoded):
        return Pooling(("mean",))(encoded.hidden_TD, encoded.batch.cu_seqlens)


Pair = tuple[Any, Any, Any]  # our model, their model(s), what of theirs is trained


def one(name: str, config: dict[str, Any] = SMALL) -> Callable[[torch.dtype], Pair]:
    def make(dtype):
        ours, theirs = same(name, config, dtype)
        return ours, theirs, theirs

    return make


def vectors(dtype) -> Pair:
    torch.manual_seed(0)
    theirs = transformers.BertModel(transformers.BertConfig(**SMALL), add_pooling_layer=False).to(dtype).train()
    base = fastbert.BertModel(fastbert.BertConfig(**SMALL), add_pooling_layer=False).to(dtype)
    base.load_state_dict(theirs.state_dict())
    return Vectors(base.train()), theirs, theirs


def electra(dtype) -> Pair:
    config = fastbert.ElectraConfig.from_dict(ELECTRA)
    small = generator_config(config, 0.5)
    sizes = {k: getattr(small, k) for k in ("hidden_size", "num_attention_heads", "intermediate_size")}
    discriminator, d = same("ElectraForPreTraining", ELECTRA, dtype)
    generator, g = same("ElectraForMaskedLM", ELECTRA | sizes, dtype, seed=1)
    g.electra.embeddings = d.electra.embeddings
    g.generator_lm_head.weight = d.electra.embeddings.word_embeddings.weight
    theirs = nn.ModuleDict({"generator": g, "discriminator": d})
    return ElectraPair(discriminator, generator), theirs, theirs


def distilling(dtype) -> Pair:
    student, s = same("DistilBertForMaskedLM", DISTILBERT, dtype)
    teacher, t = same("BertForMaskedLM", SMALL, dtype, seed=5)
    student.taught_by = [teacher]
    return student, {"student": s, "teacher": t.eval()}, s


@dataclasses.dataclass(frozen=True)
class Case:
    objective: Callable[[Any], objectives.Objective]  # of our model
    models: Callable[[torch.dtype], Pair]
    reference: Callable[[Any, TrainBatch, Any], torch.Tensor]
    fields: dict[str, str] = dataclasses.field(default_factory=dict)
    group: int = 1

    def batch(self, step: int, token_fields=()) -> TrainBatch:
        items, index = items_of(step, self.fields, self.group)
        return collate(items, index, epoch=step, token_fields=token_fields)


LABELS3 = SMALL | {"num_labels": 3}
REGRESSION = SMALL | {"num_labels": 1}
MULTI = LABELS3 | {"problem_type": "multi_label_classification"}
MASKING = Masking(probability=0.25, seed=4)


def distillation(masked_only=False):
    return lambda model: objectives.Distillation(
        kinds(), model.taught_by[0], MASKING, masked_only=masked_only, chunk_rows=7
    )


CASES = {
    "mlm": Case(lambda m: objectives.MaskedLM(kinds(), MASKING), one("BertForMaskedLM"), plain.mlm),
    "mlm_nsp": Case(
        lambda m: objectives.MaskedLMWithNextSentence(kinds(), MASKING), one("BertForPreTraining"),
        plain.mlm_and_next_sentence, {"next_sentence_label": "binary"},
    ),
    "mlm_sop": Case(
        lambda m: objectives.MaskedLMWithSentenceOrder(kinds(), Masking(max_ngram=3, probability=0.3)),
        one("AlbertForPreTraining", ALBERT), plain.mlm_and_sentence_order, {"sentence_order_label": "binary"},
    ),
    "replaced_tokens": Case(lambda m: objectives.ReplacedTokenDetection(kinds()), electra, plain.replaced_tokens),
    "distillation": Case(distillation(), distilling, plain.triple_loss),
    "distillation_masked": Case(distillation(masked_only=True), distilling, plain.triple_loss_masked),
    "classes": Case(
        lambda m: objectives.SequenceClassification(), one("BertForSequenceClassification", LABELS3), plain.their_loss,
        {"labels": "class"},
    ),
    "regression": Case(
        lambda m: objectives.SequenceClassification(), one("BertForSequenceClassification", REGRESSION),
        plain.their_loss, {"labels": "number"},
    ),
    "multi_label": Case(
        lambda m: objectives.SequenceClassification(), one("BertForSequenceClassification", MULTI), plain.their_loss,
        {"labels": "flags"},
    ),
    "token_classes": Case(
        lambda m: objectives.TokenClassification(), one("BertForTokenClassification", LABELS3), plain.token_loss,
        {"labels": "tokens"},
    ),
    "spans": Case(
        lambda m: objectives.QuestionAnswering(), one("BertForQuestionAnswering"), plain.span_loss,
        {"start_positions": "position", "end_positions": "past"},
    ),
    "choices": Case(
        lambda m: objectives.MultipleChoice(), one("BertForMultipleChoice"), plain.choice_loss, {"labels": "choice"}, 3
    ),
    "ranking": Case(lambda m: objectives.InBatchNegatives(), vectors, plain.ranking_loss, group=2),
    "ranking_hard": Case(lambda m: objectives.InBatchNegatives(), vectors, plain.ranking_loss, group=4),
    "cosine": Case(lambda m: objectives.CosineSimilarity(), vectors, plain.cosine_loss, {"labels": "number"}, 2),
    "cosent": Case(lambda m: objectives.CoSENT(), vectors, plain.cosent_loss, {"labels": "score"}, 2),
}  # fmt: skip
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-10}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=2e-4, eps=1e-6, weight_decay=0.01)


def curves(case: Case, dtype: torch.dtype, num_steps: int, mutate: Callable[[Any], Any] | None = None):
    """The losses of both sides, each following its own updates."""
    ours, theirs, trained = case.models(dtype)
    objective = case.objective(ours)
    right = case.objective(ours)  # makes the labels of the reference
    objective = objective if mutate is None else mutate(objective)
    optimizers = optimizer_of(ours), optimizer_of(trained)
    losses = []
    for step in range(num_steps):
        batch = case.batch(step, objective.token_fields)
        a, _ = objective(ours, batch)
        b = case.reference(theirs, right.prepare(batch), case)
        losses.append((a.item(), b.item()))
        for loss, optimizer in zip((a, b), optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return torch.tensor(losses, dtype=torch.float64)


def assert_followed(curve: torch.Tensor, dtype: torch.dtype) -> None:
    ours, theirs = curve.unbind(1)
    error = ((ours - theirs) / theirs).abs()
    assert bool((error <= TOLERANCE[dtype]).all()), f"relative errors by step: {error.tolist()}"


cases = pytest.mark.parametrize("name", CASES)


@cases
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_twenty_steps_follow_plain_pytorch(name, dtype):
    curve = curves(CASES[name], dtype, NUM_STEPS)
    assert_followed(curve, dtype)
    assert float((curve[1:] - curve[:-1]).abs().min()) > 0


# Mutants: what is easily got wrong must leave the curve.


def with_weight(name: str, weight: float):
    def mutate(objective):
        objective.weights = {**objective.weights, name: weight}
        return objective

    return mutate


def overriding(**methods):
    """The objective with methods replaced; each gets the right one first."""

    def mutate(objective):
        for name, method in methods.items():
            right = getattr(objective, name)
            setattr(objective, name, lambda *args, method=method, right=right: method(right, *args))
        return objective

    return mutate


def labels_shifted(right, batch):
    out = right(batch)
    return dataclasses.replace(out, labels={**out.labels, "labels": out.labels["labels"].roll(1)})


def per_padded_position(right, batch):
    return {name: torch.tensor(N * batch.packed.max_seqlen) for name in right(batch)}


def per_item(right, batch):
    return {name: torch.tensor(N) for name in right(batch)}


def field_flipped(name):
    return lambda right, batch: right(dataclasses.replace(batch, labels={**batch.labels, name: 1 - batch.labels[name]}))


def every_sample_counts_as_replaced(right, batch, rows, logits):
    corrupted, replaced = right(batch, rows, logits)
    return corrupted, replaced.index_fill(0, rows, True)


def the_likeliest_instead_of_a_sample(right, batch, rows, logits):
    return right(batch, rows, logits * 1e4)


def without_gradient(term):
    """Right at the first step, wrong after it."""

    def loss(right, model, batch):
        made = right(model, batch)
        return Loss({k: v.detach() if k == term else v for k, v in made.sums.items()}, made.metrics)

    return loss


def setting(name, value):
    def mutate(objective):
        setattr(objective, name, value)
        return objective

    return mutate


MUTANTS = {
    "mlm-labels_shifted": overriding(prepare=labels_shifted),
    "mlm-mean_over_padding": overriding(counts=per_padded_position),
    "mlm-mean_over_items": overriding(counts=per_item),
    "mlm_nsp-weight": with_weight("nsp", 1.001),
    "mlm_nsp-flipped": overriding(prepare=field_flipped("next_sentence_label")),
    "mlm_nsp-not_trained": overriding(loss=without_gradient("nsp")),
    "mlm_sop-flipped": overriding(prepare=field_flipped("sentence_order_label")),
    "mlm_sop-mean_over_padding": overriding(counts=per_padded_position),
    "replaced_tokens-weight": with_weight("disc", 50.01),
    "replaced_tokens-mean_over_padding": overriding(counts=per_padded_position),
    "replaced_tokens-lucky_samples": overriding(corrupt=every_sample_counts_as_replaced),
    "replaced_tokens-argmax": overriding(corrupt=the_likeliest_instead_of_a_sample),
    "distillation-temperature": setting("temperature", 2.01),
    "distillation-masked_only": setting("masked_only", True),
    "replaced_tokens-generator_not_trained": overriding(loss=without_gradient("mlm")),
    "distillation-weight": with_weight("cos", 1.01),
    "distillation-cosine_not_trained": overriding(loss=without_gradient("cos")),
    "distillation_masked-all": setting("masked_only", False),
    "classes-mean_over_padding": overriding(counts=per_padded_position),
    "regression-mean_over_padding": overriding(counts=per_padded_position),
    "multi_label-mean_over_items": overriding(counts=per_item),
    "token_classes-labels_shifted": overriding(prepare=labels_shifted),
    "spans-sum": with_weight("end", 1.0),
    "spans-positions_past_the_end": overriding(counts=per_item),
    "choices-flipped": overriding(prepare=labels_shifted),
    "ranking-scale": setting("scale", 20.01),
    "cosine-mean_over_padding": overriding(counts=per_padded_position),
    "cosent-scale": setting("scale", 20.01),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_leaves_the_curve(mutant):
    case = CASES[mutant.split("-")[0]]
    with pytest.raises(AssertionError, match="relative errors"):
        assert_followed(curves(case, torch.float32, 3, MUTANTS[mutant]), torch.float32)


# Sums and counts.


def gradients(model: nn.Module) -> torch.Tensor:
    out = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return out


def of_one_forward(name: str) -> bool:
    """Losses in which the items of a forward pass meet."""
    return name.startswith(("ranking", "cosent"))


@pytest.mark.parametrize("name", [name for name in CASES if not of_one_forward(name)])
def test_micro_batches_add_up_to_the_batch(name):
    case = CASES[name]
    ours, *_ = case.models(torch.float64)
    objective = case.objective(ours)
    items, index = items_of(3, case.fields, case.group)
    whole_loss, whole_metrics = objective(ours, collate(items, index, 5, token_fields=objective.token_fields))
    whole_loss.backward()
    whole = gradients(ours)

    parts = [(0, 1), (1, 4), (4, 6)]
    batches = [
        objective.prepare(collate(items[a:b], index[a:b], 5, token_fields=objective.token_fields)) for a, b in parts
    ]
    counts = {term: sum(objective.counts(b)[term] for b in batches) for term in objective.weights}
    assert all(count.dtype == torch.int64 and count.ndim == 0 for count in counts.values())
    total, metrics = 0.0, {key: [0.0, 0.0] for key in whole_metrics}
    for batch in batches:
        loss = objective.loss(ours, batch)
        assert set(loss.sums) == set(objective.weights)
        part = objective.average(loss.sums, counts)
        part.backward()
        total += part.item()
        for key, (value, count) in loss.metrics.items():
            assert not value.requires_grad
            metrics[key][0] += float(value)
            metrics[key][1] += float(count)
    assert total == pytest.approx(whole_loss.item(), rel=1e-12)
    torch.testing.assert_close(gradients(ours), whole, rtol=1e-9, atol=1e-12)
    for key, (value, count) in metrics.items():
        assert value / max(count, 1) == pytest.approx(float(whole_metrics[key])), key


@pytest.mark.parametrize("name", ["mlm", "mlm_nsp", "replaced_tokens", "distillation", "distillation_masked"])
def test_a_batch_with_nothing_to_predict_gives_zeros(name):
    case = CASES[name]
    ours, *_ = case.models(torch.float32)
    objective = case.objective(ours)
    labels = dict.fromkeys(case.fields, -100)
    batch = collate([{"input_ids": [1, 2], "type_ids": [0, 1], **labels}], [0])
    prepared = objective.prepare(batch)
    counts = objective.counts(prepared)
    loss = objective.loss(ours, prepared)
    assert int(counts["mlm"]) == 0
    assert loss.sums["mlm"].item() == 0.0
    total, metrics = objective(ours, batch)
    total.backward()
    assert bool(gradients(ours).isfinite().all())
    assert float(metrics["mlm_accuracy"]) == 0.0
    if set(objective.weights) <= {"mlm", "nsp"}:
        assert total.item() == 0.0


def test_metrics_are_those_of_the_logits():
    case = CASES["replaced_tokens"]
    ours, *_ = case.models(torch.float32)
    objective = case.objective(ours)
    batch = objective.prepare(case.batch(0))
    labels = batch.labels["labels"]
    rows = (labels != -100).nonzero().flatten()
    with torch.no_grad():
        logits = ours.generator.logits(ours.generator.base_model.encode_packed(batch.packed).hidden_TD)[rows]
        corrupted, replaced = objective.corrupt(batch, rows, logits)
        scores = ours.discriminator.logits(ours.discriminator.base_model.encode_packed(corrupted.packed))
        _, metrics = objective(ours, case.batch(0))
    found = scores > 0
    assert bool(replaced.any())
    assert not bool(replaced[labels == -100].any())
    expected = {
        "mlm_accuracy": (logits.argmax(-1) == labels[rows]).float().mean(),
        "disc_accuracy": (found == replaced).float().mean(),
        "disc_recall": found[replaced].float().mean(),
        "replaced": replaced.float().mean(),
    }
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx({k: float(v) for k, v in expected.items()})


class Largest(TorchDispatchMode):
    """Most rows of any tensor whose last axis is the vocabulary."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.ndim == 2 and x.shape[1] == V:
                self.rows = max(self.rows, x.shape[0])
        return out


@pytest.mark.parametrize("name", ["mlm", "mlm_nsp", "mlm_sop", "replaced_tokens", "distillation"])
def test_logits_of_all_tokens_never_exist(name):
    case = CASES[name]
    ours, *_ = case.models(torch.float32)
    objective = case.objective(ours)
    items, index = items_of(0, case.fields, num=20)
    batch = collate(items, index)
    most = 7 if name == "distillation" else int(objective.counts(objective.prepare(batch))["mlm"])
    with Largest() as seen:
        objective(ours, batch)[0].backward()
    assert 0 < seen.rows <= max(most, 48)  # weights of 32 and 48 rows have no V columns, unless transposed
    assert seen.rows < batch.packed.num_tokens
    if name != "mlm":
        return
    with Largest() as seen:
        ours.logits(ours.base_model.encode_packed(batch.packed).hidden_TD)
    assert seen.rows == batch.packed.num_tokens


def test_chunks_of_the_distillation_add_up():
    case = CASES["distillation"]
    ours, *_ = case.models(torch.float64)
    found = []
    for rows in (1, 5, 10_000):
        objective = case.objective(ours)
        objective.chunk_rows = rows
        loss, _ = objective(ours, case.batch(0))
        loss.backward()
        found.append((loss.detach(), gradients(ours)))
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-9, atol=1e-12)
    assert all(p.grad is None and not p.requires_grad for p in ours.taught_by[0].parameters())
    assert not ours.taught_by[0].training


def test_autocast_keeps_losses_in_fp32():
    for name in ("mlm_nsp", "replaced_tokens", "distillation", "classes", "spans", "ranking"):
        case = CASES[name]
        ours, *_ = case.models(torch.float32)
        objective = case.objective(ours)
        exact, _ = objective(ours, case.batch(0))
        with torch.autocast("cpu", torch.bfloat16):
            prepared = objective.prepare(case.batch(0, objective.token_fields))
            loss = objective.loss(ours, prepared)
            assert all(total.dtype == torch.float32 for total in loss.sums.values()), name
            objective.average(loss.sums, objective.counts(prepared)).backward()
        assert bool(gradients(ours).isfinite().all())
        assert objective.average(loss.sums, objective.counts(prepared)).item() == pytest.approx(exact.item(), rel=0.1)


# What does not fit.


def test_missing_labels_are_named():
    objective = objectives.MaskedLMWithNextSentence(kinds())
    batch = objective.prepare(collate([{"input_ids": [1, 7, 8, 2], "sentence_order_label": 0}], [0]))
    with pytest.raises(ValueError, match=r"MaskedLMWithNextSentence needs .*next_sentence_label.*sentence_order_label"):
        objective.counts(batch)
    with pytest.raises(ValueError, match="no label fields"):
        objectives.SequenceClassification().counts(collate([{"input_ids": [1, 2]}], [0]))


def test_labels_that_do_not_fit_the_task():
    ours, *_ = CASES["classes"].models(torch.float32)
    objective = objectives.SequenceClassification()
    with pytest.raises(IndexError, match="label 3 is outside the 3 classes"):
        objective(ours, collate([{"input_ids": [1, 7, 2], "labels": 3}], [0]))
    ours.config.problem_type = "single_label_classification"
    with pytest.raises(ValueError, match=r"single_label_classification but the labels are torch\.float32"):
        objective(ours, collate([{"input_ids": [1, 7, 2], "labels": 0.5}], [0]))
    one_number, *_ = CASES["regression"].models(torch.float32)
    with pytest.raises(ValueError, match=r"regression but the labels are torch\.int64"):
        objective(one_number, collate([{"input_ids": [1, 7, 2], "labels": 1}], [0]))


@pytest.mark.parametrize(
    "objective", [objectives.InBatchNegatives(), objectives.CosineSimilarity(), objectives.CoSENT()]
)
def test_contrastive_losses_need_pairs(objective):
    ours, *_ = vectors(torch.float32)
    with pytest.raises(ValueError, match="needs 2 sequences an item, but the items have 1"):
        objective(ours, collate([{"input_ids": [1, 7, 2], "labels": 0.5}], [0]))


def test_distillation_checks_what_it_is_given():
    student, *_ = distilling(torch.float32)
    batch = collate([{"input_ids": [1, 7, 8, 2]}], [0])
    wider = fastbert.BertForMaskedLM(fastbert.BertConfig(**(SMALL | {"hidden_size": 48})))
    with pytest.raises(ValueError, match="student's hidden_size is 32 but the teacher's 48; give the term cos"):
        objectives.Distillation(kinds(), wider)(student, batch)
    no_cosine = objectives.Distillation(kinds(), wider, weights={"kl": 1.0, "mlm": 1.0, "cos": 0.0})
    loss, _ = no_cosine(student, batch)
    assert bool(loss.isfinite())
    other = fastbert.BertForMaskedLM(fastbert.BertConfig(**(SMALL | {"vocab_size": V + 1})))
    with pytest.raises(ValueError, match=f"student's vocab_size is {V} but the teacher's {V + 1}"):
        objectives.Distillation(kinds(), other)(student, batch)
    with pytest.raises(ValueError, match="weights are of kl, mlm; they must be of kl, mlm, cos"):
        objectives.Distillation(kinds(), wider, weights={"kl": 1.0, "mlm": 1.0})
    with pytest.raises(ValueError, match=r"temperature is 0\.0"):
        objectives.Distillation(kinds(), wider, temperature=0.0)


# Generator and discriminator.


@pytest.mark.parametrize(
    ("hidden", "fraction", "expected"),
    [
        (768, 1 / 3, (256, 4, 1024)),
        (256, 1 / 4, (64, 1, 256)),
        (256, 1.0, (256, 4, 1024)),
        (580, 1 / 4, (145, 1, 580)),
    ],
)
def test_generator_sizes(hidden, fraction, expected):
    config = fastbert.ElectraConfig(hidden_size=hidden, num_attention_heads=4, num_hidden_layers=7)
    small = generator_config(config, fraction)
    assert (small.hidden_size, small.num_attention_heads, small.intermediate_size) == expected
    assert (small.num_hidden_layers, small.embedding_size) == (7, config.embedding_size)


def test_generator_cannot_be_wider_or_nothing():
    config = fastbert.ElectraConfig()
    for fraction in (1.5, 0.0):
        with pytest.raises(ValueError, match=f"fraction {fraction}"):
            generator_config(config, fraction)


def test_electra_pair_shares_embeddings_and_saves_both(tmp_path):
    torch.manual_seed(0)
    pair = ElectraPair.from_config(fastbert.ElectraConfig.from_dict(ELECTRA), 0.5)
    table = pair.discriminator.electra.embeddings.word_embeddings.weight
    assert pair.generator.generator_lm_head.weight is table
    assert pair.generator.electra.embeddings is pair.discriminator.electra.embeddings
    assert pair.num_parameters() < pair.generator.num_parameters() + pair.discriminator.num_parameters()
    assert len({id(p) for p in pair.parameters()}) == len(list(pair.parameters()))

    objective, case = objectives.ReplacedTokenDetection(kinds()), CASES["replaced_tokens"]
    optimizer = optimizer_of(pair)
    objective(pair, case.batch(0))[0].backward()
    optimizer.step()
    pair.save_pretrained(tmp_path)
    again = ElectraPair.from_pretrained(tmp_path)
    assert not again.training
    for (name, a), (other, b) in zip(pair.named_parameters(), again.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b), name
    inputs = {"input_ids": torch.tensor([[1, 7, 3, 9, 2]])}
    for folder, kind in ((tmp_path, "ElectraForPreTraining"), (tmp_path / "generator", "ElectraForMaskedLM")):
        theirs = getattr(transformers, kind).from_pretrained(folder)
        ours = pair.discriminator if kind == "ElectraForPreTraining" else pair.generator
        with torch.no_grad():
            torch.testing.assert_close(ours.eval()(**inputs).logits, theirs(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_no_gradient_passes_through_samples():
    ours, *_ = electra(torch.float32)
    objective = objectives.ReplacedTokenDetection(kinds())
    objective.loss(ours, objective.prepare(CASES["replaced_tokens"].batch(0))).sums["disc"].backward()
    assert all(p.grad is None for p in ours.generator.electra.encoder.parameters())
    assert ours.generator.electra.embeddings_project.weight.grad is None
    assert ours.discriminator.electra.embeddings.word_embeddings.weight.grad is not None


def test_electra_pair_needs_tables_of_one_size():
    config = fastbert.ElectraConfig.from_dict(ELECTRA)
    with pytest.raises(ValueError, match=r"word_embeddings\.weight has shape"):
        ElectraPair(
            fastbert.ElectraForPreTraining(config), fastbert.ElectraForMaskedLM(config.replace(embedding_size=24))
        )


def test_objective_is_a_function_of_its_batch():
    case = CASES["mlm"]
    ours, *_ = case.models(torch.float32)
    objective = case.objective(ours)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = (objective(ours, case.batch(2))[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(objective.loss(ours, objective.prepare(case.batch(2))), Loss)
