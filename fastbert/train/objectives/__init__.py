"""What training minimises: one class a kind of loss, (model, batch) -> loss, metrics."""

from fastbert.train.objectives.contrastive import CoSENT, CosineSimilarity, InBatchNegatives
from fastbert.train.objectives.distillation import Distillation
from fastbert.train.objectives.heads import (
    MultipleChoice,
    QuestionAnswering,
    SequenceClassification,
    TokenClassification,
)
from fastbert.train.objectives.loss import Loss, Objective
from fastbert.train.objectives.masked_lm import MaskedLM, MaskedLMWithNextSentence, MaskedLMWithSentenceOrder
from fastbert.train.objectives.replaced_token import ReplacedTokenDetection

__all__ = [
    "CoSENT",
    "CosineSimilarity",
    "Distillation",
    "InBatchNegatives",
    "Loss",
    "MaskedLM",
    "MaskedLMWithNextSentence",
    "MaskedLMWithSentenceOrder",
    "MultipleChoice",
    "Objective",
    "QuestionAnswering",
    "ReplacedTokenDetection",
    "SequenceClassification",
    "TokenClassification",
]
