"""`python -m benchmarks.training`: fine-tuning against Hugging Face's Trainer, on real labelled data.

Every system starts from the same weights (fresh head included), sees the same items in the same steps, and has the
same optimiser, schedule and dropout rates; `grouped` alone has Trainer's own order, by length. The metric is the same
function of each system's own predictions. tokens/s counts real tokens, not padding, over the time of training alone.

`--measure metric` may run beside other work, `--measure speed` needs an idle machine and few items (a seed is a round
of all systems, in turns); what was not measured is NaN in the row.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from benchmarks import harness
from benchmarks.labelled import DATASETS, Labelled, Unavailable, head
from fastbert.hub import DEFAULT_MODEL, resolve
from fastbert.train.examples import Examples
from fastbert.train.finetune import Finetuning, prepare
from fastbert.train.finetune_arguments import FinetuneArguments
from fastbert.train.loader import Loader

KEY = ("dataset", "system", "dtype", "measured")
PAIRED = "transformers"  # the peer with our order
MEASURES = ("metric", "speed", "both")


@dataclass(frozen=True)
class TrainingRow(harness.Machine):
    """One system on one data set, over seeds. `padding` is the share of computed tokens that were padding.

    `measured` is one of `MEASURES`; the fields of the other are NaN.
    """

    dataset: str
    task: str
    system: str
    measured: str
    metric: str
    metric_mean: float
    metric_std: float
    seeds: int
    tokens_per_second: float
    padding: float
    train_items: int
    eval_items: int
    epochs: float
    batch_items: int
    learning_rate: float
    max_length: int
    dtype: str
    transformers: str = version("transformers")


@dataclass(frozen=True)
class Outcome:
    """One run of one system.

    Attributes:
        outputs: predictions for the evaluation examples, as `Task.metrics` takes them; none where there are none.
        seconds: of training.
        padding: share of computed tokens that were padding.
    """

    outputs: list[np.ndarray]
    seconds: float
    padding: float


def run_fastbert(run: Finetuning, start: Path) -> Outcome:
    """This package: `finetune`, with its own evaluation."""
    evaluator = run.evaluator()
    model = run.task.load(start, run.tokenizer)
    result = replace(run, model=model, eval=None).run()
    outputs = [] if evaluator is None else evaluator.outputs(result.model)
    return Outcome(outputs, result.metrics["train_seconds"], 0.0)


def run_trainer(run: Finetuning, start: Path, grouped: bool = False) -> Outcome:
    """Hugging Face's Trainer, padding each batch to its longest sequence.

    Args:
        grouped: its order by length instead of ours.
    """
    arguments, order = run.arguments, _order(run)
    auto: Any = getattr(transformers, run.task.classes.__name__)
    model = auto.from_pretrained(start)
    padding = _Padding(run.tokenizer.config)

    class Ordered(transformers.Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return super()._get_train_sampler(train_dataset) if grouped else order

    with tempfile.TemporaryDirectory() as folder:
        told = transformers.TrainingArguments(
            folder,
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            weight_decay=arguments.weight_decay,
            warmup_steps=arguments.warmup_steps,
            num_train_epochs=arguments.num_train_epochs,
            max_grad_norm=arguments.max_grad_norm,
            seed=arguments.seed,
            bf16=bool(arguments.bf16),
            train_sampling_strategy="group_by_length" if grouped else "random",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False,
        )
        trainer = Ordered(model, told, padding, _Items(run.train))
        trainer.remove_callback(transformers.PrinterCallback)
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    outputs = [] if run.eval is None else padded_outputs(model, run, run.eval)
    return Outcome(outputs, seconds, padding.share)


class _Items:
    """Examples with the names that transformers' models take."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> dict[str, Any]:
        item = self.examples[i]
        types = item.pop("type_ids", None)
        return item if types is None else {**item, "token_type_ids": types}


class _Padding:
    """Collates items as Trainer's collators do, to the longest of the batch, and counts what is padding."""

    fills = {"labels": -100}  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        self.real = self.computed = 0

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        lengths = [len(item["input_ids"]) for item in items]
        longest = max(lengths)
        self.real, self.computed = self.real + sum(lengths), self.computed + longest * len(items)
        batch = {}
        for name in items[0]:
            values = [item[name] for item in items]
            if isinstance(values[0], list) and len(values[0]) == lengths[0]:
                fill = self.fills.get(name, 0)
                values = [value + [fill] * (longest - len(value)) for value in values]
            batch[name] = torch.tensor(values)
        mask = [[1] * length + [0] * (longest - length) for length in lengths]
        return {**batch, "attention_mask": torch.tensor(mask)}

    @property
    def share(self) -> float:
        return 1 - self.real / max(self.computed, 1)


class _Order(torch.utils.data.Sampler[int]):
    """The items of our steps, epoch after epoch."""

    def __init__(self, loader: Loader) -> None:
        self.loader, self.epoch = loader, 0

    def __len__(self) -> int:
        return len(self.loader.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Called by Trainer at the start of each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        for step in range(self.loader.num_steps(self.epoch)):
            yield from self.loader.items(self.epoch, step).tolist()


def _order(run: Finetuning) -> _Order:
    arguments = run.arguments
    sizes = {"batch_items": arguments.batch_size, "micro_tokens": arguments.micro_tokens}
    return _Order(Loader(run.train, **sizes, seed=arguments.seed))


@torch.inference_mode()
def padded_outputs(model: Any, run: Finetuning, examples: Examples) -> list[np.ndarray]:
    """What `Task.metrics` takes, from a transformers model's padded logits."""
    items, padding = _Items(examples), _Padding(None)
    outputs: list[Any] = [None] * len(items)
    model.eval()
    by_length = np.argsort(-examples.lengths, kind="stable").tolist()
    per_token = run.task.pipeline_tag == "token-classification"
    for first in range(0, len(by_length), 32):
        rows = by_length[first : first + 32]
        batch = {k: v.to(model.device) for k, v in padding([items[i] for i in rows]).items() if k != "labels"}
        for row, logits in zip(rows, model(**batch).logits.float().cpu().numpy(), strict=True):
            outputs[row] = logits[: examples.lengths[row]].argmax(-1) if per_token else logits
    return outputs


Runner = Callable[[Finetuning, Path], Outcome]
SYSTEMS: dict[str, Runner] = {
    "fastbert": run_fastbert,
    PAIRED: run_trainer,
    "transformers-grouped": partial(run_trainer, grouped=True),
}


def bench(
    name: str,
    data: Labelled,
    arguments: FinetuneArguments,
    seeds: int,
    model: str,
    measured: str = "both",
    systems: Iterable[str] = tuple(SYSTEMS),
) -> list[TrainingRow]:
    """Systems on one data set, in turns, seed by seed.

    Args:
        measured: of `MEASURES`; for "speed" nothing is evaluated.
    """
    runners = {system: SYSTEMS[system] for system in systems}
    if measured != "metric":
        _warm_up(data, arguments, model, runners)
    outcomes: dict[str, list[Outcome]] = {system: [] for system in runners}
    values: dict[str, list[float]] = {system: [] for system in runners}
    tokens = 0
    for seed in range(seeds):
        told = replace(arguments, seed=seed)
        run = prepare(model, data.train, None if measured == "speed" else data.eval, data.task, told)
        tokens = int(run.train.lengths.sum())
        with tempfile.TemporaryDirectory() as folder:
            run.model.save_pretrained(folder)
            for system, train in runners.items():
                outcome = train(run, Path(folder))
                outcomes[system].append(outcome)
                found = math.nan
                if run.eval is not None:
                    found = run.task.metrics(run.eval, outcome.outputs)[data.metric]
                values[system].append(found)
                rate = tokens * told.num_train_epochs / outcome.seconds
                print(f"{name} seed {seed} {system}: {data.metric} {found:.4f}, {rate:,.0f} tokens/s", flush=True)

    def row(system: str) -> TrainingRow:
        runs, scores = outcomes[system], values[system]
        seconds = math.nan if measured == "metric" else statistics.median(outcome.seconds for outcome in runs)
        spread = math.nan if measured == "speed" else statistics.stdev(scores) if seeds > 1 else 0.0
        return TrainingRow(
            name, data.task.name, system, measured, data.metric, round(statistics.mean(scores), 4), round(spread, 4),
            seeds, round(tokens * arguments.num_train_epochs / seconds, 1), round(runs[0].padding, 4),
            len(data.train), 0 if measured == "speed" else len(data.eval), arguments.num_train_epochs,
            arguments.batch_size or 0, arguments.learning_rate, arguments.max_length or 0,
            "bfloat16" if arguments.bf16 else "float32",
            device=harness.device_name("cuda" if torch.cuda.is_available() else "cpu"),
        )  # fmt: skip

    return [row(system) for system in runners]


def _warm_up(data: Labelled, arguments: FinetuneArguments, model: str, runners: Mapping[str, Runner]) -> None:
    """A few steps of each system that count nothing: what is imported and allocated once is not measured."""
    few = 2 * (arguments.batch_size or 32)
    run = prepare(model, head(data.train, few), None, data.task, replace(arguments, num_train_epochs=1))
    with tempfile.TemporaryDirectory() as folder:
        run.model.save_pretrained(folder)
        for train in runners.values():
            train(run, Path(folder))


def within_one_std(row: TrainingRow, peer: TrainingRow) -> bool:
    """Whether two means over seeds are no further apart than the larger standard deviation."""
    return abs(row.metric_mean - peer.metric_mean) <= max(peer.metric_std, row.metric_std)


def show(rows: list[TrainingRow]) -> Table:
    """Rows beside their paired peer: is the metric within a standard deviation, how many times the tokens/s."""
    table = Table(title=f"{rows[0].device}, {rows[0].threads} threads, {rows[0].dtype}, {rows[0].seeds} seeds")
    for column in ("data", "system", "metric", "mean (std)", "within 1 std", "tokens/s", "times", "padding"):
        table.add_column(column, justify="left" if column in ("data", "system", "metric") else "right", no_wrap=True)
    peers = {row.dataset: row for row in rows if row.system == PAIRED}
    for row in rows:
        peer = peers[row.dataset]
        metric = near = rate = times = ""
        if row.measured != "speed":
            metric = f"{row.metric_mean:.4f} ({row.metric_std:.4f})"
            near = "" if row is peer else "yes" if within_one_std(row, peer) else "no"
        if row.measured != "metric":
            rate = f"{row.tokens_per_second:,.0f}"
            times = f"{row.tokens_per_second / peer.tokens_per_second:.2f}"
        table.add_row(row.dataset, row.system, row.metric, metric, near, rate, times, f"{row.padding:.0%}")
    return table


def main() -> None:
    """Measure, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--only", help=f"of {', '.join(DATASETS)}, separated by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, help="default: that of the data set")
    parser.add_argument("--max-length", type=int, help="default: that of the data set")
    parser.add_argument("--train-items", type=int, help="the first so many; default all")
    parser.add_argument("--eval-items", type=int)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--measure", choices=MEASURES, default="both")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help=f"{PAIRED} must be among them")
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch, 256 items: seconds to minutes")
    args = parser.parse_args()
    disable_progress_bar()
    if args.quick:
        args.seeds, args.epochs = 1, 1
        args.train_items, args.eval_items = args.train_items or 256, args.eval_items or 256
    systems = args.systems.split(",")
    if PAIRED not in systems or not set(systems) <= set(SYSTEMS):
        parser.error(f"--systems is {args.systems}: {PAIRED} and others of {', '.join(SYSTEMS)}")
    rows: list[TrainingRow] = []
    for name in args.only.split(",") if args.only else DATASETS:
        try:
            data = DATASETS[name]()
        except Unavailable as error:
            print(f"{name} is left out: {error}")
            continue
        data = replace(data, train=head(data.train, args.train_items), eval=head(data.eval, args.eval_items))
        arguments = FinetuneArguments(
            num_train_epochs=args.epochs, batch_size=args.batch_size, learning_rate=args.lr or data.learning_rate,
            max_length=args.max_length or data.max_length, bf16=args.dtype == "bfloat16", quiet=True,
        )  # fmt: skip
        found = bench(name, data, arguments, args.seeds, str(resolve(args.model)), args.measure, systems)
        device = f"training-{found[0].device}".lower()
        path = harness.write(found, "".join(c if c.isalnum() else "-" for c in device), KEY)
        print(f"load {harness.load()}; {len(found)} rows in {path.relative_to(harness.RESULTS.parent.parent)}")
        rows += found
    if not rows:
        raise SystemExit("nothing was measured")
    harness.console().print(show(rows))


if __name__ == "__main__":
    main()
