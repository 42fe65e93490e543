"""Two gloo processes on this machine: the same curve as one with the whole batch; lost ranks; resuming with others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_checkpoint import FORKS, assert_same_bits, no_curves, state_of
from tiny_training import OwnUnits, Steps, arguments, tagger, token_items
from torch import nn

from fastbert import plot
from fastbert.models import AlbertConfig, AlbertForTokenClassification
from fastbert.train.distributed import World
from fastbert.train.loop import train
from fastbert.train.objectives.heads import TokenClassification

SIZES = {"vocab_size": 40, "embedding_size": 8, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


def shared_layers():
    torch.manual_seed(0)
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout_prob": 0.0}
    config = AlbertConfig(**SIZES, **rates, num_hidden_layers=3, max_position_embeddings=16, num_labels=3)
    return AlbertForTokenClassification(config)


class WithIdleHead(nn.Module):
    """A head that nothing uses: it must keep its weights, decay or not."""

    def __init__(self):
        super().__init__()
        self.tagger, self.idle = tagger(), nn.Linear(16, 16)
        nn.init.ones_(self.idle.weight)
        nn.init.ones_(self.idle.bias)

    @property
    def config(self):
        return self.tagger.config

    @property
    def base_model(self):
        return self.tagger.base_model

    def logits(self, encoded):
        return self.tagger.logits(encoded)


class Die(TokenClassification):
    """Ends a rank's process in its so-manieth loss, or sends it a signal; the first loss only looks at the graph."""

    def __init__(self, left, number):
        self.left, self.number = left, number

    def loss(self, model, batch):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)
        return super().loss(model, batch)


MODELS = {"bert": tagger, "albert": shared_layers, "idle head": WithIdleHead}
TIMEOUT_S = 60


def rank_of_a_job(rank, size, store, job):
    """A process: one rank of a job that `job` describes; what it ends with goes into a file."""
    torch.set_num_threads(1)
    plot.training_curves = no_curves
    answer = Path(f"{store}-rank-{rank}")
    try:
        limit = timedelta(seconds=TIMEOUT_S)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=limit)
        model = MODELS[job.get("model", "bert")]()
        if rank > 0 and job.get("scrambled"):
            for parameter in model.parameters():
                nn.init.normal_(parameter)
        if job.get("double", True):
            model.double()
        data = token_items(job.get("num", 24))
        loader = Steps(data, job.get("batch", 8), job.get("micro", 3), rank, size, ("labels",))
        objective = TokenClassification()
        if job.get("dies") == rank:
            objective = Die(job["at"], job["number"])
        result = train(model, objective, loader, arguments(**job["arguments"]), evaluate=job.get("evaluate"))
        weights = {name: p.detach().clone() for name, p in result.model.named_parameters()}
        torch.save(("done", weights, result.history), answer)
    except BaseException as error:
        torch.save((type(error).__name__, str(error), []), answer)
        raise SystemExit(1) from error


def job(tmp_path, size=2, **more):
    """Run a job on `size` processes; rank -> (kind of end, weights or message, history) of those that lived on."""
    store = tmp_path / f"store-{len(list(tmp_path.iterdir()))}"
    ranks = [FORKS.Process(target=rank_of_a_job, args=(rank, size, str(store), more)) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(TIMEOUT_S + 30)
        assert process.exitcode is not None, "a rank hangs"
    answers = {rank: Path(f"{store}-rank-{rank}") for rank in range(size)}
    return {rank: torch.load(path) for rank, path in answers.items() if path.is_file()}


def first_weight(model):
    """An evaluation."""
    return {"loss": float(next(model.parameters()).detach().sum())}


def alone(model="bert", num=24, batch=8, double=True, **given):
    """The same run in this process, each step in one piece."""
    network = MODELS[model]()
    if double:
        network.double()
    loader = Steps(token_items(num), batch, batch, token_fields=("labels",))
    return train(network, TokenClassification(), loader, arguments(**given))


def assert_same_run(found, straight):
    kind, weights, history = found[0]
    assert kind == "done", weights
    for name in ("loss", "accuracy", "grad_norm", "learning_rate"):
        ours, theirs = [r[name] for r in history], [r[name] for r in straight.history]
        assert ours == pytest.approx(theirs, rel=1e-9), name
    for name, p in straight.model.named_parameters():
        assert torch.allclose(weights[name], p, rtol=0, atol=1e-11), name
    assert_same_bits(found[1][1], weights)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("model", list(MODELS))
def test_two_ranks_follow_one_with_the_whole_batch(tmp_path, model, strategy):
    given = {"max_steps": 6, "warmup_steps": 1, "max_grad_norm": 0.3, "weight_decay": 0.1}
    found = job(tmp_path, model=model, arguments={**given, "strategy": strategy})
    assert_same_run(found, alone(model, **given))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_uneven_ranks(tmp_path, strategy):
    """The last step of an epoch has one item: rank 1 gets none; before, ranks differ in the number of micro-batches."""
    given = {"num_train_epochs": 2.0, "ema_decay": 0.5, "gradient_checkpointing": strategy == "fsdp"}
    settings = {**given, "strategy": strategy}
    found = job(tmp_path, num=11, batch=5, micro=2, scrambled=True, arguments=settings)  # rank 0's weights count
    assert_same_run(found, alone(num=11, batch=5, **given))


def test_averaging_ranks_means_would_not_follow(tmp_path):
    """The mutant: what data parallelism does without counting first; ranks have different numbers of labels."""
    straight = alone(max_steps=6)

    network = tagger().double()
    loader = Steps(token_items(), 8, 4, token_fields=("labels",))  # two halves of a batch, each its own mean
    wrong = train(network, OwnUnits(), loader, arguments(max_steps=6))
    losses = [[r["loss"] for r in run.history] for run in (straight, wrong)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_resume_with_other_numbers_of_ranks(tmp_path, strategy):
    """Two ranks, then one, then two: the same weights and moments as in one go."""
    given = {"save_strategy": "steps", "save_steps": 3, "ema_decay": 0.5, "optim": "lamb"}
    folder = tmp_path / "run"
    broken = {**given, "output_dir": str(folder), "strategy": strategy, "lr_scheduler_type": "constant"}
    assert job(tmp_path, arguments={**broken, "max_steps": 3}, evaluate=first_weight)[0][0] == "done"
    alone(**{**broken, "max_steps": 5, "resume": True})
    found = job(tmp_path, arguments={**broken, "max_steps": 8, "resume": True}, evaluate=first_weight)
    straight = {**given, "output_dir": str(tmp_path / "straight"), "lr_scheduler_type": "constant"}
    alone(**straight, max_steps=8)
    assert found[0][0] == "done", found[0][1]
    ours, theirs = state_of(folder), state_of(tmp_path / "straight")
    assert set(ours) == set(theirs)
    for name in theirs:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-9, atol=1e-12), name


def test_resume_with_two_ranks_is_bit_identical(tmp_path):
    """With dropout, in fp32: each rank draws by (seed, step, rank)."""
    given = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    job(tmp_path, double=False, arguments={**given, "output_dir": str(tmp_path / "straight")})
    lost = job(
        tmp_path,
        double=False,
        dies=1,
        at=8,
        number=signal.SIGKILL,
        arguments={**given, "output_dir": str(tmp_path / "broken")},
    )
    kind, told, _ = lost[0]
    assert kind == "RankLost"
    assert "rank 0 lost contact with the other 1 of this job: one was killed" in told
    assert "Start the job again with resume" in told
    assert 1 not in lost
    found = job(tmp_path, double=False, arguments={**given, "output_dir": str(tmp_path / "broken"), "resume": True})
    assert found[0][0] == "done", found[0][1]
    assert_same_bits(state_of(tmp_path / "broken"), state_of(tmp_path / "straight"))


def test_sigterm_to_one_rank_ends_all_with_a_checkpoint(tmp_path):
    given = {"save_strategy": "epoch", "output_dir": str(tmp_path / "run")}
    found = job(tmp_path, dies=1, at=4, micro=8, number=signal.SIGTERM, arguments=given)
    assert {rank: (kind, told) for rank, (kind, told, _) in found.items()} == {
        0: ("SystemExit", "143"), 1: ("SystemExit", "143"),
    }  # fmt: skip
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]


def test_error_of_one_rank_is_not_a_hang(tmp_path):
    """Rank 0 cannot write: both say so."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".unfinished-checkpoint-3").write_text("in the way")
    found = job(tmp_path, arguments={"output_dir": str(tmp_path / "run")})
    assert {kind for kind, *_ in found.values()} <= {"NotADirectoryError", "RankLost"}
    assert found[0][0] == "NotADirectoryError"


TORCHRUN = """
import sys
sys.path.insert(0, sys.argv[1])
from tiny_training import Steps, arguments, tagger, token_items
from fastbert.train.distributed import World
from fastbert.train.loop import train
from fastbert.train.objectives.heads import TokenClassification

if __name__ == "__main__":
    world = World.connect("cpu")
    loader = Steps(token_items(), 8, 3, world.rank, world.size, ("labels",))
    given = arguments(output_dir=sys.argv[2], max_steps=4, save_strategy="no")
    result = train(tagger().double(), TokenClassification(), loader, given)
    world.close()
"""


def test_torchrun(tmp_path):
    script, out = tmp_path / "script.py", tmp_path / "run"
    script.write_text(TORCHRUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, str(Path(__file__).parent), str(out)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    assert "find_unused_parameters" not in ended.stderr, "no advice of torch's that nobody can follow"
    straight = alone(max_steps=4)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in lines] == pytest.approx([r["loss"] for r in straight.history], rel=1e-9)
    weights = load_file(out / "model.safetensors")
    for name, value in straight.model.state_dict().items():
        assert torch.allclose(weights[name], value, rtol=0, atol=1e-11)


def test_a_job_of_one(monkeypatch):
    world = World.connect("cpu")
    assert (world.rank, world.size, world.is_first) == (0, 1, True)
    assert world.gather([1, 2.5]) == [[1, 2.5]]
    assert world.broadcast("a") == "a"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="'cuda:2' is wanted, but torch sees 2 GPUs: use cuda:0 or cuda:1"):
        World.connect("cuda")
