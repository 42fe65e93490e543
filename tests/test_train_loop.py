"""The loop: what a step computes, held against plain PyTorch; schedules, groups, LAMB; what a run leaves."""

from __future__ import annotations

import copy
import json
from typing import ClassVar

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from tiny_training import OwnUnits, Steps, arguments, classifier, items, tagger, token_items
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForSequenceClassification,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
)
from transformers.trainer_pt_utils import get_parameter_names

from fastbert.models import AlbertConfig, AlbertForMaskedLM, BertConfig, BertForPreTraining, BertModel
from fastbert.train import clock as clock_module
from fastbert.train.arguments import TrainArguments
from fastbert.train.lamb import Lamb
from fastbert.train.loop import train
from fastbert.train.objectives.heads import SequenceClassification, TokenClassification
from fastbert.train.optim import parameter_groups, undecayed
from fastbert.train.options import from_mapping, read_toml
from fastbert.train.schedule import Schedule
from fastbert.train.stepper import NonFinite


def distance(a: torch.nn.Module, b: torch.nn.Module) -> float:
    """Greatest difference of two models' weights."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((p.double() - q.double()).detach().abs().max()) for p, q in pairs)


def evaluation(model):
    batch = Steps(items(16, seed=5)).collate(list(range(16)))
    with torch.no_grad():
        logits = model.logits(model.base_model.encode_packed(batch.packed))
    labels = batch.labels["labels"]
    return {
        "loss": float(cross_entropy(logits, labels)),
        "accuracy": float((logits.argmax(1) == labels).double().mean()),
    }


# what a step computes


@pytest.mark.parametrize("micro", [1, 3, 8])
def test_accumulation_equals_the_big_batch(micro):
    whole, parts = tagger().double(), tagger().double()
    given = {"max_grad_norm": 0.1, "num_train_epochs": 2.0}
    data = token_items()
    train(whole, TokenClassification(), Steps(data, 12, 12, token_fields=("labels",)), arguments(**given))
    train(parts, TokenClassification(), Steps(data, 12, micro, token_fields=("labels",)), arguments(**given))
    assert distance(whole, parts) < 1e-12


def test_mean_of_micro_batch_means_would_not_equal_it():
    """The mutant: each micro-batch divided by its own units."""

    whole, parts = tagger().double(), tagger().double()
    data = token_items()
    train(whole, TokenClassification(), Steps(data, 12, 12, token_fields=("labels",)), arguments())
    train(parts, OwnUnits(), Steps(data, 12, 3, token_fields=("labels",)), arguments())
    assert distance(whole, parts) > 1e-5


def test_run_equals_plain_pytorch():
    ours, theirs = classifier(0.0).double(), classifier(0.0).double()
    loader = Steps(items(), 8)
    given = arguments(warmup_steps=2, max_grad_norm=0.5, max_steps=8)
    history = train(ours, SequenceClassification(), loader, given).history

    no_decay = [p for n, p in theirs.named_parameters() if "bias" in n or "LayerNorm" in n]
    decay = [p for p in theirs.parameters() if not any(p is q for q in no_decay)]
    groups = [{"params": decay, "weight_decay": 0.01}, {"params": no_decay, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=5e-3, foreach=False, fused=False)
    schedule = get_linear_schedule_with_warmup(optimizer, 2, 8)
    losses, norms, rates, step = [], [], [], 0
    for epoch in range(3):
        for (batch,) in loader.steps(epoch):
            if step == 8:
                break
            logits = theirs.logits(theirs.base_model.encode_packed(batch.packed))
            loss = cross_entropy(logits, batch.labels["labels"])
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)))
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            step += 1
    assert [r["loss"] for r in history] == pytest.approx(losses, rel=1e-10)
    assert [r["grad_norm"] for r in history] == pytest.approx(norms, rel=1e-10)
    assert [r["learning_rate"] for r in history] == pytest.approx(rates, rel=1e-12)
    assert distance(ours, theirs) < 1e-11


def test_it_learns():
    model = classifier()
    before = evaluation(model.eval())["loss"]
    train(model, SequenceClassification(), Steps(items(64)), arguments(num_train_epochs=8.0))
    after = evaluation(model)
    assert not model.training
    assert after["loss"] < 0.5 * before
    assert after["accuracy"] > 0.8


def test_callers_random_numbers_go_on():
    model = classifier()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    train(model, SequenceClassification(), Steps(items()), arguments(max_steps=2))
    assert torch.equal(torch.rand(4), expected)


def test_seed_decides_the_dropout():
    def trained(seed, dropout):
        model = classifier(dropout)
        train(model, SequenceClassification(), Steps(items()), arguments(seed=seed, max_steps=3))
        return model

    assert distance(trained(1, 0.1), trained(1, 0.1)) == 0.0
    assert distance(trained(1, 0.1), trained(2, 0.1)) > 0.0
    assert distance(trained(1, 0.0), trained(2, 0.0)) == 0.0


def test_gradient_checkpointing_changes_no_bit():
    plain, saving = classifier(), classifier()
    train(plain, SequenceClassification(), Steps(items()), arguments(max_steps=3))
    train(saving, SequenceClassification(), Steps(items()), arguments(max_steps=3, gradient_checkpointing=True))
    assert distance(plain, saving) == 0.0
    assert not saving.is_gradient_checkpointing


def test_frozen_parameters_stay():
    model = classifier()
    model.bert.embeddings.requires_grad_(False)
    before = copy.deepcopy(model.bert.embeddings.state_dict())
    train(model, SequenceClassification(), Steps(items()), arguments(max_steps=2, weight_decay=0.5, ema_decay=0.5))
    assert all(torch.equal(v, before[k]) for k, v in model.bert.embeddings.state_dict().items())
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        train(model, SequenceClassification(), Steps(items()), arguments(max_steps=2))


def test_half_weights_are_widened():
    model = classifier().to(torch.bfloat16)
    train(model, SequenceClassification(), Steps(items()), arguments(max_steps=1))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_fp32(precision):
    runs = {}
    for name in ("fp32", precision):
        model = classifier(0.0)
        given = {} if name == "fp32" else {name: True}
        history = train(model, SequenceClassification(), Steps(items()), arguments(**given)).history
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        runs[name] = torch.tensor([r["loss"] for r in history])
    error = (runs["fp32"] - runs[precision]).abs().max()
    assert 0.0 < error < 0.05 * runs["fp32"].mean()  # not the same bits: it did round


def test_fp16_overflow_skips_the_step():
    class Loud(SequenceClassification):
        """Gradients that overflow under the first loss scales, 2^16 and 2^15."""

        def loss(self, model, batch):
            loss = super().loss(model, batch)
            return type(loss)({k: v * 2e3 for k, v in loss.sums.items()}, loss.metrics)

    model = classifier(0.0)
    before = copy.deepcopy(model)
    history = train(model, Loud(), Steps(items()), arguments(fp16=True, max_steps=1)).history
    assert history[0]["grad_norm"] is None  # not finite
    assert distance(model, before) == 0.0


def test_averages():
    plain, averaged = classifier(0.0).double(), classifier(0.0).double()
    expected, seen = copy.deepcopy(plain), []
    weights = []
    loader = Steps(items())
    for steps in (1, 2, 3):  # the raw weights after each step
        model = classifier(0.0).double()
        schedule = {"lr_scheduler_type": "constant", "max_steps": steps}
        train(model, SequenceClassification(), loader, arguments(**schedule))
        weights.append(model)
    given = arguments(lr_scheduler_type="constant", max_steps=3, ema_decay=0.9, eval_strategy="steps", eval_steps=3)

    def evaluate(model):
        seen.append(copy.deepcopy(model))
        return {"loss": 0.0}

    train(averaged, SequenceClassification(), loader, given, evaluate=evaluate)
    for model in weights:
        for e, p in zip(expected.parameters(), model.parameters(), strict=True):
            e.data.mul_(0.9).add_(p.data, alpha=0.1)
    assert distance(seen[0], expected) < 1e-13
    assert distance(averaged, expected) < 1e-13
    assert distance(weights[-1], expected) > 1e-4


# schedules, groups, LAMB

HF_SCHEDULES = {
    "linear": get_linear_schedule_with_warmup,
    "cosine": get_cosine_schedule_with_warmup,
    "polynomial": lambda o, w, n: get_polynomial_decay_schedule_with_warmup(o, w, n, lr_end=0.0, power=2.0),
    "constant": lambda o, w, n: get_constant_schedule_with_warmup(o, w),
}


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("kind", list(HF_SCHEDULES))
def test_schedule_is_hugging_faces(kind, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    theirs = HF_SCHEDULES[kind](optimizer, warmup, 10)
    ours = Schedule(kind, 10, warmup, power=2.0)
    for step in range(11):  # past the end their cosine rises again
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12), step
        optimizer.step()
        theirs.step()


def test_schedule_ends_where_it_is_told():
    assert Schedule("linear", 10, end=0.02)(10) == pytest.approx(0.02)
    assert Schedule("cosine", 10, end=0.5)(5) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="warm-up of 11 is longer"):
        Schedule("linear", 10, 11)


def test_time_budget(monkeypatch):
    """Every look at the clock takes half a second: the rate follows it, and the run ends at its budget."""
    now = iter(i * 0.5 for i in range(10_000))
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: next(now))
    given = arguments(time_budget="1m", warmup_steps=0.1, lr_scheduler_type="linear")
    result = train(classifier(), SequenceClassification(), Steps(items()), given)
    assert result.ended == "time budget"
    rates = [r["learning_rate"] / 5e-3 for r in result.history]
    times = [r["seconds"] for r in result.history]
    assert rates[0] < rates[1] < 1.0
    assert rates[-1] < 0.1
    top = rates.index(max(rates))
    assert 0.05 < times[top] / 60 < 0.15
    assert 60 <= result.metrics["train_seconds"] < 64


def test_no_decay_as_hugging_face():
    with torch.device("meta"):
        model = BertForPreTraining(BertConfig())
    decayed = {n for n, _ in model.named_parameters()} - undecayed(model)
    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    theirs = set(get_parameter_names(model, [torch.nn.LayerNorm], patterns))
    assert decayed == theirs & set(dict(model.named_parameters()))
    assert any("embeddings" in n for n in decayed)
    assert not any("LayerNorm" in n or "bias" in n for n in decayed)


def test_layer_wise_rates():
    model = classifier()
    groups = parameter_groups(model, arguments(learning_rate=1.0, layer_wise_lr_decay=0.5))
    rates = {name: group["lr"] for group in groups for name in group["names"]}
    assert len(rates) == len(list(model.parameters()))
    expected = {"classifier.weight": 1.0, "bert.pooler.dense.bias": 1.0, "bert.embeddings.LayerNorm.weight": 0.125}
    expected |= {"bert.encoder.layer.1.attention.qkv.weight": 0.5, "bert.encoder.layer.0.attention.qkv.bias": 0.25}
    assert {name: rates[name] for name in expected} == expected

    with torch.device("meta"):
        shared = AlbertForMaskedLM(AlbertConfig(num_hidden_layers=3))
    rates = {n: g["lr_scale"] for g in parameter_groups(shared, arguments(layer_wise_lr_decay=0.5)) for n in g["names"]}
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0.feed_forward.output.weight"
    assert rates[layer] == 0.5
    assert rates["albert.encoder.embedding_hidden_mapping_in.weight"] == 0.5**4
    assert rates["predictions.dense.weight"] == 1.0


def plain_lamb(parameters, gradients, lr, betas, eps, decays, adapts, corrected=True):
    """Algorithm 2 of the paper, one tensor at a time."""
    state = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    for t, grads in enumerate(gradients, start=1):
        for i, (p, g) in enumerate(zip(parameters, grads, strict=True)):
            m = betas[0] * state[i][0] + (1 - betas[0]) * g
            v = betas[1] * state[i][1] + (1 - betas[1]) * g * g
            state[i] = m, v
            if corrected:
                m, v = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
            u = m / (v.sqrt() + eps) + decays[i] * p
            norms = float(p.norm()), float(u.norm())
            ratio = norms[0] / norms[1] if adapts[i] and min(norms) > 0 else 1.0
            p -= lr * ratio * u
    return parameters


@pytest.mark.parametrize("wrong", [None, "correction", "adapted biases", "no decay"])
def test_lamb(wrong):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    start = [draw(4, 3), draw(3), torch.zeros(2, 2, dtype=torch.float64)]  # zeros: the ratio is 1
    gradients = [[draw(4, 3), draw(3), draw(2, 2)] for _ in range(5)]
    ours = [torch.nn.Parameter(p.clone()) for p in start]
    groups = [{"params": [ours[0], ours[2]], "weight_decay": 0.1}, {"params": [ours[1]], "adapt": False}]
    optimizer = Lamb(groups, lr=0.05, betas=(0.9, 0.99), eps=1e-6)
    for grads in gradients:
        for p, g in zip(ours, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
    decays = [0.0 if wrong == "no decay" else 0.1, 0.0, 0.1]
    adapts = [True, wrong == "adapted biases", True]
    theirs = [p.clone() for p in start]
    plain_lamb(theirs, gradients, 0.05, (0.9, 0.99), 1e-6, decays, adapts, corrected=wrong != "correction")
    error = max(float((p - q).abs().max().detach()) for p, q in zip(ours, theirs, strict=True))
    assert error < 1e-13 if wrong is None else error > 1e-4


def test_lamb_in_the_loop_learns():
    model = classifier()
    given = arguments(optim="lamb", learning_rate=2e-2, num_train_epochs=8.0)
    history = train(model, SequenceClassification(), Steps(items(64)), given).history
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]


# evaluation, stopping, errors


def test_early_stopping_and_best(tmp_path):
    scores = iter([0.5, 0.7, 0.6, 0.7, 0.65, 0.9])
    seen = []

    def evaluate(model):
        assert not model.training
        seen.append(copy.deepcopy(model))
        return {"accuracy": next(scores)}

    given = arguments(
        output_dir=str(tmp_path), num_train_epochs=6.0, load_best_model_at_end=True, metric_for_best_model="accuracy",
        early_stopping_patience=3, save_total_limit=1,
    )  # fmt: skip
    result = train(classifier(), SequenceClassification(), Steps(items()), given, evaluate=evaluate)
    assert (result.ended, result.steps) == ("early stopping", 15)
    assert result.best_checkpoint == tmp_path / "checkpoint-6"
    assert distance(result.model, seen[1]) == 0.0
    assert distance(result.model, seen[-1]) > 0.0
    assert result.metrics["eval_accuracy"] == 0.7
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-15", "checkpoint-6"]


def test_evaluation_sees_the_weights_of_its_step():
    """In `eval()` without autograd an engine may compute: it must not hold on to earlier weights."""
    seen = []

    def evaluate(model):
        batch = Steps(items(16, seed=5)).collate(list(range(16))).packed
        with torch.no_grad():
            fast = model.logits(model.base_model.encode_packed(batch))
        with torch.enable_grad():
            slow = model.logits(model.base_model.encode_packed(batch)).detach()
        seen.append((fast, slow))
        return {"loss": 0.0}

    given = arguments(eval_strategy="steps", eval_steps=1, max_steps=4, ema_decay=0.5, lr_scheduler_type="constant")
    train(classifier(), SequenceClassification(), Steps(items()), given, evaluate=evaluate)
    assert len(seen) == 4
    for fast, slow in seen:
        assert torch.allclose(fast, slow, atol=1e-5)
    assert not torch.allclose(seen[0][0], seen[1][0], atol=1e-4)


def test_small_gains_count_as_none():
    losses = iter([1.0, 0.95, 0.6, 0.55, 0.5, 0.1])
    given = arguments(num_train_epochs=6.0, early_stopping_patience=2, early_stopping_threshold=0.2)
    result = train(
        classifier(), SequenceClassification(), Steps(items()), given, evaluate=lambda model: {"loss": next(losses)}
    )
    assert (result.ended, result.steps) == ("early stopping", 15)


def test_unknown_metric():
    given = arguments(early_stopping_patience=1, metric_for_best_model="f1")
    with pytest.raises(ValueError, match=r"'eval_f1', but the evaluation gives eval_loss"):
        train(classifier(), SequenceClassification(), Steps(items()), given, evaluate=lambda model: {"loss": 1.0})


def test_best_without_evaluation():
    with pytest.raises(ValueError, match="early_stopping_patience is 2, but there is nothing to evaluate on"):
        train(classifier(), SequenceClassification(), Steps(items()), arguments(early_stopping_patience=2))


def test_best_that_is_never_found(tmp_path):
    given = arguments(output_dir=str(tmp_path), load_best_model_at_end=True)
    with pytest.raises(FileNotFoundError, match="no evaluation gave a finite eval_loss"):
        train(classifier(), SequenceClassification(), Steps(items()), given, evaluate=lambda m: {"loss": float("nan")})


def test_nan_stops_and_keeps_the_batch(tmp_path):
    class Poisoned(SequenceClassification):
        def loss(self, model, batch):
            loss = super().loss(model, batch)
            bad = 5 in batch.index.tolist()
            return type(loss)({k: v * float("nan") if bad else v for k, v in loss.sums.items()}, loss.metrics)

    order = [batch.index.tolist() for step in Steps(items(), 4, 2).steps(0) for batch in step]
    step = next(i for i, rows in enumerate(order) if 5 in rows) // 2
    assert step > 0  # otherwise there is no good checkpoint to speak of
    model = classifier()
    given = arguments(output_dir=str(tmp_path), save_strategy="steps", save_steps=1, logging_steps=100)
    with pytest.raises(NonFinite) as caught:
        train(model, Poisoned(), Steps(items(), 4, 2), given)
    told = str(caught.value)
    path = tmp_path / f"nonfinite-step-{step + 1}.safetensors"
    assert f"step {step + 1} " in told
    assert "classification is nan" in told
    assert str(path) in told
    assert f"checkpoint-{step}" in told
    kept = load_file(path)
    assert [kept[f"{i}.index"].tolist() for i in range(2)] == order[2 * step : 2 * step + 2]
    assert {"0.input_ids", "0.cu_seqlens", "1.labels.labels"} <= set(kept)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert max(int(p.name.split("-")[1]) for p in tmp_path.glob("checkpoint-*")) == step


def test_arguments_refuse_what_is_wrong():
    wrong = {
        "learning_rate": (-1.0, "nan", True), "warmup_steps": (1.5,), "batch_size": (0, 2.5), "bf16": ("yes",),
        "optim": ("sgd",), "ema_decay": (1.0,), "time_budget": ("soon", 0, "-3m"), "max_steps": (0,), "seed": (-1,),
        "layer_wise_lr_decay": (0.0, 1.1), "lr_scheduler_type": ("stairs",), "save_total_limit": (0,),
    }  # fmt: skip
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=name if name != "time_budget" else "duration"):
                TrainArguments(**{name: value})
    for pair in ({"batch_size": 1, "batch_tokens": 2}, {"bf16": True, "fp16": True}, {"resume": True}):
        with pytest.raises(ValueError, match="|".join(pair)):
            TrainArguments(**pair)
    with pytest.raises(ValueError, match=r"time_budget='1m' and max_steps=5"):
        TrainArguments(time_budget="1m", max_steps=5)
    assert TrainArguments(time_budget="1.5h").budget_s == 5400


def test_toml(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('learning-rate = 1e-3\nbatch_tokens = 4096\nlr_scheduler_type = "cosine"\n')
    read = from_mapping(TrainArguments, read_toml(path), str(path))
    assert (read.learning_rate, read.batch_tokens, read.lr_scheduler_type) == (1e-3, 4096, "cosine")
    with pytest.raises(ValueError, match=r"run.toml sets 'learning_rat'.*nearest: learning_rate"):
        from_mapping(TrainArguments, {"learning_rat": 1.0}, "run.toml")
    with pytest.raises(ValueError, match=r"run.toml: learning_rate is '1'; it must be a finite number"):
        from_mapping(TrainArguments, {"learning_rate": "1"}, "run.toml")
    path.write_text("learning_rate = \n")
    with pytest.raises(ValueError, match=r"run.toml is not TOML.*line 1"):
        read_toml(path)


# what a run leaves


def test_log_curves_card_and_folder(tmp_path, capfd):
    model = classifier()
    given = arguments(output_dir=str(tmp_path), quiet=False)
    result = train(model, SequenceClassification(), Steps(items()), given, evaluate=evaluation)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == result.history
    assert [r["step"] for r in lines if "loss" in r] == list(range(1, 10))
    assert [r["step"] for r in lines if "eval_accuracy" in r] == [3, 6, 9]
    assert {"epoch", "learning_rate", "grad_norm", "tokens_per_second", "mfu", "seconds"} <= set(lines[0])
    assert json.loads((tmp_path / "metrics.json").read_text()) == result.metrics
    assert result.metrics["eval_loss"] == lines[-1]["eval_loss"]
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    head = yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])
    assert head == {"library_name": "transformers", "tags": ["fastbert"]}
    told = capfd.readouterr().err
    assert "step 9/9  epoch 3.00  loss" in told
    assert "eval accuracy" in told
    batch = Steps(items(1)).collate([0])
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)(batch.packed.input_ids[None]).logits
    ours = model.logits(model.base_model.encode_packed(batch.packed))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_live_line_on_a_terminal(monkeypatch):
    shown = Console(force_terminal=True, width=200, file=open("/dev/null", "w"), record=True)  # noqa: SIM115
    monkeypatch.setattr("fastbert.train.report.Console", lambda **given: shown)
    train(classifier(), SequenceClassification(), Steps(items()), arguments(quiet=False))
    told = shown.export_text()
    assert "9/9" in told
    assert "tokens/s" in told
    assert "loss" in told


def test_quiet_is_quiet(capfd):
    train(classifier(), SequenceClassification(), Steps(items()), arguments(max_steps=2))
    told = capfd.readouterr()
    assert told.out + told.err == ""


def test_tensorboard(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    given = arguments(output_dir=str(tmp_path), report_to="tensorboard")
    history = train(classifier(), SequenceClassification(), Steps(items()), given).history
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([r["loss"] for r in history])


def test_an_encoder_becomes_a_folder_that_embeds(minilm, tmp_path):
    """The base model alone, trained on nothing but its first token; the folder loads as texts to vectors."""
    from fastbert.embedder import Embedder
    from fastbert.tokenizer import Tokenizer
    from fastbert.train.objectives.loss import Loss, Objective

    class FirstToken(Objective):
        weights: ClassVar = {"square": 1.0}

        def counts(self, batch):
            return {"square": torch.tensor(batch.num_items)}

        def loss(self, model, batch):
            return Loss({"square": model.encode_packed(batch.packed).first_token.square().mean(1).sum()})

    model, tokenizer = BertModel.from_pretrained(minilm), Tokenizer.from_folder(minilm, 512)
    loader = Steps([{"input_ids": ids} for ids in tokenizer.encode(["a cat", "the dog runs", "so"]).ids], 3)
    train(model, FirstToken(), loader, arguments(output_dir=str(tmp_path), max_steps=1), tokenizer=tokenizer)
    vectors = Embedder.from_pretrained(tmp_path).encode(["a cat", "the dog"])
    assert vectors.shape == (2, 384)
