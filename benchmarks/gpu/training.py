"""A masked-LM step: its time, and its memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks import harness
from benchmarks.gpu.models import batch_of, model_flop
from benchmarks.gpu.peers import hugging_face_mlm, padded, plain_encoder, sdpa
from benchmarks.gpu.report import Peak, Report, Run, Setting, checked, forced
from fastbert import BertForMaskedLM, ops


def training(report: Report) -> Iterator[None]:
    """A masked-LM step: time, and the peak of memory beside transformers' on the same tokens."""
    at = report.at
    lengths = at.model_lengths(at.lengths[-1])
    batch = batch_of(at, lengths, at.config)
    model = BertForMaskedLM(at.config).train().to(at.device)
    label = torch.full_like(batch.input_ids, -100)
    label[::7] = batch.input_ids[::7]
    chosen = (label != -100).nonzero()[:, 0]
    cast = partial(torch.autocast, at.device, dtype=torch.bfloat16, enabled=not at.dry)

    def ours() -> torch.Tensor:
        with cast():
            hidden = model.base_model.forward_packed(batch)
            loss = ops.cross_entropy(model.logits(hidden[chosen]), label[chosen])
        loss.backward()
        model.zero_grad()
        return loss.detach()

    ids, _, mask = padded(batch)
    columns, p = torch.arange(ids.shape[1], device=ids.device), at.config.hidden_dropout_prob

    def plain() -> torch.Tensor:
        with cast():
            hidden = plain_encoder(model.base_model, ids, columns, partial(sdpa, mask, p), p)
            loss = F.cross_entropy(model.logits(hidden.flatten(0, 1)).float(), label)
        loss.backward()
        model.zero_grad()
        return loss.detach()

    runs = {"fastbert": forced(ours, at), "torch sdpa padded": plain}
    theirs = hugging_face_mlm(at.config, at)
    if theirs is not None:

        def hf() -> torch.Tensor:
            with cast():
                loss = theirs(ids, labels=label.view_as(ids)).loss
            loss.backward()
            theirs.zero_grad()
            return loss.detach()

        runs["hf sdpa padded"] = hf
    guess = torch.tensor(math.log(at.config.vocab_size), device=at.device)  # of new weights
    runs = checked("training", at, runs, guess, tolerance=0.1)
    case = f"S{at.lengths[-1]}_T{at.tokens}"
    flop = 3 * (model_flop(at.config, lengths) + 2 * len(chosen) * at.config.hidden_size * at.config.vocab_size)
    report.add("bert-base mlm", case, "training", runs, 0, flop, graphs=False)
    yield
    for name, run in runs.items():
        peak = Peak("bert-base mlm", case, name, round(peak_mb(run, at), 1), harness.device_name(at.device),
                    torch.__version__, harness.commit(), harness.today())  # fmt: skip
        harness.write([peak], f"{report.name}-peak", ("op", "case", "backend"))
        print(f"peak memory of a step, {case}, {name}: {peak.peak_mb} MB", flush=True)
        yield


def peak_mb(run: Run, at: Setting) -> float:
    """MB that a call allocates at its peak, over what was allocated before."""
    if at.device == "cpu":
        run()
        return float("nan")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6
