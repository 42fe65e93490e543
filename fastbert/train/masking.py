"""Which tokens are masked and what they become: a pure function of (seed, epoch, item, place), on the device."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

from fastbert.ops.dispatch import can_look
from fastbert.train.batch import TrainBatch
from fastbert.train.draws import SPAN, Places, draws
from fastbert.train.token_kinds import TokenKinds

Tensor = torch.Tensor
IGNORED = -100  # label of what is not to be predicted
# Spans that no longer fit are passed over for shorter ones; each pass over them spends at least a token more of what is
# left, and after the first less than a word is left.
PASSES = 4


@dataclass(frozen=True)
class Masking:
    """How tokens are masked. The defaults are BERT's (Devlin et al. 2018, arXiv 1810.04805, sec. 3.1), drawn anew.

    Of each sequence exactly `max(1, round(probability * length))` tokens are chosen, special ones counted in the length
    and never chosen; a sequence with fewer others has them all chosen.

    Attributes:
        probability: share of the tokens.
        mask_replace: share of the chosen tokens that become [MASK]; each token draws for itself, in words too.
        random_replace: share that become a random token, uniform over all but the special ones (BERT draws from the
            whole vocabulary). The rest stays as it is.
        whole_word: choose all pieces of a word or none. A word that is longer than what is left of a sequence's number
            is passed over.
        max_ngram: choose runs of 1 to so many tokens (or words), n with a probability in proportion to 1 / n
            (ALBERT, Lan et al. 2019, arXiv 1909.11942, sec. 4.1). The runs divide the sequence, so that none overlap.
        static: mask an item alike in every epoch, but for `dupe_factor` variants in turn, as BERT's stored data does.
        dupe_factor: the number of variants.
        seed: non-negative.

    Raises:
        ValueError: a share outside 0..1, or a number that is not positive.
    """

    probability: float = 0.15
    mask_replace: float = 0.8
    random_replace: float = 0.1
    whole_word: bool = False
    max_ngram: int = 1
    static: bool = False
    dupe_factor: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.probability <= 1.0:
            raise ValueError(f"probability is {self.probability}; it must be above 0 and at most 1")
        kept = 1.0 - self.mask_replace - self.random_replace
        if min(self.mask_replace, self.random_replace, kept + 1e-9) < 0.0:
            raise ValueError(
                f"mask_replace is {self.mask_replace} and random_replace {self.random_replace}: "
                "they are shares of the chosen tokens, at least 0 and together at most 1"
            )
        for name, least in (("max_ngram", 1), ("dupe_factor", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {least} or more")

    def epoch(self, batch: TrainBatch) -> int:
        """Which draw of the batch's masks is meant."""
        return batch.epoch % self.dupe_factor if self.static else batch.epoch


def mask_tokens(batch: TrainBatch, kinds: TokenKinds, masking: Masking) -> TrainBatch:
    """The batch with masked input ids, and with `labels` (T): the token that was there, -100 where none was chosen.

    Raises:
        ValueError: `whole_word` with a vocabulary that does not tell where words begin.
        IndexError: a token id outside of the vocabulary (checked on the CPU).
    """
    ids, places, epoch = batch.packed.input_ids, Places.of(batch.packed), masking.epoch(batch)
    if can_look(ids) and ids.numel() and int(ids.max()) >= kinds.special.numel():
        raise IndexError(f"token id {int(ids.max())} is outside of the tokenizer's {kinds.special.numel()} ids")
    chosen = choose_tokens(batch, places, kinds, masking)
    fate = draws(batch, places, "fate", masking.seed, epoch)
    other = kinds.ordinary[(draws(batch, places, "word", masking.seed, epoch) * kinds.ordinary.shape[0]) >> 32]
    masked_below = round(masking.mask_replace * SPAN)
    replaced_below = masked_below + round(masking.random_replace * SPAN)
    masked = torch.where(chosen & (fate < replaced_below), other, ids)
    masked = torch.where(chosen & (fate < masked_below), kinds.mask_id, masked)
    return batch.with_inputs(masked, labels=torch.where(chosen, ids, IGNORED))


def choose_tokens(batch: TrainBatch, places: Places, kinds: TokenKinds, masking: Masking) -> Tensor:
    """(T) bool: the tokens that are to be predicted."""
    ids, S = batch.packed.input_ids, batch.packed.num_sequences
    candidate = ~kinds.special[ids]
    if ids.shape[0] == 0:
        return candidate
    follows = candidate.roll(1) & (places.position > 0) & candidate  # the token before is a candidate too
    begins = candidate
    if masking.whole_word:
        if kinds.continuation is None:
            raise ValueError("whole_word: this vocabulary does not tell where words begin; mask tokens instead")
        begins = candidate & ~(follows & kinds.continuation[ids])
    word = _number(begins)
    leads = begins
    if masking.max_ngram > 1:
        leads = _ngram_starts(batch, places, begins, word, masking) | (begins & ~follows)
    score = draws(batch, places, "choice", masking.seed, masking.epoch(batch))
    lengths = batch.packed.lengths
    num_candidates = torch.zeros_like(lengths, dtype=torch.int64).index_add(0, places.sequence, candidate.long())
    num = (lengths.double() * masking.probability).round().long().clamp(min=1).minimum(num_candidates)

    span = _number(leads)
    sizes = torch.zeros_like(ids).index_add(0, span, candidate.long())
    order = torch.where(leads, (places.sequence << 32) | score, S << 32).argsort(stable=True)
    taken, left = _take(sizes[span[order]] * leads[order], places.sequence[order], num)
    chosen = candidate & (torch.zeros_like(ids).index_add(0, span[order], taken.long()) > 0)[span]

    # Where not even one span fits, the first word of the span that came first is taken all the same.
    num_leads = torch.zeros_like(num).index_add(0, places.sequence, leads.long())
    first = order[(num_leads.cumsum(0) - num_leads).clamp(max=ids.shape[0] - 1)]
    none = (left == num) & (num > 0)
    return chosen | (candidate & none[places.sequence] & (word == word[first][places.sequence]))


def _number(flags: Tensor) -> Tensor:
    """(T): for each token the number of the last flagged one at or before it, from 0."""
    return (flags.cumsum(0) - 1).clamp(min=0)


def _take(sizes: Tensor, sequence: Tensor, num: Tensor) -> tuple[Tensor, Tensor]:
    """Take spans in order as long as they fit: one that does not is passed over for those after it.

    Args:
        sizes: (T) tokens of each span, in the order of preference within each sequence; 0 = no span.
        sequence: (T) whose it is.
        num: (S) tokens wanted.

    Returns:
        (T) bool: the span is taken. (S) tokens still wanted.
    """
    taken, open_, left = torch.zeros_like(sizes, dtype=torch.bool), sizes > 0, num
    for _ in range(PASSES):
        open_ = open_ & (sizes <= left[sequence])
        wanted = sizes * open_
        total = torch.zeros_like(num).index_add(0, sequence, wanted)
        before = (total.cumsum(0) - total)[sequence]
        now = open_ & (wanted.cumsum(0) - before <= left[sequence])
        taken, open_ = taken | now, open_ & ~now
        left = left - torch.zeros_like(num).index_add(0, sequence, sizes * now)
    return taken, left


def _ngram_starts(batch: TrainBatch, places: Places, begins: Tensor, word: Tensor, masking: Masking) -> Tensor:
    """(T) bool: first words of runs whose lengths are drawn one after the other, n in proportion to 1 / n."""
    weights = [1.0 / n for n in range(1, masking.max_ngram + 1)]
    bounds = [round(total / sum(weights) * SPAN) for total in accumulate(weights)]
    draw = draws(batch, places, "ngram", masking.seed, masking.epoch(batch))
    length = 1 + sum((draw >= bound).long() for bound in bounds[:-1])
    starts = batch.packed.cu_seqlens.long()
    words_before, length_before = (_before(x)[starts] for x in (begins.long(), length * begins))
    # The k-th word of a sequence carries the length of its k-th run: the runs before say at which word that one begins.
    run_start = _before(length * begins)[:-1] - length_before[places.sequence] + words_before[places.sequence]
    inside = begins & (run_start < words_before[places.sequence + 1])
    T = begins.shape[0]
    marked = torch.zeros(T + 1, dtype=torch.bool, device=begins.device)
    marked = marked.index_fill(0, torch.where(inside, run_start, T), True)
    return begins & marked[word]


def _before(x: Tensor) -> Tensor:
    """(T) -> (T + 1): sums of all entries before each place."""
    return torch.cat([x.new_zeros(1), x.cumsum(0)])
