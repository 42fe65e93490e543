"""Checkpoints: a run that was stopped anywhere ends in the same bits; what is damaged or foreign is refused."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import resource
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_training import Steps, arguments, classifier, config, items, tagger
from torch import nn

from fastbert import plot
from fastbert.models import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
)
from fastbert.models.electra_pair import ElectraPair
from fastbert.train.checkpoint import CheckpointError, Checkpoints, read_model, write_model
from fastbert.train.interrupt import Interrupt
from fastbert.train.loop import train
from fastbert.train.objectives.heads import SequenceClassification
from fastbert.train.outcome import model_writer
from fastbert.train.stepper import step_seed

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["fastbert.train.loop"])


def no_curves(*given):
    """In place of the plot at the end of a run: it takes longer than the runs here."""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(plot, "training_curves", no_curves)


class Loud(SequenceClassification):
    """Gradients that overflow under the first loss scales, 2^16 and below."""

    def loss(self, model, batch):
        loss = super().loss(model, batch)
        return type(loss)({name: 2e3 * value for name, value in loss.sums.items()}, loss.metrics)


class Stopped(Exception):
    """Raised in the middle of a run."""


class StopAt(SequenceClassification):
    """Another objective, which calls a function in its n-th forward pass."""

    def __init__(self, n, act, inner=None):
        self.left, self.act, self.inner = n, act, inner or SequenceClassification()

    def loss(self, model, batch):
        self.left -= 1
        if self.left == 0:
            self.act()
        return self.inner.loss(model, batch)


def stop():
    raise Stopped


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """Weights, moments and averages of the newest checkpoint."""
    newest = Checkpoints(folder).newest()
    assert newest is not None
    return {f"{p.name}:{k}": v for p in newest.glob("*.safetensors") for k, v in load_file(p).items()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert set(a) == set(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


def without_clock(history):
    timed = ("seconds", "tokens_per_second", "mfu")
    return [{k: v for k, v in record.items() if k not in timed} for record in history]


def loss_of(model):
    batch = Steps(items(16, seed=5)).collate(list(range(16)))
    with torch.no_grad():
        logits = model.logits(model.base_model.encode_packed(batch.packed))
    return {"loss": float(nn.functional.cross_entropy(logits, batch.labels["labels"]))}


# the same bits


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"optim": "lamb", "learning_rate": 1e-2},
        {"ema_decay": 0.9},
        {"fp16": True},
        {"load_best_model_at_end": True, "early_stopping_patience": 2, "learning_rate": 0.05},
    ],
    ids=lambda more: "-".join(more) or "adamw",
)
def test_resume_is_bit_identical(tmp_path, more):
    given = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, **more}
    given |= {"num_train_epochs": 4.0, "warmup_steps": 0.2, "save_total_limit": None}
    loader = Steps(items(20), 8, 3)  # the epoch's last step is smaller, and steps accumulate
    straight = arguments(output_dir=str(tmp_path / "straight"), **given)
    objective = Loud() if "fp16" in more else SequenceClassification()
    whole = train(classifier(), objective, loader, straight, evaluate=loss_of)
    broken = {"output_dir": str(tmp_path / "broken"), **given}
    for calls in (9, 8):  # forward passes, so within the third step, and then some steps later
        with pytest.raises(Stopped):
            train(
                classifier(), StopAt(calls, stop, objective), loader, arguments(**broken, resume=True), evaluate=loss_of
            )
    assert Checkpoints(tmp_path / "broken").newest() is not None
    torch.manual_seed(99)  # what the process drew before does not matter, nor do the weights it starts with
    resumed = arguments(**broken, resume=True)
    parts = train(classifier(seed=3), objective, loader, resumed, evaluate=loss_of)
    assert (parts.steps, parts.ended) == (whole.steps, whole.ended)
    assert_same_bits(state_of(tmp_path / "broken"), state_of(tmp_path / "straight"))
    assert_same_bits(dict(parts.model.named_parameters()), dict(whole.model.named_parameters()))
    assert without_clock(parts.history) == without_clock(whole.history)


def test_each_step_and_rank_draws_its_own():
    seeds = {step_seed(seed, step, rank) for seed in range(3) for step in range(50) for rank in range(3)}
    assert len(seeds) == 450


def test_another_seed_is_not_the_same_bits(tmp_path):
    """The mutant of the test above: dropout that is not seeded by the step."""
    for name, seed in (("a", 1), ("b", 2)):
        train(
            classifier(),
            SequenceClassification(),
            Steps(items()),
            arguments(output_dir=str(tmp_path / name), seed=seed),
        )
    with pytest.raises(AssertionError):
        assert_same_bits(state_of(tmp_path / "a"), state_of(tmp_path / "b"))


LONG = {"num_train_epochs": 8.0, "save_strategy": "steps", "save_steps": 1, "ema_decay": 0.9, "save_total_limit": 2}


def run_and_report(folder: str, ready) -> None:
    """A process: continue the run in `folder`."""
    torch.set_num_threads(1)
    plot.training_curves = no_curves
    model, given = classifier(), arguments(output_dir=folder, resume=True, **LONG)
    ready.set()
    train(model, SequenceClassification(), Steps(items(), 8, 3), given)


def last_step(folder) -> int:
    """Of the whole checkpoints, by name alone: opening the folder would clear away what a live run is writing."""
    numbers = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")]
    return max((int(number) for number in numbers if number.isdigit()), default=0)


def test_sigkill_at_twenty_random_moments(tmp_path):
    ready = FORKS.Event()  # the straight run is a process as well: sums of gradients hang on the number of threads
    process = FORKS.Process(target=run_and_report, args=(str(tmp_path / "straight"), ready))
    process.start()
    assert ready.wait(60)
    began = time.perf_counter()
    process.join()
    seconds, expected = time.perf_counter() - began, state_of(tmp_path / "straight")
    rng, kills, runs, steps = random.Random(0), 0, 0, set()
    while kills < 20:
        folder = tmp_path / f"run-{runs}"
        finished = False
        while not finished:
            ready = FORKS.Event()
            process = FORKS.Process(target=run_and_report, args=(str(folder), ready))
            process.start()
            assert ready.wait(60)
            goal = last_step(folder) + rng.randrange(4)  # moments by progress: a loaded machine is slower, not the test
            while kills < 20 and process.is_alive() and last_step(folder) < goal:
                time.sleep(0.001)
            process.join(None if kills == 20 else rng.uniform(0, seconds / 24))
            if process.exitcode is None:
                process.kill()
                process.join()
                kills += 1
                steps.add(last_step(folder))
            finished = process.exitcode == 0
            assert process.exitcode in (0, -signal.SIGKILL)
        assert_same_bits(state_of(folder), expected)
        runs += 1
    assert len(steps) > 4  # the moments were different ones


class Killed(BaseException):
    """A kill, in the middle of what the checkpoint code does with files."""


@pytest.fixture
def killed_at(monkeypatch):
    """Make the n-th call that touches the disk the last one; nothing cleans up after it."""
    calls = {"left": 10**9}

    def watch(owner, name):
        original = getattr(owner, name)

        def watched(*args, **given):
            calls["left"] -= 1
            if calls["left"] == 0:
                raise Killed
            return original(*args, **given)

        monkeypatch.setattr(owner, name, watched)

    for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "open"):
        watch(os, name)

    def arm(n):
        calls["left"] = n

    return arm


@pytest.mark.filterwarnings("error")  # nothing half done lies under a checkpoint's name
def test_kill_between_any_two_touches_of_the_disk(tmp_path, killed_at):
    def write_step(step):
        def write(folder):
            save_file({"w": torch.full((4,), float(step))}, folder / "model.safetensors")

        return write

    for n in range(1, 100):
        root = tmp_path / str(n)
        store = Checkpoints(root, limit=1)
        store.save(1, write_step(1), {}, None)
        store.save(2, write_step(2), {}, None)
        killed_at(n)
        try:
            store.save(3, write_step(3), {}, None)
        except Killed:
            pass
        else:
            break
        finally:
            killed_at(10**9)
        newest = Checkpoints(root, limit=1).newest()
        assert newest is not None
        step = float(load_file(newest / "model.safetensors")["w"][0])
        assert newest.name == f"checkpoint-{step:.0f}"
        assert step in (2, 3)
        assert {p.name for p in root.iterdir()} <= {"checkpoint-2", "checkpoint-3"}  # what was unfinished is gone
    assert 8 < n < 99


# signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, None)])
def test_signal_saves_and_exits(tmp_path, number, code):
    given = {"output_dir": str(tmp_path / "run"), "save_strategy": "epoch"}
    before = signal.getsignal(number)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as caught:
        train(
            classifier(), StopAt(5, lambda: os.kill(os.getpid(), number)), Steps(items()), arguments(**given)
        )  # in the fifth step
    if code is None:
        assert caught.type is KeyboardInterrupt
    else:
        assert caught.value.code == code
    assert signal.getsignal(number) is before
    assert Checkpoints(tmp_path / "run").newest().name == "checkpoint-5"
    train(classifier(), SequenceClassification(), Steps(items()), arguments(**given, resume=True))
    straight = arguments(output_dir=str(tmp_path / "straight"))
    train(classifier(), SequenceClassification(), Steps(items()), straight)
    assert_same_bits(state_of(tmp_path / "run"), state_of(tmp_path / "straight"))


def test_second_signal_is_not_caught():
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


# full disks, damage, foreign checkpoints


def test_disk_full(tmp_path, monkeypatch):
    """The third checkpoint does not fit."""
    calls = []

    def full(tensors, path, *rest):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return save_file(tensors, path, *rest)

    monkeypatch.setattr("fastbert.train.saving.save_file", full)
    with pytest.raises(CheckpointError, match=r"checkpoint-9.*No space left.*MB are free.*checkpoint-6 is whole"):
        train(classifier(), SequenceClassification(), Steps(items()), arguments(output_dir=str(tmp_path)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-6", "log.jsonl"]
    monkeypatch.undo()
    result = train(
        classifier(), SequenceClassification(), Steps(items()), arguments(output_dir=str(tmp_path), resume=True)
    )
    assert result.steps == 9


def test_the_system_refuses_the_bytes(tmp_path):
    """No mock: the kernel lets no file grow past a limit, as a full disk or quota does."""
    given = arguments(output_dir=str(tmp_path), save_strategy="steps", save_steps=1, max_steps=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
        with pytest.raises(CheckpointError, match=r"checkpoint-1: .*there is no earlier checkpoint"):
            train(classifier(), SequenceClassification(), Steps(items()), given)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]


def finished(folder: Path, **more) -> Path:
    train(classifier(), SequenceClassification(), Steps(items()), arguments(output_dir=str(folder), **more))
    newest = Checkpoints(folder).newest()
    assert newest is not None
    return newest


@pytest.mark.parametrize("damage", ["cut short", "gone", "no state", "bad state"])
def test_damaged_checkpoint_is_passed_over(tmp_path, damage):
    newest = finished(tmp_path)
    weights, state = newest / "model.safetensors", newest / "state.json"
    if damage == "cut short":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "gone":
        (newest / "optimizer.safetensors").unlink()
    elif damage == "no state":
        state.unlink()
    else:
        state.write_text(state.read_text()[:50])
    with pytest.warns(UserWarning, match="checkpoint-9 is damaged and passed over"):
        assert Checkpoints(tmp_path).newest() == tmp_path / "checkpoint-6"


def test_another_architecture(tmp_path):
    given = arguments(output_dir=str(tmp_path), resume=True)
    newest = finished(tmp_path)
    others = {
        "num_attention_heads is 2, the model's 4": classifier(num_attention_heads=4),
        "hidden_size is 16, the model's 32": classifier(hidden_size=32),
        "vocab_size is 40, the model's 41": classifier(vocab_size=41),
    }
    for told, model in others.items():
        with pytest.raises(ValueError, match=f"checkpoint-9 is of another architecture: its {told}"):
            train(model, SequenceClassification(), Steps(items()), given)
    with pytest.raises(ValueError, match="holds a BertForSequenceClassification, the model is a BertForTokenClassif"):
        read_model(tagger(), newest)
    state = load_file(newest / "model.safetensors")
    state["classifier.waist"] = state.pop("classifier.weight")
    save_file(state, newest / "model.safetensors")
    with pytest.raises(ValueError, match=r"it (has|lacks) the weight classifier.wa|it lacks the weight classifier.we"):
        read_model(classifier(), newest)


def test_moments_of_another_model(tmp_path):
    newest = finished(tmp_path)
    path = newest / "optimizer.safetensors"
    frozen = classifier()
    frozen.classifier.requires_grad_(False)
    with pytest.raises(ValueError, match=r"has moments of classifier\.(weight|bias), which is not trained now"):
        train(
            frozen, SequenceClassification(), Steps(items()),
            arguments(output_dir=str(tmp_path), resume=True, num_train_epochs=4.0),
        )  # fmt: skip
    moments = load_file(path)
    assert {k.rpartition(".")[2] for k in moments} == {"step", "exp_avg", "exp_avg_sq"}


def test_settings_that_may_change_and_that_may_not(tmp_path, capfd):
    finished(tmp_path)
    for name, value in {"seed": 7, "batch_size": 16, "optim": "lamb", "drop_last": True}.items():
        with pytest.raises(ValueError, match=rf"checkpoint-9 was written with {name}="):
            train(
                classifier(), SequenceClassification(), Steps(items()),
                arguments(output_dir=str(tmp_path), resume=True, **{name: value}),
            )  # fmt: skip
    more = arguments(output_dir=str(tmp_path), resume=True, num_train_epochs=4.0, learning_rate=1e-4, quiet=False)
    result = train(classifier(), SequenceClassification(), Steps(items()), more)
    told = capfd.readouterr().err
    assert result.steps == 12
    assert "continues from checkpoint-9" in told
    assert "warning: learning_rate was 0.005, now 0.0001" in told
    assert "quiet" not in told


def test_other_data(tmp_path):
    finished(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint-9 was trained on: its first epoch had 3 steps, now it has 5"):
        train(
            classifier(), SequenceClassification(), Steps(items(40)), arguments(output_dir=str(tmp_path), resume=True)
        )


def test_existing_checkpoints_are_not_mixed_up(tmp_path):
    finished(tmp_path)
    with pytest.raises(
        FileExistsError, match="already has checkpoint-9: resume continues that run, overwrite discards"
    ):
        finished(tmp_path)
    finished(tmp_path, overwrite=True, max_steps=2)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]


def test_log_of_a_killed_run_is_cut_to_the_checkpoint(tmp_path):
    finished(tmp_path)
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 10, "loss": 1.0}\n{"step": 11, "lo')
    finished(tmp_path, resume=True, num_train_epochs=4.0)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, 13))


def test_rotation_keeps_the_best(tmp_path):
    scores = iter([3.0, 1.0, 2.0, 2.0, 2.0])
    train(
        classifier(), SequenceClassification(), Steps(items()),
        arguments(output_dir=str(tmp_path), num_train_epochs=5.0, save_total_limit=2, load_best_model_at_end=True),
        evaluate=lambda model: {"loss": next(scores)},
    )  # fmt: skip
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-15", "checkpoint-6"]


def test_resume_of_a_finished_run_adds_nothing(tmp_path):
    newest = finished(tmp_path)
    before = {p.name: p.stat().st_mtime_ns for p in newest.iterdir()}
    finished(tmp_path, resume=True)
    assert {p.name: p.stat().st_mtime_ns for p in newest.iterdir()} == before


# what a checkpoint is


def test_a_checkpoint_is_a_model_folder_without_pickles(tmp_path):
    model = classifier()
    train(model, SequenceClassification(), Steps(items()), arguments(output_dir=str(tmp_path), ema_decay=0.5))
    newest = Checkpoints(tmp_path).newest()
    names = {p.name for p in newest.iterdir()}
    assert names == {
        "model.safetensors", "config.json", "optimizer.safetensors", "ema.safetensors", "state.json",
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = BertForSequenceClassification.from_pretrained(newest)
    raw, averages = dict(again.named_parameters()), load_file(newest / "ema.safetensors")
    assert all(torch.equal(p, averages[name]) for name, p in model.named_parameters())
    assert not all(torch.equal(raw[name], averages[name]) for name in raw)


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TIED = {
    "bert": lambda: BertForMaskedLM(config()),
    "albert": lambda: AlbertForMaskedLM(AlbertConfig(vocab_size=40, embedding_size=8, **SMALL)),
    "distilbert": lambda: DistilBertForMaskedLM(DistilBertConfig(vocab_size=40, dim=16, n_layers=1, n_heads=2)),
    "electra": lambda: ElectraForMaskedLM(ElectraConfig(vocab_size=40, embedding_size=8, **SMALL)),
    "pair": lambda: ElectraPair.from_config(ElectraConfig(vocab_size=40, embedding_size=8, **SMALL), 0.5),
}


@pytest.mark.parametrize("family", list(TIED))
def test_tied_weights_come_back_tied(tmp_path, family):
    torch.manual_seed(1)
    written = TIED[family]()
    torch.manual_seed(2)
    read = TIED[family]()
    own = dict(read.named_parameters())
    write_model(written, tmp_path, model_writer(None))
    read_model(read, tmp_path)
    assert_same_bits(dict(read.named_parameters()), dict(written.named_parameters()))
    assert_same_bits(read.state_dict(), written.state_dict())
    assert all(parameter is own[name] for name, parameter in read.named_parameters())  # in place, for the optimiser


class Plain(nn.Module):
    """No `PreTrainedModel`: an encoder with two heads, one of them tied to it."""

    def __init__(self):
        super().__init__()
        self.model = classifier()
        self.scale = nn.Parameter(torch.ones(()))
        self.alias = self.model.classifier

    @property
    def config(self):
        return self.model.config

    @property
    def base_model(self):
        return self.model.base_model

    def logits(self, encoded):
        return self.scale * self.model.logits(encoded)


def test_any_module_resumes(tmp_path):
    given = {"save_strategy": "steps", "save_steps": 2}
    broken = {"output_dir": str(tmp_path / "broken"), **given}
    train(Plain(), SequenceClassification(), Steps(items()), arguments(output_dir=str(tmp_path / "straight"), **given))
    with pytest.raises(Stopped):
        train(Plain(), StopAt(6, stop), Steps(items()), arguments(**broken))
    train(Plain(), SequenceClassification(), Steps(items()), arguments(**broken, resume=True))
    assert_same_bits(state_of(tmp_path / "broken"), state_of(tmp_path / "straight"))
