"""The loop, one for pretraining and fine-tuning, on one device or many.

What a step computes is a pure function of the weights, the optimiser's state, the seed and the step's number: dropout
is seeded anew for every step, the order of the data by (seed, epoch). So a run that was killed and resumed ends in the
same bits as one that was not. Under a time budget the learning rate follows the clock, and nothing can promise that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from torch import nn

from fastbert.tokenizer import Tokenizer
from fastbert.train.arguments import TrainArguments
from fastbert.train.batch import TrainBatch
from fastbert.train.card import Card
from fastbert.train.checkpoint import Checkpoints, read_averages, read_model, step_of
from fastbert.train.clock import Clock
from fastbert.train.distributed import Spread, World, fill
from fastbert.train.feed import loader_of
from fastbert.train.flops import matmul_roof, model_flops
from fastbert.train.interrupt import Interrupt
from fastbert.train.layers import checkpointing
from fastbert.train.objectives.loss import Objective
from fastbert.train.outcome import TrainResult, evaluation, explain, leave_folder, model_writer, run_metrics
from fastbert.train.precision import widen
from fastbert.train.report import Report, describe
from fastbert.train.saving import Saver, Start, restore
from fastbert.train.schedule import build_schedule, total_steps
from fastbert.train.stepper import Agreed, NonFinite, Stepper, agree
from fastbert.train.window import Place, Window

Evaluate = Callable[[nn.Module], Mapping[str, float]]


def train(
    model: nn.Module,
    objective: Objective,
    data: Any,
    arguments: TrainArguments,
    *,
    evaluate: Evaluate | None = None,
    tokenizer: Tokenizer | None = None,
    save: Callable[[nn.Module, Path], None] | None = None,
    card: Card | None = None,
) -> TrainResult:
    """Train a model.

    The same call runs on one device, and in every process of a job that torchrun started. Weights are kept in fp32
    (narrower ones are widened). With an `output_dir` it leaves checkpoints and `log.jsonl` on the way, and in the end
    the model, `metrics.json`, curves and a model card; SIGTERM and Ctrl-C end it after the step it is in, with a
    checkpoint. All processes of a job must see that folder: rank 0 writes it, all read it.

    Args:
        model: trained in place. What the checkpoints hold must be able to come back into it: a `PreTrainedModel`, or
            any module, by the names of its parameters.
        objective: what is minimised; see `fastbert.train.objectives`.
        data: a dataset (`len()`, items as `fastbert.train.batch.collate` takes them, `lengths`), or a `Loader` of one
            that knows its rank.
        arguments: everything else.
        evaluate: model in `eval()` -> names to numbers, such as `loss` and `accuracy`; logged as `eval_<name>`. Rank 0
            calls it, the others wait: it must take less than `ddp_timeout`.
        tokenizer: saved beside the model.
        save: writes the model's files into a folder, instead of `model.save_pretrained(folder)` and the tokenizer's.
        card: what the model card says besides the numbers.

    Raises:
        FileExistsError: the output folder has checkpoints, and neither `resume` nor `overwrite` is set.
        ValueError: no data, a checkpoint of another architecture or run, a metric that `evaluate` does not give.
        NonFinite: a loss is NaN; the message names the step, and where its batch was saved.
        CheckpointError: a checkpoint could not be written; the earlier ones are whole.
        RankLost: another process of the job ended.
        SystemExit, KeyboardInterrupt: after SIGTERM (code 143) and Ctrl-C.
    """
    world = World.connect(arguments.device, arguments.ddp_timeout)
    writer = save or model_writer(tokenizer)
    try:
        with world.watched():
            return _Run(model, objective, data, arguments, world, evaluate, writer, card or Card())()
    finally:
        world.close()


class _Run:
    """One run: the order of things. What a step is, what is written and what is said lies in the other files."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        data: Any,
        arguments: TrainArguments,
        world: World,
        evaluate: Evaluate | None,
        save: Callable[[nn.Module, Path], None],
        card: Card,
    ) -> None:
        self.arguments, self.world, self.save, self.card = arguments, world, save, card
        self.evaluate = None if arguments.eval_strategy == "no" else evaluate
        for name in ("load_best_model_at_end", "early_stopping_patience"):
            if getattr(arguments, name) and evaluate is None:
                raise ValueError(f"{name} is {getattr(arguments, name)!r}, but there is nothing to evaluate on")
        self.root = Path(arguments.output_dir) if arguments.output_dir else None
        limit = arguments.save_total_limit
        self.checkpoints = Checkpoints(self.root, limit) if self.root is not None and world.is_first else None
        self.start = Start.find(self.checkpoints, arguments, world)
        self.position = self.start.position
        self.clock = Clock(self.position.elapsed_s)
        self.loader = loader_of(data, model, objective, arguments, world)
        self.start.check_data(self.loader)
        self.total = None if arguments.budget_s else total_steps(self.loader, arguments)
        self.schedule = build_schedule(arguments, self.total)
        widen(model.to(world.device))
        if isinstance(objective, nn.Module):
            objective.to(world.device)
        if self.start.folder is not None:
            read_model(model, self.start.folder)
        self.num_parameters, self.flops = sum(p.numel() for p in model.parameters()), model_flops(model)
        self.spread = Spread(model, objective, world, arguments.strategy)
        self.stepper = Stepper(self.spread, objective, arguments, world)
        restore(self.start, self.stepper)
        self.saver = Saver(self.checkpoints, self.stepper, save, arguments, world)
        self.saver.last = self.position.step if self.start.folder is not None else None
        self.window, self.window_began = Window(), self.clock.seconds

    def __call__(self) -> TrainResult:
        """Train to the end."""
        arguments = self.arguments
        folder, quiet = (self.root, arguments.quiet) if self.world.is_first else (None, True)
        self.report = Report(folder, self.start.history, self.total, self.position.step, quiet, arguments.report_to)
        self.roof = 1e12 * (arguments.peak_tflops or 0.0)
        if not self.roof and (folder is not None or not quiet):
            self.roof = matmul_roof(self.world.device, self.stepper.precision)
        self._introduce()
        gpus = [self.world.device] if self.world.device.type == "cuda" else []
        try:
            # The caller's random numbers go on as if nothing had been drawn.
            with torch.random.fork_rng(gpus), checkpointing(self.spread.model, arguments.gradient_checkpointing):
                ended = self._train()
                self._flush()
                if self.evaluate is not None and not evaluation(self.report.history, self.position.step):
                    self._evaluate()
                if arguments.save_strategy != "no":
                    self._save()
            return self._conclude(ended)
        except NonFinite as error:
            place = error.place
            batches: list[TrainBatch] = next(iter(self.loader.steps(place.epoch, place.epoch_step)), [])
            raise NonFinite(place, explain(error, batches, self.root, self.checkpoints, self.world)) from error
        finally:
            self.report.close()

    def _train(self) -> str:
        """Steps until the run is over; returns why it is."""
        self.spread.model.train()
        with Interrupt(listen=self.root is not None) as interrupt, self.clock.running():
            while not (ended := self._over()):
                epoch, begun = self.position.epoch, self.position.step
                for batches in self.loader.steps(epoch, self.position.epoch_step):
                    agreed = agree(self.world, batches, interrupt.signal, self.clock.seconds)
                    if agreed.signal:
                        self._interrupted(interrupt, agreed.signal)
                    if self.arguments.budget_s and agreed.elapsed_s >= self.arguments.budget_s:
                        return "time budget"
                    self._step(batches, agreed)
                    if ended := self._over():
                        return ended
                if self.position.step == begun:
                    raise ValueError(f"epoch {epoch} has no step: the loader gives none")
        return ended

    def _over(self) -> str | None:
        patience = self.arguments.early_stopping_patience
        if patience is not None and self.position.without_gain >= patience:
            return "early stopping"
        return "finished" if self.total is not None and self.position.step >= self.total else None

    def _step(self, batches: list[TrainBatch], agreed: Agreed) -> None:
        arguments, position = self.arguments, self.position
        factor = self.schedule(position.step if self.total is not None else agreed.elapsed_s)
        place = Place(position.step, position.epoch, position.epoch_step, arguments.learning_rate * factor)
        self.stepper(place, batches, agreed, factor, self.window)
        position.step += 1
        position.epoch_step += 1
        position.num_tokens += agreed.num_tokens
        end_of_epoch = position.epoch_step >= self.loader.num_steps(position.epoch)
        if end_of_epoch:
            position.epoch, position.epoch_step = position.epoch + 1, 0
        self.report.advance(position.step)

        def due(strategy: str, every: int) -> bool:
            return end_of_epoch if strategy == "epoch" else strategy == "steps" and position.step % every == 0

        evaluate = self.evaluate is not None and due(arguments.eval_strategy, arguments.eval_steps)
        save = due(arguments.save_strategy, arguments.save_steps)
        if evaluate or save or position.step % arguments.logging_steps == 0:
            self._flush()
        if evaluate:
            self._evaluate()
        if save:
            self._save()

    def _record(self, values: Mapping[str, float]) -> None:
        step, epoch, done = self.position.step, self.position.epoch, self.position.epoch_step
        share = done / self.loader.num_steps(epoch) if done else 0.0
        self.report.write({"step": step, "epoch": round(epoch + share, 4), **values})

    def _flush(self) -> None:
        """A line of the log for the steps since the last one."""
        window, self.window = self.window, Window()
        if not window.places:
            return
        scaled = self.stepper.scaler.is_enabled()
        values, bad = window.read(self.world, self.stepper.objective.weights, judge_norms=not scaled)
        if bad is not None:
            raise NonFinite(bad, "the loss or its gradient is not finite")
        seconds, self.window_began = self.clock.seconds - self.window_began, self.clock.seconds
        values |= {"learning_rate": window.places[-1].learning_rate, "tokens_per_second": window.num_tokens / seconds}
        if self.roof:
            values["mfu"] = self.flops(window.num_tokens, window.num_pairs) / seconds / self.roof / self.world.size
        if (saved := getattr(self.loader, "padding_saved", None)) is not None:
            values["padding_saved"] = float(saved)
        self._record({**values, "seconds": round(self.clock.seconds, 3)})

    def _evaluate(self) -> None:
        found: dict[str, float] = {}
        with self.clock.paused(), self.spread.whole(self.stepper.averages) as model:
            if self.world.is_first and self.evaluate is not None:
                values = self.evaluate(model.eval())
                found = {_prefixed(name): float(value) for name, value in values.items()}
        self.spread.model.train()
        found = self.world.broadcast(found)
        self._record(found)
        if self._gained(found) and self.arguments.load_best_model_at_end:
            self._save()

    def _gained(self, found: Mapping[str, float]) -> bool:
        """Whether an evaluation is the best so far."""
        arguments, name = self.arguments, _prefixed(self.arguments.metric_for_best_model)
        if name in found:
            return self.position.judge(found[name], arguments.more_is_better, arguments.early_stopping_threshold)
        if arguments.load_best_model_at_end or arguments.early_stopping_patience:
            raise ValueError(f"metric_for_best_model is {name!r}, but the evaluation gives {', '.join(found)}")
        return False

    def _save(self) -> None:
        if self.root is not None:
            with self.clock.paused():
                self.position.elapsed_s = self.clock.seconds
                self.saver(self.position, self.report.history, self.loader.num_steps(0))

    def _interrupted(self, interrupt: Interrupt, number: int) -> None:
        self._flush()
        self._save()
        name, step = Signals(number).name, self.position.step
        self.report.say(f"{name}: checkpoint-{step} is saved; the same command with resume continues from it")
        interrupt.leave(number)

    def _conclude(self, ended: str) -> TrainResult:
        model, step, best = self.spread.settle(self.stepper.averages), self.position.step, self._best()
        if self.arguments.load_best_model_at_end:
            if best is None:
                name = _prefixed(self.arguments.metric_for_best_model)
                raise FileNotFoundError(
                    f"no evaluation gave a finite {name}, or the checkpoint of the best one is gone"
                )
            step = step_of(best)
            read_model(model, best)
            fill(model, read_averages(best))
        metrics = run_metrics(self.report.history, self.clock.seconds, self.position.num_tokens, step)
        result = TrainResult(model.eval(), self.position.step, ended, metrics, self.report.history, best)
        if self.root is not None and self.world.is_first:
            leave_folder(self.root, result, self.save, self.card, self.arguments, self.report.say)
        self.report.say("  ".join([ended, describe(metrics), *([str(self.root)] if self.root else [])]))
        return result

    def _best(self) -> Path | None:
        """The checkpoint of the best evaluation, if there is one."""
        folder = self.root / f"checkpoint-{self.position.best_step}" if self.root is not None else None
        return folder if folder is not None and folder.is_dir() else None

    def _introduce(self) -> None:
        length = f"{self.total} steps" if self.total is not None else f"{self.arguments.budget_s:g} s"
        devices = f"{self.world.size} x {self.world.device}" if self.world.size > 1 else str(self.world.device)
        dtype = str(self.stepper.precision).removeprefix("torch.")
        size = f"{self.num_parameters / 1e6:.1f} M parameters"
        self.report.say(f"{type(self.spread.model).__name__}: {size}, {length}, {devices}, {dtype}")
        if self.start.folder is not None:
            self.report.say(f"continues from {self.start.folder.name}")
        for line in self.start.changed:
            self.report.say(f"warning: {line}")


def _prefixed(name: str) -> str:
    return name if name.startswith("eval_") else f"eval_{name}"
