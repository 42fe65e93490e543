"""Code written for `transformers`, with the import changed: features, fine-tuning, NER, sentence pairs."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import fastbert
from fastbert import use_backend

SENTENCES = [
    ("A moving and clever film.", 1),
    ("I want those two hours of my life back.", 0),
    ("The cast is superb from the first scene to the last, and the music stays with you.", 1),
    ("Dull.", 0),
    ("Beautifully shot, honest, and funnier than it has any right to be.", 1),
    ("The plot collapses halfway through and nobody on screen seems to mind.", 0),
    ("See it twice.", 1),
    ("A lazy sequel that forgets why the original worked.", 0),
]


@pytest.fixture(scope="module")
def tokenizer():
    from fastbert.hub import DEFAULT_MODEL, resolve

    return transformers.AutoTokenizer.from_pretrained(resolve(DEFAULT_MODEL))


@pytest.fixture
def padded(tokenizer):
    texts, labels = zip(*SENTENCES, strict=True)
    return tokenizer(list(texts), padding=True, return_tensors="pt"), torch.tensor(labels)


def test_cls_features(minilm, padded):
    features = []
    for BertModel in (fastbert.BertModel, transformers.BertModel):
        model = BertModel.from_pretrained(minilm).eval()
        with torch.no_grad():
            outputs = model(**padded[0])
        features.append(outputs.last_hidden_state[:, 0])
    torch.testing.assert_close(*features, rtol=0, atol=5e-6)


def fine_tune(library, minilm, padded, dtype, epochs=3):
    """Three epochs of AdamW at 2e-5 in batches of four; the losses."""
    torch.manual_seed(0)
    inputs, labels = padded
    model = library.BertForSequenceClassification.from_pretrained(
        minilm, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    ).to(dtype)
    with torch.no_grad():  # the classifier is fresh: the same numbers on both sides
        model.classifier.weight.copy_(torch.randn(2, 384, generator=torch.Generator().manual_seed(1)) * 0.02)
    model.train()
    no_decay = ("bias", "LayerNorm.weight")
    groups = [
        {"params": [p for n, p in model.named_parameters() if not n.endswith(no_decay)], "weight_decay": 0.01},
        {"params": [p for n, p in model.named_parameters() if n.endswith(no_decay)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=2e-5)
    losses = []
    for _ in range(epochs):
        for rows in torch.arange(len(labels)).split(4):
            batch = {k: v[rows] for k, v in inputs.items()}
            outputs = model(**batch, labels=labels[rows])
            outputs.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(outputs.loss.item())
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:.*no weights for")
def test_fine_tuning_follows_hugging_face_step_by_step(minilm, padded):
    ours = fine_tune(fastbert, minilm, padded, torch.float64)
    theirs = fine_tune(transformers, minilm, padded, torch.float64)
    assert ours[-1] < ours[0]
    assert len(ours) == 6
    assert ((ours - theirs).abs() / theirs).max() < 1e-10


@pytest.mark.filterwarnings("ignore:.*no weights for")
def test_ner(minilm, tokenizer):
    labels = ["O", "B-PER", "I-PER", "B-LOC"]
    sentences = [
        (["Ada", "Lovelace", "lived", "in", "London", "."], [1, 2, 0, 0, 3, 0]),
        (["Paris", "waited", "for", "Marie", "Curie"], [3, 0, 0, 1, 2]),
        (["the", "ferry", "was", "late"], [0, 0, 0, 0]),
    ]
    batch = tokenizer([words for words, _ in sentences], is_split_into_words=True, padding=True, return_tensors="pt")
    targets = torch.full_like(batch["input_ids"], -100)
    for row, (_, tags) in enumerate(sentences):
        for column, word in enumerate(batch.word_ids(row)):
            if word is not None:
                targets[row, column] = tags[word]
    model = fastbert.BertForTokenClassification.from_pretrained(minilm, id2label=dict(enumerate(labels)))
    assert model.config.num_labels == 4
    model.train()
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(12):
        loss = model(**batch, labels=targets).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    predicted = model.eval()(**batch).logits.argmax(-1)
    assert torch.equal(predicted[targets != -100], targets[targets != -100])
    assert model.config.id2label[int(predicted[0, 1])] == "B-PER"


def test_sentence_pairs(minilm, tokenizer):
    first = ["A ferry in the storm.", "Bake the bread."]
    second = ["The boat did not sail because of the weather.", "It rose well."]
    batch = tokenizer(first, second, padding=True, return_tensors="pt")
    assert batch["token_type_ids"].max() == 1
    outputs = []
    for library in (fastbert, transformers):
        model = library.BertModel.from_pretrained(minilm).eval()
        with torch.no_grad():
            outputs.append(model(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])[1])
    torch.testing.assert_close(*outputs, rtol=0, atol=5e-6)


@pytest.mark.parametrize("head", ["BertForSequenceClassification", "BertForMaskedLM"])
@pytest.mark.filterwarnings("ignore:.*activation_checkpointing_enable:FutureWarning")
def test_trainer_takes_our_models(head, tmp_path):
    """Hugging Face's Trainer: checkpointing of activations, evaluation with metrics, saving, the best model again."""
    config = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"intermediate_size": 64, "max_position_embeddings": 32, "initializer_range": 0.1}
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    theirs = getattr(transformers, head)(transformers.BertConfig(**config)).double()
    ours = getattr(fastbert, head)(fastbert.BertConfig(**config)).double()
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(5, 60, (24, 12)).tolist()
    labels = [i % 2 for i in range(24)] if "Sequence" in head else ids
    rows = [{"input_ids": x, "attention_mask": [1] * 12, "labels": y} for x, y in zip(ids, labels, strict=True)]
    curves = []
    for name, model in (("ours", ours), ("theirs", theirs)):
        arguments = transformers.TrainingArguments(
            tmp_path / name, num_train_epochs=2, per_device_train_batch_size=8, logging_steps=1, save_strategy="epoch",
            eval_strategy="epoch", load_best_model_at_end=True, gradient_checkpointing=True, report_to="none",
            disable_tqdm=True, use_cpu=True, learning_rate=1e-3,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, train_dataset=rows, eval_dataset=rows[:8],
            compute_metrics=lambda p: {"logits": float(p.predictions.mean())},
        )  # fmt: skip
        trainer.train()
        history = trainer.state.log_history
        curves.append([x[k] for x in history for k in ("loss", "eval_loss", "eval_logits") if k in x])
    assert len(curves[0]) == 6 + 4
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)
    assert curves[0][0] != curves[0][5]


def test_half_padding_costs_half_the_flops():
    """Counted, not timed: rows of which half the positions are padding."""
    config = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256, "num_hidden_layers": 2}
    config |= {"vocab_size": 50, "max_position_embeddings": 64}
    ids = torch.randint(5, 50, (8, 64))
    mask = torch.arange(64).expand(8, 64) < 32
    flops = {}
    for library, extra in ((fastbert, {}), (transformers, {"attn_implementation": "eager"})):
        model = library.BertModel(library.BertConfig(**config, **extra), add_pooling_layer=False).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad(), use_backend("reference"):
            model(ids, attention_mask=mask)
        flops[library] = counter.get_total_flops()
    linear, square = 8 * 64 * 2 * 2 * (4 * 64 * 64 + 2 * 64 * 256), 8 * 64 * 64 * 2 * 2 * 2 * 64
    assert flops[transformers] == linear + square
    assert flops[fastbert] == linear // 2 + square // 4
