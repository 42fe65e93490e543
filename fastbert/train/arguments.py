"""TrainArguments: all that a training run can be told, by the names of Hugging Face's `TrainingArguments` where it has
them. Its defaults are others for what costs time or room: bfloat16, the log, evaluations, checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fastbert.train.options import check_types, option, parse_seconds


@dataclass(kw_only=True, frozen=True)
class TrainArguments:
    """What a training run is told.

    Raises:
        ValueError: a value out of its range, or two that exclude each other; the message names the fields.
    """

    output_dir: str | None = option(
        None, "Output", "Folder of checkpoints, log and final model; None keeps nothing.", "--out"
    )
    resume: bool = option(False, "Output", "Continue from the newest checkpoint of the output folder, if there is one.")
    overwrite: bool = option(False, "Output", "Discard the checkpoints that the output folder holds.")
    quiet: bool = option(False, "Output", "Print nothing but warnings.")
    report_to: Literal["auto", "tensorboard", "none"] = option(
        "auto", "Output", "TensorBoard files; auto writes them where tensorboard is installed."
    )

    batch_size: int | None = option(
        None, "Batches", "Items an optimiser step, over all devices (32 unless --batch-tokens is given)."
    )
    batch_tokens: int | None = option(
        None, "Batches", "Tokens an optimiser step, over all devices, instead of --batch-size."
    )
    micro_tokens: int = option(
        16384, "Batches", "Most tokens a forward pass on one device; a larger step is accumulated."
    )
    drop_last: bool = option(False, "Batches", "Leave out an epoch's last step where it is smaller than the others.")
    seed: int = option(42, "Batches", "Of data order, masking, dropout and fresh weights.")

    num_train_epochs: float = option(3.0, "Length", "Passes over the data.", "--epochs")
    max_steps: int = option(-1, "Length", "Optimiser steps, whatever the number of epochs; -1 = as the epochs give.")
    time_budget: str | float | None = option(
        None,
        "Length",
        "Train for so long (600, 90s, 10m, 2h) and fit the schedule to it; such a run is not reproducible.",
    )

    learning_rate: float = option(5e-5, "Optimiser", "Peak learning rate.", "--lr")
    optim: Literal["adamw", "lamb"] = option("adamw", "Optimiser", "adamw, or lamb for batches of many thousands.")
    adam_beta1: float = option(0.9, "Optimiser", "Decay of the mean of gradients.")
    adam_beta2: float = option(0.999, "Optimiser", "Decay of the mean of squared gradients.")
    adam_epsilon: float = option(1e-8, "Optimiser", "Added to the root of the squared mean.")
    weight_decay: float = option(0.0, "Optimiser", "Decoupled; biases and layer norms are left out.")
    layer_wise_lr_decay: float = option(
        1.0, "Optimiser", "Each layer below the head learns slower by this factor (ELECTRA: 0.8)."
    )
    max_grad_norm: float = option(1.0, "Optimiser", "Gradients are scaled down to this norm; 0 = never.")
    lr_scheduler_type: Literal["linear", "cosine", "polynomial", "constant"] = option(
        "linear", "Optimiser", "How the rate falls after the warm-up."
    )
    warmup_steps: float = option(0.0, "Optimiser", "Steps in which the rate rises; below 1, a share of the run.")
    lr_end_ratio: float = option(0.0, "Optimiser", "Where the rate ends, as a share of its peak.")
    lr_power: float = option(1.0, "Optimiser", "Power of the polynomial schedule.")
    ema_decay: float = option(
        0.0, "Optimiser", "Evaluate and keep a moving average of the weights with this decay; 0 = no."
    )

    device: str | None = option(None, "Devices", "cpu, cuda, cuda:1; None = a GPU if there is one.")
    bf16: bool | Literal["auto"] = option(
        "auto", "Devices", "bfloat16 matrix products; auto = where the device multiplies them natively."
    )
    fp16: bool = option(False, "Devices", "float16 matrix products with a dynamic loss scale.")
    gradient_checkpointing: bool = option(
        False, "Devices", "Compute layers again in backward: less memory, a third more work."
    )
    strategy: Literal["ddp", "fsdp"] = option(
        "ddp", "Devices", "Under torchrun: each device holds the model, or a shard of it."
    )
    ddp_timeout: float = option(1800.0, "Devices", "Seconds after which a device that does not answer counts as lost.")
    peak_tflops: float | None = option(None, "Devices", "A device's roof for the utilisation shown; None = measure it.")

    logging_steps: int = option(50, "Watching", "Steps between lines of the log.")
    eval_strategy: Literal["no", "steps", "epoch"] = option("epoch", "Watching", "When to evaluate.")
    eval_steps: int = option(500, "Watching", "Steps between evaluations where the strategy is steps.")
    save_strategy: Literal["no", "steps", "epoch"] = option("epoch", "Watching", "When to save a checkpoint.")
    save_steps: int = option(500, "Watching", "Steps between checkpoints where the strategy is steps.")
    save_total_limit: int | None = option(2, "Watching", "Checkpoints kept, besides the best; None = all.")
    load_best_model_at_end: bool = option(False, "Watching", "End with the weights of the best evaluation.")
    metric_for_best_model: str = option("eval_loss", "Watching", "What the best evaluation is judged by.")
    greater_is_better: bool | None = option(None, "Watching", "Which way is better; None = less for a loss, else more.")
    early_stopping_patience: int | None = option(None, "Watching", "Stop after so many evaluations without a gain.")
    early_stopping_threshold: float = option(0.0, "Watching", "A smaller gain counts as none.")

    def __post_init__(self) -> None:
        check_types(self)
        at_least = {
            "micro_tokens": 1, "logging_steps": 1, "eval_steps": 1, "save_steps": 1, "batch_size": 1, "batch_tokens": 1,
            "save_total_limit": 1, "early_stopping_patience": 1, "learning_rate": 0, "adam_epsilon": 0,
            "weight_decay": 0, "max_grad_norm": 0, "warmup_steps": 0, "early_stopping_threshold": 0,
        }  # fmt: skip
        for name, least in at_least.items():
            self._require(name, lambda v, least=least: v >= least, f"{least} or more")
        for name in ("ddp_timeout", "peak_tflops", "num_train_epochs", "lr_power"):
            self._require(name, lambda v: v > 0, "above 0")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            self._require(name, lambda v: 0 <= v < 1, "at least 0 and below 1")
        self._require("lr_end_ratio", lambda v: 0 <= v <= 1, "between 0 and 1")
        self._require("layer_wise_lr_decay", lambda v: 0 < v <= 1, "above 0 and at most 1")
        self._require("max_steps", lambda v: v > 0 or v == -1, "above 0, or -1")
        self._require("warmup_steps", lambda v: v < 1 or v == int(v), "a whole number of steps, or a share below 1")
        self._require("seed", lambda v: 0 <= v < 2**63, "between 0 and 2^63 - 1")
        self._exclude(self.batch_size is not None and self.batch_tokens is not None, "batch_size", "batch_tokens")
        self._exclude(self.bf16 is True and self.fp16, "bf16", "fp16")
        self._exclude(self.resume and self.overwrite, "resume", "overwrite")
        self._exclude(self.time_budget is not None and self.max_steps > 0, "time_budget", "max_steps")
        if self.time_budget is not None:
            parse_seconds(self.time_budget)
            self._require("warmup_steps", lambda v: v < 1, "a share below 1 where there is a time_budget")
        if self.output_dir is None:
            for name in ("resume", "overwrite", "load_best_model_at_end"):
                self._require(name, lambda v: not v, "False without an output_dir: there are no checkpoints then")
        if (self.load_best_model_at_end or self.early_stopping_patience) and self.eval_strategy == "no":
            name = "load_best_model_at_end" if self.load_best_model_at_end else "early_stopping_patience"
            raise ValueError(f"{name} needs evaluations, but eval_strategy is 'no'")

    @property
    def items_or_tokens(self) -> dict[str, int | None]:
        """`batch_items` and `batch_tokens` as a `Loader` takes them: exactly one is a number."""
        items = 32 if self.batch_size is None and self.batch_tokens is None else self.batch_size
        return {"batch_items": items, "batch_tokens": self.batch_tokens}

    @property
    def budget_s(self) -> float | None:
        """The time budget in seconds."""
        return None if self.time_budget is None else parse_seconds(self.time_budget)

    @property
    def more_is_better(self) -> bool:
        """Whether a larger `metric_for_best_model` is better."""
        if self.greater_is_better is not None:
            return self.greater_is_better
        return not self.metric_for_best_model.endswith(("loss", "perplexity", "error"))

    def _require(self, name: str, holds: Any, wanted: str) -> None:
        value = getattr(self, name)
        if value is not None and not holds(value):
            raise ValueError(f"{name} is {value!r}; it must be {wanted}")

    def _exclude(self, both: bool, first: str, second: str) -> None:
        if both:
            raise ValueError(
                f"{first}={getattr(self, first)!r} and {second}={getattr(self, second)!r} exclude each other: give one"
            )
