"""Masking against its definition token by token, its rates, and that it depends on nothing but seed, epoch and item."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from fastbert.tokenizer import Tokenizer
from fastbert.train import masking as masking_module
from fastbert.train.batch import TrainBatch, collate
from fastbert.train.draws import SPAN, Places, draws, stream_key
from fastbert.train.masking import Masking, choose_tokens, mask_tokens
from fastbert.train.objectives import MaskedLM
from fastbert.train.objectives.replaced_token import gumbel_sample
from fastbert.train.token_kinds import TokenKinds

V, CLS, SEP, MASK = 200, 1, 2, 3
SIGMAS = 5.0


def kinds() -> TokenKinds:
    """Ids 0 to 4 are special; from 120 on they continue a word."""
    return TokenKinds.of(MASK, torch.arange(V) < 5, torch.arange(V) >= 120)


def sentence(length: int, seed: int, most_pieces: int = 4) -> list[int]:
    """[CLS] words [SEP], a second [SEP] in the middle; no word has more than `most_pieces` pieces."""
    g = np.random.default_rng(seed)
    ids, pieces = [CLS], 0
    while len(ids) < length - 1:
        goes_on = 0 < pieces < most_pieces and g.random() < 0.4
        pieces = pieces + 1 if goes_on else 1
        ids.append(int(g.integers(120, V) if goes_on else g.integers(5, 120)))
        if len(ids) == length // 2:
            ids.append(SEP)
            pieces = 0
    return [*ids[: length - 1], SEP]


def batch_of(sequences: list[list[int]], index: list[int] | None = None, epoch: int = 0) -> TrainBatch:
    return collate([{"input_ids": ids} for ids in sequences], index or list(range(len(sequences))), epoch)


def masked_parts(batch: TrainBatch, masking: Masking) -> list[tuple[list[int], list[int]]]:
    """(masked ids, labels) of each sequence."""
    out = mask_tokens(batch, kinds(), masking)
    parts = out.packed.split(out.packed.input_ids), out.packed.split(out.labels["labels"])
    return [(ids.tolist(), labels.tolist()) for ids, labels in zip(*parts, strict=True)]


def within(count: int, trials: int, p: float) -> None:
    """A binomial count, within 5 standard deviations."""
    assert abs(count - trials * p) <= SIGMAS * math.sqrt(trials * p * (1 - p)), (count, trials, p, count / trials)


def chi_square(observed: np.ndarray, expected: np.ndarray) -> None:
    """Pearson's statistic within 5 standard deviations of its mean (its variance is twice the degrees of freedom)."""
    free = observed.size - 1
    statistic = float(((observed - expected) ** 2 / expected).sum())
    assert statistic <= free + SIGMAS * math.sqrt(2 * free), (statistic, free)


LENGTHS = [2, 3, 4, 5, 7, 10, 11, 30, 64, 128, 200]
STYLES = {
    "tokens": Masking(seed=3),
    "many": Masking(probability=0.45, seed=3),
    "words": Masking(whole_word=True, seed=3),
    "ngrams": Masking(max_ngram=3, probability=0.3, seed=3),
    "word_ngrams": Masking(whole_word=True, max_ngram=3, probability=0.3, seed=3),
}
styles = pytest.mark.parametrize("masking", STYLES.values(), ids=STYLES)


def by_definition(ids: list[int], item: int, masking: Masking, epoch: int = 0) -> set[int]:
    """The chosen positions of one sequence, found one after the other."""
    alone = batch_of([ids], [item])
    scores, lengths = (
        draws(alone, Places.of(alone.packed), stream, masking.seed, epoch).tolist() for stream in ("choice", "ngram")
    )
    candidates = [p for p, i in enumerate(ids) if i >= 5]
    words: list[list[int]] = []
    for p in candidates:
        if masking.whole_word and ids[p] >= 120 and words and words[-1][-1] == p - 1:
            words[-1].append(p)
        else:
            words.append([p])
    total = sum(1 / n for n in range(1, masking.max_ngram + 1))
    runs: list[list[list[int]]] = []  # runs of words, as drawn one after the other; a special token cuts one in two
    at = 0
    for k in range(len(words)):
        if at >= len(words):
            break
        u, length = lengths[words[k][0]] / SPAN, 1
        while length < masking.max_ngram and u >= sum(1 / n for n in range(1, length + 1)) / total:
            length += 1
        for w, word in enumerate(words[at : at + length]):
            if w and runs[-1][-1][-1] == word[0] - 1:
                runs[-1].append(word)
            else:
                runs.append([word])
        at += length
    num = min(max(1, round(masking.probability * len(ids))), len(candidates))
    chosen: set[int] = set()
    ranked = sorted(runs, key=lambda run: scores[run[0][0]])
    for run in ranked:
        tokens = [p for word in run for p in word]
        if len(chosen) + len(tokens) <= num:
            chosen |= set(tokens)
    return chosen or set(ranked[0][0] if ranked else [])


def check_definition(masking: Masking, epoch: int = 0) -> None:
    sequences = [sentence(n, seed) for seed in range(6) for n in LENGTHS] + [[CLS, SEP], [], [7], [MASK]]
    index = list(range(100, 100 + len(sequences)))
    batch = batch_of(sequences, index, epoch)
    for i, ids, (_, labels) in zip(index, sequences, masked_parts(batch, masking), strict=True):
        found = {p for p, label in enumerate(labels) if label != -100}
        assert found == by_definition(ids, i, masking, epoch), (i, ids)
        assert all(labels[p] == ids[p] for p in found)


@styles
@pytest.mark.parametrize("epoch", [0, 7])
def test_chosen_as_defined(masking, epoch):
    check_definition(masking, epoch)


@pytest.mark.parametrize(
    ("name", "style"),
    [
        ("_number", "words"),
        ("_take", "words"),
        ("_ngram_starts", "ngrams"),
        ("accumulate", "ngrams"),
    ],
)
def test_definition_catches_mutants(monkeypatch, name, style):
    right = getattr(masking_module, name)

    def stop_at_the_first_that_does_not_fit(sizes, sequence, num):
        monkeypatch.setattr(masking_module, "PASSES", 1)
        return right(sizes, sequence, num)

    mutants = {
        "_number": lambda flags: right(flags.roll(-1)),
        "_take": stop_at_the_first_that_does_not_fit,
        "_ngram_starts": lambda batch, places, begins, *rest: right(batch, places, begins, *rest).roll(1) & begins,
        "accumulate": lambda weights: right([sum(weights) / len(weights)] * len(weights)),
    }
    monkeypatch.setattr(masking_module, name, mutants[name])
    with pytest.raises(AssertionError):
        check_definition(STYLES[style])


@pytest.mark.parametrize("probability", [0.05, 0.15, 0.5, 1.0])
def test_number_is_exact_and_never_zero(probability):
    sequences = [sentence(n, n) for n in range(2, 120)]
    for ids, (_, labels) in zip(
        sequences, masked_parts(batch_of(sequences), Masking(probability=probability)), strict=True
    ):
        candidates = sum(i >= 5 for i in ids)
        assert sum(label != -100 for label in labels) == min(max(1, round(probability * len(ids))), candidates)


@styles
def test_words_are_whole_special_tokens_stay_and_the_number_is_kept(masking):
    sequences = [sentence(n, seed, most_pieces=9) for seed in range(30) for n in (4, 9, 40, 90)]
    for ids, (masked, labels) in zip(sequences, masked_parts(batch_of(sequences), masking), strict=True):
        chosen = [label != -100 for label in labels]
        assert any(chosen)
        assert all(i >= 5 for i, c in zip(ids, chosen, strict=True) if c)
        assert all(i == m for i, m, c in zip(ids, masked, chosen, strict=True) if not c)
        words = Counter()
        if masking.whole_word:
            starts = np.cumsum([i < 120 for i in ids])
            words = Counter((int(w), c) for w, c, i in zip(starts, chosen, ids, strict=True) if i >= 5)
            assert not any((w, not c) in words for w, c in words)
        most = max(1, round(masking.probability * len(ids)))
        one_long_word = sum(c for (_, c) in words) == 1
        assert sum(chosen) <= most or (masking.whole_word and one_long_word)


def test_shares_of_what_becomes_of_chosen_tokens():
    sequences = [sentence(128, seed) for seed in range(400)]
    batch = batch_of(sequences)
    out = mask_tokens(batch, kinds(), Masking(seed=11))
    before, after, labels = batch.packed.input_ids, out.packed.input_ids, out.labels["labels"]
    chosen = labels != -100
    num = int(chosen.sum())
    assert num == 400 * 19
    within(int((after[chosen] == MASK).sum()), num, 0.8)
    ordinary = V - 5
    within(int((after[chosen] == before[chosen]).sum()), num, 0.1 + 0.1 / ordinary)
    random = after[chosen & (after != MASK) & (after != before)]
    within(len(random), num, 0.1 * (1 - 1 / ordinary))
    counts = torch.bincount(random, minlength=V)
    assert int(counts[:5].sum()) == 0  # special tokens are not put in
    chi_square(counts[5:].numpy(), np.full(ordinary, len(random) / ordinary))
    with pytest.raises(AssertionError):
        within(int((after[chosen] == MASK).sum()), num, 0.85)


def test_every_place_is_as_likely():
    sequences = [[CLS, *range(5, 67), SEP]] * 3000
    labels = mask_tokens(batch_of(sequences), kinds(), Masking(seed=5)).labels["labels"].view(3000, 64)
    counts = (labels != -100).sum(0)[1:-1].numpy()
    assert counts.sum() == 3000 * 10
    chi_square(counts, np.full(62, 3000 * 10 / 62))


def test_lengths_of_runs_go_as_one_over_n():
    sequences = [[CLS, *np.random.default_rng(s).integers(5, 120, 600).tolist(), SEP] for s in range(120)]
    batch = batch_of(sequences)
    masking = Masking(probability=0.01, max_ngram=3, seed=2)  # so few that runs hardly ever touch
    chosen = choose_tokens(batch, Places.of(batch.packed), kinds(), masking).view(120, -1)
    runs: Counter[int] = Counter()
    for row in chosen.tolist():
        text = "".join("x" if c else " " for c in row)
        runs.update(len(run) for run in text.split())
    total = sum(runs[n] for n in (1, 2, 3))
    shares = np.array([runs[n] / total for n in (1, 2, 3)])
    assert np.abs(shares - np.array([6, 3, 2]) / 11).max() < 0.06, shares
    assert np.abs(shares - 1 / 3).max() > 0.06


def check_composition(masking: Masking) -> None:
    sequences = [sentence(n, n) for n in (12, 40, 77, 9)]
    together = masked_parts(batch_of(sequences, [8, 2**33 + 5, 1, 90], epoch=4), masking)
    reversed_ = masked_parts(batch_of(sequences[::-1], [90, 1, 2**33 + 5, 8], epoch=4), masking)
    alone = [masked_parts(batch_of([s], [i], 4), masking)[0] for s, i in zip(sequences, [8, 2**33 + 5, 1, 90])]  # noqa: B905
    assert together == reversed_[::-1] == alone


@styles
def test_an_item_is_masked_alike_in_any_batch(masking):
    check_composition(masking)


def test_composition_catches_positions_counted_in_the_batch(monkeypatch):
    right = Places.of.__func__

    def of_batch(cls, packed):
        places = right(cls, packed)
        return cls(places.sequence, torch.arange(packed.num_tokens))

    monkeypatch.setattr(Places, "of", classmethod(of_batch))
    with pytest.raises(AssertionError):
        check_composition(Masking())


def test_seed_epoch_item_and_place_in_a_group_matter():
    ids = sentence(100, 0)

    def mask(index=0, epoch=0, **options):
        return masked_parts(batch_of([ids], [index], epoch), Masking(**options))[0]

    same, *others = (
        mask(), mask(seed=1), mask(seed=2**32), mask(epoch=1), mask(index=1), mask(index=2**32),
    )  # fmt: skip
    assert same == mask()
    assert all(other != same for other in others)
    pair = collate([{"input_ids": [ids, ids]}], [0])
    first, second = masked_parts(pair, Masking())
    assert first == same
    assert second != same


def test_static_masks_come_again():
    ids = [sentence(100, s) for s in range(5)]

    def mask(epoch, **options):
        return masked_parts(batch_of(ids, epoch=epoch), Masking(static=True, dupe_factor=3, **options))

    assert mask(0) == mask(3) == mask(300)
    assert mask(0) != mask(1)
    assert mask(1) != mask(2)
    assert masked_parts(batch_of(ids, epoch=0), Masking()) != masked_parts(batch_of(ids, epoch=10), Masking())


def test_global_generators_are_left_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    mask_tokens(batch_of([sentence(50, 0)]), kinds(), Masking(whole_word=True, max_ngram=3))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_without_candidates_has_no_masked_token():
    objective = MaskedLM(kinds())
    batch = objective.prepare(batch_of([[CLS, SEP], [], [MASK]]))
    assert int(objective.counts(batch)["mlm"]) == 0
    assert batch.packed.input_ids.tolist() == [CLS, SEP, MASK]
    assert int(objective.counts(objective.prepare(batch_of([[]])))["mlm"]) == 0


def test_streams_are_uniform_and_independent():
    batch = batch_of([[7] * 512] * 200)
    places = Places.of(batch.packed)
    numbers = {
        key: draws(batch, places, stream, seed, epoch).double().numpy() / SPAN
        for key, (stream, seed, epoch) in {
            "a": ("choice", 0, 0), "b": ("fate", 0, 0), "c": ("choice", 1, 0), "d": ("choice", 0, 1),
        }.items()
    }  # fmt: skip
    for values in numbers.values():
        counts = np.bincount((values * 256).astype(int), minlength=256)
        chi_square(counts, np.full(256, len(values) / 256))
    for a in numbers:
        for b in numbers:
            if a < b:
                assert abs(np.corrcoef(numbers[a], numbers[b])[0, 1]) < SIGMAS / math.sqrt(512 * 200)
    rows = numbers["a"].reshape(200, 512)
    assert abs(np.corrcoef(rows[:, :-1].ravel(), rows[:, 1:].ravel())[0, 1]) < SIGMAS / math.sqrt(200 * 511)
    assert len({stream_key("x", seed, epoch) for seed in range(60) for epoch in range(60)}) == 3600


def gumbel_counts(rows: int) -> tuple[np.ndarray, np.ndarray]:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -1.5, 0.3, 3.0])
    batch = batch_of([[7] * rows])
    keys = draws(batch, Places.of(batch.packed), "gumbel", 0, 0)
    drawn = torch.bincount(gumbel_sample(logits.expand(rows, -1), keys), minlength=7)
    return drawn.numpy(), (rows * logits.softmax(0)).numpy()


def test_gumbel_sampling_follows_the_softmax(monkeypatch):
    chi_square(*gumbel_counts(100_000))
    sampled = gumbel_counts(1000)[0]
    for chunk in (7, 64, 1 << 20):
        monkeypatch.setitem(gumbel_sample.__globals__["CHUNK"], "cpu", chunk)
        assert (gumbel_counts(1000)[0] == sampled).all()


def test_gumbel_oracle_rejects_a_temperature():
    drawn, expected = gumbel_counts(100_000)
    hotter = (np.log(expected) * 0.9).astype(np.float64)
    with pytest.raises(AssertionError):
        chi_square(drawn, 100_000 * np.exp(hotter) / np.exp(hotter).sum())


def test_gumbel_sampling_never_takes_the_impossible():
    keys = torch.arange(200_000) * 20_011 % SPAN
    logits = torch.zeros(200_000, 8).index_fill(1, torch.tensor([3]), float("-inf"))
    assert int((gumbel_sample(logits, keys) == 3).sum()) == 0
    assert gumbel_sample(torch.zeros(0, 8), keys[:0]).shape == (0,)


def _tokenizer(model, config=None, special=("[UNK]", "[CLS]", "[SEP]", "[MASK]"), **parts) -> Tokenizer:
    backend = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(backend, name, part)
    backend.add_special_tokens(list(special))
    return Tokenizer(backend, 64, config or {})


def test_kinds_of_a_published_wordpiece(minilm):
    tokenizer = Tokenizer.from_folder(minilm, 512)
    found = TokenKinds.from_tokenizer(tokenizer)
    of = tokenizer.backend.token_to_id
    assert found.mask_id == of("[MASK]") == 103
    assert [i for i in range(tokenizer.num_ids) if found.special[i]] == sorted(
        map(of, ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))
    )
    assert found.continuation is not None
    assert bool(found.continuation[of("##ing")])
    assert not bool(found.continuation[of("the")])
    assert len(found.ordinary) == tokenizer.num_ids - 5


def test_kinds_of_byte_level_and_sentencepiece_vocabularies():
    vocabulary = {"a": 0, "Ġa": 1, "ing": 2, "Ġ": 3, ",": 4, "Ċ": 5}
    bpe = _tokenizer(
        models.BPE(vocabulary, []), {"mask_token": {"content": "<mask>"}}, ("<s>", "</s>", "<mask>"),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False), decoder=decoders.ByteLevel(),
    )  # fmt: skip
    found = TokenKinds.from_tokenizer(bpe)
    assert found.mask_id == bpe.backend.token_to_id("<mask>")
    assert found.continuation is not None
    assert found.continuation[:6].tolist() == [True, False, True, False, True, False]
    unigram = _tokenizer(models.Unigram([("<unk>", 0.0), ("\u2581the", -1.0), ("re", -2.0), ("\u2581", -3.0)], 0))
    found = TokenKinds.from_tokenizer(unigram)
    assert found.continuation is not None
    assert found.continuation[1:4].tolist() == [False, True, False]


def test_a_word_begins_after_a_special_token_whatever_its_piece():
    labels = mask_tokens(batch_of([[CLS, 130, 131, SEP]]), kinds(), Masking(whole_word=True)).labels["labels"]
    assert labels.tolist() == [-100, 130, 131, -100]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probability": 0.0}, "probability is 0.0"),
        ({"probability": 1.5}, "probability is 1.5"),
        ({"mask_replace": 0.9, "random_replace": 0.2}, "mask_replace is 0.9 and random_replace 0.2"),
        ({"random_replace": -0.1}, "random_replace -0.1"),
        ({"max_ngram": 0}, "max_ngram is 0"),
        ({"dupe_factor": 0}, "dupe_factor is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        Masking(**options)


def test_all_shares_may_be_used_up():
    Masking(mask_replace=0.85, random_replace=0.15)
    Masking(mask_replace=0.9, random_replace=0.1)


def test_bad_vocabularies():
    with pytest.raises(ValueError, match="looked for"):
        TokenKinds.from_tokenizer(
            _tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), None, ("[UNK]",))
        )
    with pytest.raises(ValueError, match="nothing to mask"):
        TokenKinds.of(1, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask_id 2"):
        TokenKinds.of(2, torch.tensor([True, True, False]))
    mute = TokenKinds.from_tokenizer(_tokenizer(models.BPE({"a": 0, "b</w>": 1}, [], end_of_word_suffix="</w>")))
    with pytest.raises(ValueError, match="whole_word"):
        mask_tokens(batch_of([[0, 1]]), mute, Masking(whole_word=True))
    with pytest.raises(IndexError, match=f"token id {V} is outside of the tokenizer's {V} ids"):
        mask_tokens(batch_of([[V]]), kinds(), Masking())
