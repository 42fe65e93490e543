"""Whole models: tokens to hidden states, beside the peers of `peers.py`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.gpu.peers import compiled_peers, hugging_face, peers
from benchmarks.gpu.report import OWN, Report, Run, Setting, checked, forced
from fastbert import BertConfig, BertModel, ops, use_engine
from fastbert.engine import cuda
from fastbert.packing import PackedBatch, pack


def batch_of(at: Setting, lengths: list[int], config: BertConfig) -> PackedBatch:
    """Random ids."""
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, config.vocab_size, (n,), generator=g).tolist() for n in lengths]
    return pack(ids, [[0] * n for n in lengths]).to(at.device)


def model_flop(config: BertConfig, lengths: list[int]) -> float:
    """Multiply-adds of a forward pass, times two."""
    D, L, n = config.hidden_size, config.num_hidden_layers, config.intermediate_size
    dense = 2 * (4 * D * D + 2 * D * n) * sum(lengths)
    return L * (dense + 4 * D * sum(s * s for s in lengths))


def engine_run(model: BertModel, batch: PackedBatch, at: Setting) -> Run:
    """As users call it: the CUDA engine if `execution_plan` says so."""
    run = forced(lambda: model.forward_packed(batch), at)
    with torch.inference_mode():
        print(forced(model.execution_plan, at)())
    return run


def graph_alone(model: BertModel, batch: PackedBatch, at: Setting) -> Run:
    """The engine's graph without what a call does before and after it: the difference is the host's."""
    made: list[cuda._Bucket] = []

    def call() -> torch.Tensor:
        if not made:
            engine = cuda.compile(model)
            if isinstance(engine, str):
                raise RuntimeError(engine)
            made.append(engine._loaded(batch))
        made[0].replay()
        return made[0].result[: batch.num_tokens]

    return forced(call, at)


def eager(model: BertModel, batch: PackedBatch) -> torch.Tensor:
    """The chain of ops without graphs."""
    with use_engine("off"):
        return model.forward_packed(batch)


def inference(report: Report) -> Iterator[None]:
    """Tokens to hidden states: fixed lengths, a mix, one text alone; real tokens per second are T / ms."""
    at = report.at
    for name, config in (("base", at.config), ("large", at.large)):
        torch.manual_seed(0)
        model = BertModel(config, add_pooling_layer=False).eval().to(at.device, at.dtype)
        theirs = hugging_face(model, at)
        g = torch.Generator().manual_seed(1)
        mix = torch.empty(at.tokens // 8).exponential_(1 / (at.lengths[-1] / 4), generator=g).clamp(2, at.lengths[-1])
        mixed = [int(n) for n in mix if n >= 2]
        total = [sum(mixed[: i + 1]) for i in range(len(mixed))]
        cases = {"batch1_S128": [min(128, at.tokens)], "mix": mixed[: max(1, sum(t <= at.tokens for t in total))]}
        for length in (at.lengths[0], at.lengths[-3 if len(at.lengths) > 2 else 0], at.lengths[-1]):
            cases[f"S{length}"] = at.model_lengths(length)
        for case, lengths in cases.items():
            batch = batch_of(at, lengths, config)
            with torch.no_grad():
                runs = {
                    "fastbert": engine_run(model, batch, at),
                    "fastbert ops": forced(partial(eager, model, batch), at),
                }
                if len(lengths) == 1:
                    runs["fastbert graph"] = graph_alone(model, batch, at)
                runs |= peers(model, theirs, batch)
                with ops.use_backend("reference"):
                    right = eager(model, batch)
                good = checked(name, at, runs, right)
                nbytes = sum(p.nbytes for p in model.encoder.parameters())
                cost = nbytes, model_flop(config, lengths)
                report.add(f"bert-{name}", f"{case}_T{sum(lengths)}", "forward", good, *cost, graphs=False)
                if len(lengths) == 1:
                    vectors = checked(name, at, vector_runs(model, batch, good, at), unit_mean(right))
                    report.add(f"bert-{name}", f"{case}_T{sum(lengths)}", "vectors", vectors, *cost, graphs=False)
            yield


def unit_mean(hidden: torch.Tensor) -> torch.Tensor:
    """(T, D) of one text -> its vector (1, D) of length 1, on the host."""
    return F.normalize(hidden.float().mean(0, keepdim=True)).cpu()


def vector_runs(model: BertModel, batch: PackedBatch, runs: dict[str, Run], at: Setting) -> dict[str, Run]:
    """One text's ids to its vector on the host, as a server needs it. Our ids begin there, theirs are on the device."""
    host = batch.to("cpu")
    theirs = {name: run for name, run in runs.items() if name not in OWN}
    ours = forced(lambda: model.pool_packed(host, "mean", unit=True).cpu(), at)
    return {"fastbert": ours} | {name: lambda run=run: unit_mean(run()) for name, run in theirs.items()}


def compiled(report: Report) -> Iterator[None]:
    """Beside torch.compile, which takes minutes to tune: two cases, last of all."""
    at = report.at
    torch.manual_seed(0)
    model = BertModel(at.config, add_pooling_layer=False).eval().to(at.device, at.dtype)
    theirs = hugging_face(model, at)
    for lengths in ([min(128, at.tokens)], at.model_lengths(at.lengths[len(at.lengths) // 2])):
        batch = batch_of(at, lengths, at.config)
        with torch.no_grad():
            with ops.use_backend("reference"):
                right = eager(model, batch)
            runs = {"fastbert": engine_run(model, batch, at)} | compiled_peers(model, theirs, at, batch)
            case, good = (
                f"{'batch1_' * (len(lengths) == 1)}S{lengths[0]}_T{sum(lengths)}",
                checked("compiled", at, runs, right),
            )
            nbytes = sum(p.nbytes for p in model.encoder.parameters())
            report.add("bert-base", case, "compiled", good, nbytes, model_flop(at.config, lengths), graphs=False)
        yield
