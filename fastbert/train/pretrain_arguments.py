"""PretrainArguments: what a training run is told, and texts, vocabulary, model and objective of pretraining."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastbert.train.arguments import TrainArguments
from fastbert.train.options import option

# What each family was pretrained with, but for BERT: RoBERTa's paper found next sentences to be of no use.
FAMILY_OBJECTIVES = {"albert": "mlm+sop", "electra": "electra"}
BATCH_TOKENS = 32768


@dataclass(kw_only=True, frozen=True)
class PretrainArguments(TrainArguments):
    """What a pretraining run is told. The defaults of the optimiser are those of BERT's code (Devlin et al. 2018).

    The model is new (`model_type` and `size`, or `config_json`), or goes on from `model`. Its tokenizer comes from
    `tokenizer`, from the model, or is learnt (`vocab_size`).
    """

    batch_size: int | None = option(None, "Batches", "Items an optimiser step, over all devices; see --batch-tokens.")
    batch_tokens: int | None = option(
        None, "Batches", f"Tokens an optimiser step, over all devices ({BATCH_TOKENS} unless --batch-size is given)."
    )
    num_train_epochs: float = option(1.0, "Length", "Passes over the data.", "--epochs")
    learning_rate: float = option(1e-4, "Optimiser", "Peak learning rate.", "--lr")
    weight_decay: float = option(0.01, "Optimiser", "Decoupled; biases and layer norms are left out.")
    adam_epsilon: float = option(1e-6, "Optimiser", "Added to the root of the squared mean.")
    warmup_steps: float = option(0.06, "Optimiser", "Steps in which the rate rises; below 1, a share of the run.")
    eval_strategy: Literal["no", "steps", "epoch"] = option("steps", "Watching", "When to evaluate.")
    save_strategy: Literal["no", "steps", "epoch"] = option("steps", "Watching", "When to save a checkpoint.")

    data: tuple[str, ...] = option(
        (), "Texts", "Files (.txt .jsonl .csv .parquet), folders, hub:NAME; several follow each other, or as a,b."
    )
    eval_data: tuple[str, ...] = option((), "Texts", "Texts to evaluate on.")
    holdout: float = option(0.0, "Texts", "Without --eval-data: share of the documents to evaluate on.")
    column: str = option("text", "Texts", "Column or key that holds the text.")
    split_sentences: bool = option(
        False,
        "Texts",
        "Find sentences in prose; without it, a line is one (and in .txt, a blank line ends a document).",
    )
    num_workers: int | None = option(
        None, "Texts", "Processes that tokenise; None = one a core, up to 8, where there is much text."
    )

    tokenizer: str | None = option(None, "Vocabulary", "Folder or hub id of a tokenizer; None = the model's.")
    vocab_size: int | None = option(None, "Vocabulary", "Learn a vocabulary of so many ids from the texts.")
    vocabulary: Literal["auto", "wordpiece", "bpe"] = option(
        "auto", "Vocabulary", "Kind of the one learnt; auto = byte-level BPE for roberta, else WordPiece."
    )
    lowercase: bool = option(True, "Vocabulary", "WordPiece learnt: lower the text and strip accents.")

    model: str | None = option(None, "Model", "Folder or hub id to go on from.", "-m")
    model_type: Literal["bert", "roberta", "albert", "distilbert", "electra", "mpnet"] = option(
        "bert", "Model", "Family of a new model."
    )
    size: Literal["tiny", "mini", "small", "medium", "base", "large"] = option("base", "Model", "Of a new model.")
    config_json: str | None = option(None, "Model", "A config.json of a new model, instead of family and size.")
    dropout: float | None = option(
        None, "Model", "Of a new model: hidden states and attention; None = the family's (0.1, albert 0)."
    )
    initializer_range: float | None = option(
        None,
        "Model",
        "Of a new model: deviation of its weights (0.02). Narrow ones learn far sooner from 1 / sqrt(hidden size).",
    )
    generator_size: float = option(0.25, "Model", "electra: width of the generator, as a share.")
    teacher: str | None = option(None, "Model", "distil: folder or hub id of a masked language model.")
    student_layers: int | None = option(None, "Model", "distil: layers of the student; None = half of the teacher's.")

    objective: Literal["auto", "mlm", "mlm+nsp", "mlm+sop", "electra", "distil"] = option(
        "auto", "Objective", "auto = mlm; mlm+sop for albert, electra for electra, distil where there is a teacher."
    )
    seq_length: int = option(128, "Objective", "Tokens an item, special ones included.")
    segments: Literal["documents", "full-sentences"] = option(
        "documents", "Objective", "Without pairs: items end with their document, or go on into the next."
    )
    short_seq_prob: float = option(0.1, "Objective", "Pairs: share of the documents that give shorter items.")
    dupe_factor: int = option(1, "Objective", "Pairs: passes over the documents, each with other pairs.")
    mlm_probability: float = option(0.15, "Objective", "Share of the tokens that is predicted.")
    whole_word: bool = option(False, "Objective", "Choose whole words.")
    max_ngram: int = option(1, "Objective", "Choose runs of 1 to so many tokens (or words).")
    static_masking: bool = option(False, "Objective", "The same masks in every epoch.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("vocab_size", 1), ("student_layers", 1), ("num_workers", 1), ("seq_length", 5)):
            self._require(name, lambda v, least=least: v >= least, f"{least} or more")
        for name in ("dupe_factor", "max_ngram"):
            self._require(name, lambda v: v >= 1, "1 or more")
        for name in ("generator_size", "mlm_probability"):
            self._require(name, lambda v: 0 < v <= 1, "above 0 and at most 1")
        self._require("dropout", lambda v: 0 <= v < 1, "at least 0 and below 1")
        self._require("initializer_range", lambda v: v > 0, "above 0")
        self._require("short_seq_prob", lambda v: 0 <= v <= 1, "between 0 and 1")
        self._require("holdout", lambda v: 0 <= v < 1, "at least 0 and below 1")
        self._exclude(bool(self.eval_data) and self.holdout > 0, "eval_data", "holdout")
        self._exclude(self.tokenizer is not None and self.vocab_size is not None, "tokenizer", "vocab_size")
        self._exclude(self.model is not None and self.config_json is not None, "model", "config_json")
        self._exclude(self.model is not None and self.vocab_size is not None, "model", "vocab_size")
        self._exclude(self.teacher is not None and self.vocab_size is not None, "teacher", "vocab_size")
        self._exclude(self.teacher is not None and self.model is not None, "teacher", "model")
        for name in ("dropout", "initializer_range"):
            for source in ("model", "config_json", "teacher"):
                self._exclude(getattr(self, name) is not None and getattr(self, source) is not None, name, source)
        if self.teacher is not None and self.objective not in ("auto", "distil"):
            raise ValueError(f"teacher is {self.teacher!r}, but the objective is {self.objective!r}, which has none")

    @property
    def items_or_tokens(self) -> dict[str, int | None]:
        """`batch_items` and `batch_tokens` as a `Loader` takes them: exactly one is a number."""
        tokens = BATCH_TOKENS if self.batch_size is None and self.batch_tokens is None else self.batch_tokens
        return {"batch_items": self.batch_size, "batch_tokens": tokens}
