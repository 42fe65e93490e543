"""Every objective in plain PyTorch, on padded batches and Hugging Face's models; and items to train on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from twin_models import V

from fastbert.train.batch import TrainBatch
from fastbert.train.draws import Places, draws
from fastbert.train.token_kinds import TokenKinds

MASK, N = 3, 6


def kinds() -> TokenKinds:
    return TokenKinds.of(MASK, torch.arange(V) < 5)


# Data: every step has other items, ragged, in segments.


def items_of(step: int, fields: dict[str, str], group: int = 1, num: int = N) -> tuple[list[dict[str, Any]], list[int]]:
    g = np.random.default_rng(step)
    items = []
    for _ in range(num):
        ids, types = [], []
        for _ in range(group):
            n = int(g.integers(4, 18))
            cut = int(g.integers(2, n))
            ids.append([1, *g.integers(5, V, n - 2).tolist(), 2])
            types.append([0] * cut + [1] * (n - cut))
        tokens = len(ids[0])
        label = {
            "binary": lambda: int(g.integers(0, 2)),
            "class": lambda: int(g.integers(0, 3)),
            "number": lambda: float(g.normal()),
            "score": lambda: float(g.random()),
            "flags": lambda: g.integers(0, 2, 3).astype(float).tolist(),
            "tokens": lambda n=tokens: np.where(g.random(n) < 0.5, g.integers(0, 3, n), -100).tolist(),
            "position": lambda n=tokens: int(g.integers(0, n)),
            "past": lambda n=tokens: int(g.integers(0, n + n // 2)),
            "choice": lambda: int(g.integers(0, group)),
        }
        made = {name: label[kind]() for name, kind in fields.items()}
        whole = {"input_ids": ids, "type_ids": types} if group > 1 else {"input_ids": ids[0], "type_ids": types[0]}
        items.append(whole | made)
    return items, list(range(step * num, (step + 1) * num))


def pad(batch: TrainBatch, values: torch.Tensor, fill: int) -> torch.Tensor:
    """(T) -> (B, L)."""
    return nn.utils.rnn.pad_sequence(batch.packed.split(values), batch_first=True, padding_value=fill)


def padded(batch: TrainBatch, ids: torch.Tensor | None = None, types: bool = True) -> dict[str, torch.Tensor]:
    """What a Hugging Face model takes."""
    ids = batch.packed.input_ids if ids is None else ids
    inputs = {"input_ids": pad(batch, ids, 0), "attention_mask": pad(batch, torch.ones_like(ids), 0)}
    if types:
        assert batch.packed.type_ids is not None
        inputs["token_type_ids"] = pad(batch, batch.packed.type_ids, 0)
    return inputs


# The objectives in plain PyTorch.


def ce(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100)


def mlm(model, batch, case):
    return ce(model(**padded(batch)).logits, pad(batch, batch.labels["labels"], -100))


def mlm_and_next_sentence(model, batch, case):
    out = model(**padded(batch))
    masked = ce(out.prediction_logits, pad(batch, batch.labels["labels"], -100))
    return masked + ce(out.seq_relationship_logits, batch.labels["next_sentence_label"])


def mlm_and_sentence_order(model, batch, case):
    out = model(**padded(batch))
    masked = ce(out.prediction_logits, pad(batch, batch.labels["labels"], -100))
    return masked + ce(out.sop_logits, batch.labels["sentence_order_label"])


def lowbias32(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.uint32)
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def replaced_tokens(models, batch, case):
    generator, discriminator = models["generator"], models["discriminator"]
    labels, inputs = pad(batch, batch.labels["labels"], -100), padded(batch)
    logits = generator(**inputs).logits
    keys = pad(batch, draws(batch, Places.of(batch.packed), "gumbel", 0, batch.epoch), 0)
    bits = lowbias32(lowbias32(np.arange(V))[None, None] ^ keys.numpy().astype(np.uint32)[:, :, None])
    noise = -torch.log(-torch.log1p(-((torch.from_numpy(bits.astype(np.float64)) + 0.5) / 2**32)))
    sampled = (logits.detach() + noise.float()).argmax(-1)
    original = torch.where(labels == -100, inputs["input_ids"], labels)
    ids = torch.where(labels == -100, inputs["input_ids"], sampled)
    scores = discriminator(**(inputs | {"input_ids": ids})).logits
    real = inputs["attention_mask"].bool()
    replaced = (ids != original).to(scores.dtype)
    return ce(logits, labels) + 50 * F.binary_cross_entropy_with_logits(scores[real], replaced[real])


def triple_loss(models, batch, case, masked_only=False):
    inputs, labels = padded(batch), pad(batch, batch.labels["labels"], -100)
    with torch.no_grad():
        teacher = models["teacher"](**inputs, output_hidden_states=True)
    plain = {k: v for k, v in inputs.items() if k != "token_type_ids"}
    student = models["student"](**plain, output_hidden_states=True)
    real = inputs["attention_mask"].bool()
    rows = labels != -100 if masked_only else real
    kl = F.kl_div(
        F.log_softmax(student.logits[rows] / 2, -1), F.softmax(teacher.logits[rows] / 2, -1), reduction="batchmean"
    )
    a, b = student.hidden_states[-1][real], teacher.hidden_states[-1][real]
    cosine = F.cosine_embedding_loss(a, b, torch.ones(len(a), dtype=a.dtype))
    return 5 * kl * 4 + 2 * ce(student.logits, labels) + cosine


def triple_loss_masked(models, batch, case):
    return triple_loss(models, batch, case, masked_only=True)


def their_loss(model, batch, case):
    labels = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in batch.labels.items()}
    return model(**padded(batch), **labels).loss


def token_loss(model, batch, case):
    return ce(model(**padded(batch)).logits, pad(batch, batch.labels["labels"], -100))


def span_loss(model, batch, case):
    inputs = padded(batch)
    out, length = model(**inputs), inputs["attention_mask"].sum(1)
    fill = torch.finfo(model.dtype).min
    total = 0.0
    for name in ("start", "end"):
        scores = getattr(out, f"{name}_logits").masked_fill(inputs["attention_mask"] == 0, fill)
        target = batch.labels[f"{name}_positions"]
        total = total + F.cross_entropy(scores, torch.where(target < length, target, -100)) / 2
    return total


def choice_loss(model, batch, case):
    inputs = {k: v.view(N, case.group, -1) for k, v in padded(batch).items()}
    return F.cross_entropy(model(**inputs).logits, batch.labels["labels"])


def their_vectors(model, batch, case):
    inputs = padded(batch)
    hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
    vectors = (hidden * mask).sum(1) / mask.sum(1)
    return F.normalize(vectors, dim=-1).view(N, case.group, -1)


def ranking_loss(model, batch, case):
    vectors = their_vectors(model, batch, case)
    candidates = [vectors[j, c] for c in range(1, case.group) for j in range(N)]
    losses = []
    for i in range(N):
        scores = torch.stack([20 * vectors[i, 0] @ c for c in candidates])
        losses.append(scores.logsumexp(0) - scores[i])
    return torch.stack(losses).mean()


def cosine_loss(model, batch, case):
    a, b = their_vectors(model, batch, case).unbind(1)
    return ((a * b).sum(-1) - batch.labels["labels"]).square().mean()


def cosent_loss(model, batch, case):
    a, b = their_vectors(model, batch, case).unbind(1)
    cosines, labels = (a * b).sum(-1), batch.labels["labels"]
    terms = [20 * (cosines[j] - cosines[i]) for i in range(N) for j in range(N) if labels[i] > labels[j]]
    return torch.log(1 + torch.stack(terms).exp().sum())
