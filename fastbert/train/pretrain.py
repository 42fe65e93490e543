"""Pretraining: texts to a vocabulary, shards, items, a model and its objective, and the loop over them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastbert.tokenizer import Tokenizer
from fastbert.train.card import Card
from fastbert.train.documents import Texts
from fastbert.train.families import vocabulary_kind
from fastbert.train.heldout import HeldOut
from fastbert.train.loop import train
from fastbert.train.masking import Masking
from fastbert.train.objectives import (
    Distillation,
    MaskedLM,
    MaskedLMWithNextSentence,
    MaskedLMWithSentenceOrder,
    Objective,
    ReplacedTokenDetection,
)
from fastbert.train.options import from_mapping
from fastbert.train.origin import PAIRS, Origin, num_positions
from fastbert.train.outcome import TrainResult
from fastbert.train.pairs import Pairs
from fastbert.train.pretrain_arguments import PretrainArguments
from fastbert.train.segments import Frame, Segments
from fastbert.train.shards import Shards, build_shards, shards_fingerprint
from fastbert.train.token_kinds import TokenKinds
from fastbert.train.vocabulary import train_vocabulary

MUCH_TEXT = 1 << 26  # bytes from which on worker processes are worth their start


@dataclass(frozen=True)
class Pretraining:
    """A pretraining run that is ready to begin.

    Attributes:
        arguments: of the run.
        tokenizer: with the model's `max_length`.
        model: what is trained.
        objective_name, objective: what is minimised.
        train, eval: items.
        shards: the tokens that the items of `train` come from.
    """

    arguments: PretrainArguments
    tokenizer: Tokenizer
    model: Any
    objective_name: str
    objective: Objective
    train: Segments | Pairs
    eval: Segments | Pairs | None
    shards: Shards

    def evaluator(self) -> HeldOut | None:
        """Loss and metrics on held-out texts, if there are any."""
        return None if self.eval is None else HeldOut(self.objective, self.eval, self.arguments.micro_tokens)

    def run(self) -> TrainResult:
        """Train; errors and what is left in the output folder are those of `fastbert.train.loop.train`."""
        arguments, objective = self.arguments, self.objective_name
        card = Card(
            title=Path(arguments.output_dir or "model").name,
            summary=f"{self.model.config.model_type} pretrained with {objective} on {self.shards.num_tokens:,} tokens.",
            base_model=arguments.model or arguments.teacher,
            pipeline_tag=None if objective == "electra" else "fill-mask",
            datasets=[Path(str(name)).name for name in arguments.data],
        )
        return train(
            self.model, self.objective, self.train, arguments, evaluate=self.evaluator(), tokenizer=self.tokenizer,
            card=card,
        )  # fmt: skip


def pretrain(arguments: PretrainArguments | None = None, *, data: Any = None, **options: Any) -> TrainResult:
    """Pretrain a model on texts.

        result = pretrain(data="books/", vocab_size=30522, size="small", objective="mlm+nsp", output_dir="OUT")

    The output folder then holds the model and its tokenizer, checkpoints, log and curves, and `data/` with vocabulary
    and tokens, which a later run on the same texts uses again. Under torchrun all ranks must see that folder.

    Args:
        arguments: of the run; or each by its name:
        data: texts, instead of `arguments.data`: what `fastbert.train.documents.Texts` takes, Hugging Face data sets
            as well.
        options: fields of `PretrainArguments`.

    Returns:
        The model, its metrics (`train_loss`, `eval_...`), the log.

    Raises:
        CorpusError: texts that cannot be read or hold nothing, a missing column, documents that give no pairs.
        ValueError: options that do not go together, or a value out of its range.
    """
    return prepare(arguments, data=data, **options).run()


def prepare(arguments: PretrainArguments | None = None, *, data: Any = None, **options: Any) -> Pretraining:
    """Everything of `pretrain` but the training. Arguments and errors alike."""
    if arguments is not None and options:
        raise ValueError(f"give arguments or options, not both: {', '.join(options)}")
    arguments = arguments or from_mapping(PretrainArguments, options, "pretrain()")
    if arguments.output_dir is None:
        raise ValueError("output_dir is None: vocabulary, tokens and checkpoints need a folder")
    folder = Path(arguments.output_dir) / "data"
    part = (arguments.holdout, 1.0)
    texts = Texts(arguments.data if data is None else data, arguments.column, arguments.split_sentences, part)
    origin = Origin(arguments)
    learnt = arguments.vocab_size is not None
    tokenizer = _vocabulary(texts, folder, origin.model_type, arguments) if learnt else origin.tokenizer()
    with torch.random.fork_rng([]):  # fresh weights are a function of the seed
        torch.manual_seed(arguments.seed)
        model, teacher = origin.model(tokenizer)
    tokenizer = tokenizer.with_max_length(num_positions(model))
    shards = _shards(texts, tokenizer, folder / "tokens", arguments)
    held_out = None
    if arguments.eval_data:
        held_out = Texts(arguments.eval_data, arguments.column, arguments.split_sentences)
    elif arguments.holdout:
        held_out = Texts(texts.sources, arguments.column, arguments.split_sentences, (0.0, arguments.holdout))
    items = build_items(shards, tokenizer, origin.objective, arguments)
    evaluated = None
    if held_out is not None:
        held_shards = _shards(held_out, tokenizer, folder / "eval-tokens", arguments)
        evaluated = build_items(held_shards, tokenizer, origin.objective, arguments)
    objective = build_objective(origin.objective, tokenizer, arguments, teacher)
    return Pretraining(arguments, tokenizer, model, origin.objective, objective, items, evaluated, shards)


def build_objective(name: str, tokenizer: Tokenizer, arguments: PretrainArguments, teacher: Any = None) -> Objective:
    """What is minimised. ELECTRA masks 85 % of the chosen tokens and puts in no random ones, the others as BERT."""
    kinds = TokenKinds.from_tokenizer(tokenizer)
    masking = Masking(
        probability=arguments.mlm_probability,
        whole_word=arguments.whole_word,
        max_ngram=arguments.max_ngram,
        static=arguments.static_masking,
        dupe_factor=1,
        seed=arguments.seed,
        **({"mask_replace": 0.85, "random_replace": 0.0} if name == "electra" else {}),
    )
    if name == "distil":
        return Distillation(kinds, teacher, masking)
    kind = {
        "mlm": MaskedLM,
        "mlm+nsp": MaskedLMWithNextSentence,
        "mlm+sop": MaskedLMWithSentenceOrder,
        "electra": ReplacedTokenDetection,
    }[name]
    return kind(kinds, masking)


def build_items(shards: Shards, tokenizer: Tokenizer, name: str, arguments: PretrainArguments) -> Segments | Pairs:
    """The dataset that the objective of that name needs."""
    frame = Frame.of(tokenizer)
    if name in PAIRS:
        return Pairs(
            shards, frame, arguments.seq_length, PAIRS[name], arguments.short_seq_prob, arguments.dupe_factor,
            arguments.seed,
        )  # fmt: skip
    return Segments(shards, frame, arguments.seq_length, arguments.segments == "full-sentences")


def _vocabulary(texts: Texts, folder: Path, model_type: str, arguments: PretrainArguments) -> Tokenizer:
    kind, special = vocabulary_kind(model_type)
    kind = kind if arguments.vocabulary == "auto" else arguments.vocabulary
    size, lowercase = arguments.vocab_size, arguments.lowercase
    assert size is not None
    settings = [texts.fingerprint(), size, kind, lowercase, special.all]
    name = hashlib.blake2b(json.dumps(settings).encode(), digest_size=8).hexdigest()
    found = folder / f"vocabulary-{name}"

    def build() -> None:
        scratch = found.with_name(found.name + ".partial")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        train_vocabulary(texts, size, kind, lowercase, special, arguments.seq_length).save(scratch)
        os.replace(scratch, found)

    _first_rank(found.is_dir, build)
    return Tokenizer.from_folder(found, arguments.seq_length, arguments.seq_length)


def _shards(texts: Texts, tokenizer: Tokenizer, folder: Path, arguments: PretrainArguments) -> Shards:
    workers = arguments.num_workers
    if workers is None:
        workers = min(8, os.cpu_count() or 1) if texts.nbytes > MUCH_TEXT else 1
    fingerprint = shards_fingerprint(texts, tokenizer)
    _first_rank(
        lambda: Shards.fingerprint_of(folder) == fingerprint,
        lambda: build_shards(texts, tokenizer, folder, workers, not arguments.quiet),
    )
    return Shards.open(folder)


def _first_rank(is_done: Callable[[], bool], build: Callable[[], object]) -> None:
    """Rank 0 builds, the others wait until the files are there; torchrun ends them where it fails."""
    if int(os.environ.get("RANK", 0)) == 0 and not is_done():
        build()
    while not is_done():
        time.sleep(0.2)
