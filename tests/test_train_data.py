"""Texts to documents, vocabularies, shards, items and steps: each against a plain restatement of what it should be."""

from __future__ import annotations

import json
import os
import random
import threading
from itertools import pairwise
from random import Random

import numpy as np
import pytest
import torch

from fastbert.corpus import CorpusError
from fastbert.tokenizer import Tokenizer
from fastbert.train.documents import Texts
from fastbert.train.loader import Loader
from fastbert.train.order import divide, plan_by_tokens, shuffled
from fastbert.train.pairs import Pairs, plan_pairs
from fastbert.train.segments import Frame, Segments
from fastbert.train.sentences import split_sentences
from fastbert.train.shards import Shards, build_shards
from fastbert.train.vocabulary import ROBERTA_TOKENS, train_vocabulary

# ---------------------------------------------------------------- loader


class Dataset:
    """Items whose ids tell where they come from; counts what is read."""

    def __init__(self, lengths, group=1):
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.group, self.read = group, []

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        self.read.append(i)
        n = int(self.lengths[i])
        if self.group == 1:
            return {"input_ids": [i] * n, "labels": i}
        sizes = [n // self.group] * (self.group - 1)
        return {"input_ids": [[i] * size for size in [*sizes, n - sum(sizes)]], "labels": i}


def lengths(num=500, seed=0, low=3, high=64):
    return np.random.default_rng(seed).integers(low, high + 1, num)


def loader(dataset=None, **options):
    dataset = Dataset(lengths()) if dataset is None else dataset
    options = {"batch_tokens": 512, "micro_tokens": 128, "seed": 3, **options}
    if "batch_items" in options:
        options["batch_tokens"] = None
    return Loader(dataset, **options)


def index_of(steps):
    return [[sorted(b.index.tolist()) for b in step] for step in steps]


def test_every_item_comes_once_an_epoch_and_the_order_is_a_function_of_seed_and_epoch():
    for options in ({}, {"batch_items": 7}, {"batch_items": 7, "shuffle": False}):
        seen = [i for step in loader(**options).steps(0) for batch in step for i in batch.index.tolist()]
        assert sorted(seen) == list(range(500))
    first = index_of(loader().steps(1))
    assert first == index_of(loader().steps(1))
    assert first != index_of(loader().steps(2))
    assert first != index_of(loader(seed=4).steps(1))
    order = [b.index.tolist() for step in loader(batch_items=1, shuffle=False).steps(0) for b in step]
    assert order == [[i] for i in range(500)]


def test_the_order_never_changes():
    """Other machines, numpy versions and releases must train in this order."""
    assert shuffled(8, seed=1, epoch=2).tolist() == [0, 7, 4, 3, 2, 6, 5, 1]
    counts = np.zeros((4, 4))
    for epoch in range(4000):
        counts[np.arange(4), shuffled(4, 0, epoch)] += 1
    assert abs(counts / 4000 - 0.25).max() < 0.03  # 4.4 standard deviations


def test_micro_batches_hold_what_their_items_say():
    for group in (1, 3):
        dataset = Dataset(lengths(60), group)
        for step in loader(dataset).steps(0):
            for batch in step:
                assert batch.packed.num_tokens <= 128
                assert batch.group == group
                assert torch.equal(batch.labels["labels"], batch.index)
                owner = batch.index.repeat_interleave(group).repeat_interleave(batch.packed.lengths)
                assert torch.equal(batch.packed.input_ids, owner)


def test_steps_are_full_and_never_overfull():
    for seed in range(3):
        sizes = lengths(3000, seed)
        plan = plan_by_tokens(shuffled(3000, seed, 0), sizes, 512)
        tokens = plan.tokens(sizes)
        assert tokens.max() <= 512
        assert tokens[:-1].mean() > 0.99 * 512
        assert tokens[:-1].min() > 0.95 * 512
        # Without look-ahead a step ends where the next item does not fit: that is measurably worse.
        naive = [0]
        for size in sizes[shuffled(3000, seed, 0)].tolist():
            if naive[-1] + size > 512:
                naive.append(0)
            naive[-1] += size
        assert np.mean(naive[:-1]) < 0.97 * 512
    fill = loader().fill()
    assert fill is not None
    assert fill.mean > 0.98
    assert loader(batch_items=3).fill() is None


def test_no_item_waits_long():
    sizes = lengths(3000)
    sizes[::50] = 500  # these fit only where a step begins
    plan = plan_by_tokens(np.arange(3000), sizes, 512)
    step_of = np.repeat(np.arange(plan.num_steps), np.diff(plan.bounds))
    place = np.empty(3000)
    place[plan.items] = step_of
    expected = sizes.cumsum() / 512
    assert abs(place - expected * plan.num_steps / expected[-1]).max() < 16


@pytest.mark.parametrize("options", [{}, {"batch_items": 17}], ids=["tokens", "items"])
def test_steps_do_not_depend_on_ranks(options):
    alone = [sorted(i for b in step for i in b) for step in index_of(loader(**options).steps(0))]
    for size in (2, 3):
        ranks = [index_of(loader(rank=r, world_size=size, **options).steps(0)) for r in range(size)]
        together = [sorted(i for step in steps for b in step for i in b) for steps in zip(*ranks, strict=True)]
        assert together == alone


def test_ranks_and_passes_have_nearly_the_same_number_of_tokens():
    sizes = lengths(400)
    shares = divide(sizes, 1024, 4)
    per_pass = [[int(sizes[places].sum()) for places in rank] for rank in shares]
    assert max(map(max, per_pass)) <= 1024
    assert len({len(rank) for rank in per_pass}) == 1
    totals = [sum(rank) for rank in per_pass]
    assert max(totals) - min(totals) <= 64
    # Fewer items than ranks: some ranks have nothing to do.
    assert [len(rank) for rank in divide(np.array([5, 5]), 8, 3)] == [1, 1, 0]


def test_resuming_reads_nothing_of_the_steps_before():
    whole = index_of(loader().steps(1))
    dataset = Dataset(lengths())
    later = loader(dataset)
    assert index_of(later.steps(1, start=20)) == whole[20:]
    assert sorted(dataset.read) == sorted(i for step in whole[20:] for b in step for i in b)
    assert index_of(loader().steps(1, start=len(whole))) == []


def test_padding_saved_is_what_a_padded_loader_would_have_added():
    sizes = lengths(90)
    one = loader(Dataset(sizes), batch_items=10, micro_tokens=4096)
    list(one.steps(0))
    padded = sum(10 * sizes[one.items(0, k)].max() for k in range(9))
    assert one.padding_saved == pytest.approx(1 - sizes.sum() / padded, rel=1e-12)
    # Accumulated, both cut a step into as many batches.
    many = loader(Dataset(sizes), batch_items=10, micro_tokens=256)
    parts = [len(step) for step in many.steps(0)]
    padded = sum(len(part) * sizes[part].max() for k in range(9) for part in np.array_split(many.items(0, k), parts[k]))
    assert many.padding_saved == pytest.approx(1 - sizes.sum() / padded, rel=1e-12)
    assert loader().padding_saved == 0.0


def test_drop_last():
    assert loader(batch_items=100).num_steps(0) == 5
    assert loader(Dataset(lengths(505)), batch_items=100).num_steps(0) == 6
    assert loader(Dataset(lengths(505)), batch_items=100, drop_last=True).num_steps(0) == 5
    kept, dropped = loader(), loader(drop_last=True)
    assert [len(s) for s in dropped.steps(0)] == [len(s) for s in kept.steps(0)][: dropped.num_steps(0)]
    assert kept.num_steps(0) - dropped.num_steps(0) in (0, 1)
    with pytest.raises(ValueError, match="drop_last leaves no step: 5 items"):
        loader(Dataset(lengths(5)), batch_items=100, drop_last=True).num_steps(0)


def test_errors_of_the_thread_are_raised_here_and_it_ends():
    class Broken(Dataset):
        def __getitem__(self, i):
            if i == 7:
                raise OSError("disk gone")
            return super().__getitem__(i)

    with pytest.raises(OSError, match="disk gone"):
        list(loader(Broken(lengths()), shuffle=False).steps(0))
    steps = loader().steps(0)
    next(steps)
    steps.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("loader")]


def test_loader_refuses():
    with pytest.raises(ValueError, match="exactly one"):
        Loader(Dataset([3]), batch_items=2, batch_tokens=9, micro_tokens=9)
    with pytest.raises(ValueError, match=r"batch_tokens is 63: it must hold the longest item \(1, 64 tokens\)"):
        loader(Dataset([3, 64]), batch_tokens=63)
    with pytest.raises(ValueError, match="micro_tokens is 5: it must hold"):
        loader(Dataset([3, 64]), micro_tokens=5)
    with pytest.raises(ValueError, match="batch_items is 0"):
        loader(batch_items=0)
    with pytest.raises(ValueError, match="empty"):
        loader(Dataset([]))
    with pytest.raises(ValueError, match="rank is 2 but there are 2"):
        loader(rank=2, world_size=2)
    wrong = Dataset([3, 4])
    wrong.lengths = np.array([3, 5])
    wrong.__class__ = type("Wrong", (Dataset,), {"__getitem__": lambda self, i: {"input_ids": [1] * (3 + i)}})
    with pytest.raises(ValueError, match="have 7 tokens, but the dataset's lengths say 8"):
        list(loader(wrong).steps(0))


# ---------------------------------------------------------------- texts


def test_split_sentences():
    text = (
        'Mr. Darcy smiled. "Is it so?" she said. He came at 4 p.m. on Sunday; J. Austen wrote... Then nothing! '
        "See e.g. Fig. 3 and (perhaps) U.S. law. He said no. It was I. And then"
    )
    assert split_sentences(text) == [
        "Mr. Darcy smiled.",
        '"Is it so?" she said.',
        "He came at 4 p.m. on Sunday; J. Austen wrote...",
        "Then nothing!",
        "See e.g. Fig. 3 and (perhaps) U.S. law.",
        "He said no.",
        "It was I.",
        "And then",
    ]
    assert split_sentences("  ") == []
    assert split_sentences("v1.2 is out, 3.5 times. ok") == ["v1.2 is out, 3.5 times. ok"]


def documents_of(*sources, **options):
    return [document for document, _ in Texts(tuple(map(str, sources)), **options).documents()]


def test_documents_of_files(tmp_path):
    lines, prose = tmp_path / "a.txt", tmp_path / "b.txt"
    lines.write_text("One two.\nThree.\n\n\nFour.\n  \nFive. Six.\n")
    assert documents_of(lines) == [["One two.", "Three."], ["Four."], ["Five. Six."]]
    prose.write_text("It was a\nday. It rained.\n\nNew part\n\n\nNext. Chapter.")
    assert documents_of(prose, split=True) == [["It was a day.", "It rained.", "New part"], ["Next.", "Chapter."]]
    rows = tmp_path / "c.jsonl"
    rows.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("Ab.\nCd.", "", "Ee. Ff\n\nG \ud800.")))
    assert documents_of(rows) == [["Ab.", "Cd."], ["Ee. Ff", "G \ufffd."]]
    assert documents_of(rows, split=True) == [["Ab.", "Cd."], ["Ee.", "Ff", "G \ufffd."]]
    assert documents_of(tmp_path) == documents_of(lines, prose, rows)


def test_documents_of_data_sets(tmp_path):
    import datasets

    data = datasets.Dataset.from_dict({"text": ["Ab.\nCd.", "E."], "other": [1, 2]})
    assert [d for d, _ in Texts((data,)).documents()] == [["Ab.", "Cd."], ["E."]]
    data.save_to_disk(str(tmp_path / "saved"))
    assert documents_of(tmp_path / "saved") == [["Ab.", "Cd."], ["E."]]
    assert Texts((data,)).nbytes >= len("Ab.\nCd.Ee.")
    assert Texts((data,)).fingerprint() != Texts((data.select([0]),)).fingerprint()
    with pytest.raises(CorpusError, match=r"no column 'body', it has 'text', 'other'"):
        list(Texts((data,), column="body").documents())
    with pytest.raises(CorpusError, match=r"row 2: column 'text' holds null"):
        list(Texts((datasets.Dataset.from_dict({"text": ["a", None]}),)).documents())


def test_bad_texts_are_named(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": 3}\n')
    with pytest.raises(CorpusError, match=r"bad.jsonl, line 2: column 'text' holds int"):
        documents_of(bad)
    with pytest.raises(CorpusError, match=r"no column 'body'"):
        documents_of(bad, column="body")
    (tmp_path / "bytes.txt").write_bytes(b"fine\n\xff\n")
    with pytest.raises(CorpusError, match=r"bytes.txt, line 2: byte 0xff"):
        documents_of(tmp_path / "bytes.txt")
    with pytest.raises(CorpusError, match="does not exist"):
        documents_of(tmp_path / "none.txt")
    with pytest.raises(CorpusError, match="give files"):
        Texts(())
    (tmp_path / "folder").mkdir()
    with pytest.raises(CorpusError, match=r"holds no file that ends in \.txt"):
        documents_of(tmp_path / "folder")


def test_parts_of_the_documents(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(f"Document {i}." for i in range(400)))
    held, rest = documents_of(path, part=(0.0, 0.25)), documents_of(path, part=(0.25, 1.0))
    assert sorted(held + rest) == sorted(documents_of(path))
    assert 70 < len(held) < 130
    path.write_text("\n\n".join(f"Document {i}." for i in reversed(range(800))))
    assert {d[0] for d in held} <= {d[0] for d in documents_of(path, part=(0.0, 0.25))}


# ---------------------------------------------------------------- vocabularies and shards


def words(seed=0, num=400):
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefgh", k=rng.randint(1, 6))) for _ in range(num)]


def sentence(rng, vocabulary):
    return " ".join(rng.choices(vocabulary, k=rng.randint(1, 14))).capitalize() + "."


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    rng, vocabulary = random.Random(5), words()
    documents = ["\n".join(sentence(rng, vocabulary) for _ in range(rng.randint(1, 30))) for _ in range(60)]
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n\n".join(documents))
    return path


@pytest.fixture(scope="module")
def tokenizer(text_file):
    return train_vocabulary(Texts((text_file,)), 300, max_length=64)


@pytest.fixture(scope="module")
def shards(text_file, tokenizer, tmp_path_factory):
    return build_shards(Texts((text_file,)), tokenizer, tmp_path_factory.mktemp("shards") / "s", shard_characters=8000)


@pytest.mark.parametrize(
    ("kind", "special"),
    [("wordpiece", None), ("bpe", None), ("wordpiece", ROBERTA_TOKENS)],
    ids=["bert", "bpe", "mpnet"],
)
def test_vocabularies_load_everywhere_and_do_not_depend_on_order(tmp_path, kind, special):
    import transformers

    texts = [f"{a} {b}, {a}{b}, Été." for a, b in zip(words(1), words(2), strict=True)] * 2
    learnt = train_vocabulary(texts, 400, kind, special=special, max_length=64)
    assert learnt.num_ids == 400
    assert train_vocabulary(texts[::-1], 400, kind, special=special, max_length=64).backend.to_str() == (
        learnt.backend.to_str()
    )
    learnt.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_folder(tmp_path, 64)
    mask = theirs.mask_token
    for text in (texts[0], f"Unseen {mask} \u4e2d words' ends", "", "x" * 300):
        expected = theirs(text, truncation=True, max_length=64)["input_ids"]
        assert ours.encode([text]).ids[0] == expected
    pair = ours.encode([("abc", "de")])
    assert pair.ids[0] == theirs("abc", "de")["input_ids"]
    expected_types = [0] * (2 + len(ours.encode(["abc"]).ids[0]) - 2) if special is None and kind == "wordpiece" else []
    if expected_types:
        assert pair.type_ids[0][: len(expected_types)] == expected_types
        assert set(pair.type_ids[0][len(expected_types) :]) == {1}
    names = (theirs.pad_token_id, theirs.cls_token_id, theirs.sep_token_id, theirs.mask_token_id)
    assert names == ((1, 0, 2, 4) if special or kind == "bpe" else (0, 2, 3, 4))


def test_vocabularies_refuse():
    with pytest.raises(TypeError, match="read twice"):
        train_vocabulary(iter(["a"]), 300)
    with pytest.raises(CorpusError, match="no text"):
        train_vocabulary([" ", ""], 300)
    with pytest.raises(CorpusError, match="no text"):
        train_vocabulary([], 300, "bpe")
    with pytest.raises(ValueError, match=r"room for 3 pieces .* 8 ASCII"):
        train_vocabulary(["abcdefgh"], 8)
    with pytest.raises(ValueError, match="256 bytes"):
        train_vocabulary(["abcdefgh"], 200, "bpe")


def test_shards_hold_the_tokens_of_the_texts(text_file, tokenizer, shards):
    assert len(list(shards.folder.glob("*.arrow"))) > 1
    expected = [
        [tokenizer.backend.encode(s, add_special_tokens=False).ids for s in document]
        for document, _ in Texts((text_file,)).documents()
    ]
    assert shards.num_documents == len(expected)
    for i, document in enumerate(expected):
        first, last = shards.document_starts[i : i + 2]
        found = [shards.tokens(*shards.sentence_starts[s : s + 2]).tolist() for s in range(first, last)]
        assert found == document
    assert shards.num_tokens == sum(len(s) for document in expected for s in document)
    flat = [t for document in expected for s in document for t in s]
    assert shards.unigram_counts(tokenizer.num_ids).tolist() == np.bincount(flat, minlength=tokenizer.num_ids).tolist()


def test_shards_are_arrow_files_of_datasets(shards):
    import datasets

    first = datasets.Dataset.from_file(str(sorted(shards.folder.glob("*.arrow"))[0]))
    assert first.column_names == ["input_ids", "sentence_lengths"]
    start, stop = (int(shards.sentence_starts[shards.document_starts[i]]) for i in (0, 1))
    assert first[0]["input_ids"] == shards.tokens(start, stop).tolist()
    assert sum(first[0]["sentence_lengths"]) == stop - start


def test_workers_change_nothing_and_a_rerun_builds_nothing(text_file, tokenizer, shards, tmp_path):
    folder = tmp_path / "s"
    build_shards(Texts((text_file,)), tokenizer, folder, num_workers=2, shard_characters=8000)
    for path in shards.folder.iterdir():
        if path.suffix == ".arrow" or path.name in ("sentences.npy", "documents.npy", "manifest.json"):
            assert (folder / path.name).read_bytes() == path.read_bytes()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    build_shards(Texts((text_file,)), tokenizer.with_max_length(32), folder, shard_characters=8000)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    os.utime(text_file, ns=(1, text_file.stat().st_mtime_ns + 1))
    build_shards(Texts((text_file,)), tokenizer, folder, shard_characters=8000)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} != before


def test_a_failed_build_leaves_nothing_that_looks_finished(tokenizer, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "abc"}\n' * 50 + "{}\n")
    with pytest.raises(CorpusError, match="line 51"):
        build_shards(Texts((rows,)), tokenizer, tmp_path / "s", shard_characters=30)
    assert Shards.fingerprint_of(tmp_path / "s") is None
    with pytest.raises(CorpusError, match="no finished shards"):
        Shards.open(tmp_path / "s")
    rows.write_text('{"text": "abc"}\n' * 50)
    assert build_shards(Texts((rows,)), tokenizer, tmp_path / "s", shard_characters=30).num_documents == 50
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(CorpusError, match=r"empty\.txt: the texts hold no token"):
        build_shards(Texts((tmp_path / "empty.txt",)), tokenizer, tmp_path / "t")
    (tmp_path / "one.txt").write_text("Abc.")
    with pytest.raises(CorpusError, match=r"no document is in the part from 0 to 1e-09"):
        build_shards(Texts((tmp_path / "one.txt",), part=(0.0, 1e-9)), tokenizer, tmp_path / "t")
    with pytest.raises(CorpusError, match="holds other files"):
        build_shards(Texts((rows,)), tokenizer, tmp_path)


# ---------------------------------------------------------------- items


@pytest.mark.parametrize("across", [False, True], ids=["documents", "full-sentences"])
def test_segments_hold_everything_once_and_are_as_long_as_they_can(shards, across):
    frame, most = Frame(2, 3), 24  # some sentences are longer and are cut
    segments = Segments(shards, frame, most, across)
    items = [segments[i]["input_ids"] for i in range(len(segments))]
    assert [len(ids) for ids in items] == segments.lengths.tolist()
    assert max(map(len, items)) == most
    every = shards.tokens  # documents, each by itself, since a range of tokens lies in one shard
    starts = shards.sentence_starts[shards.document_starts].tolist()
    documents = [every(a, b).tolist() for a, b in pairwise(starts)]
    if across:
        # Without [CLS]s and each item's last [SEP], what is left are documents with a separator between.
        text = [t for ids in items for t in ids[1:-1]]
        ends, inner = set(starts[1:-1]), []
        for ids, (a, b) in zip(items, segments.ranges.tolist(), strict=True):
            inner += [ids.count(3) - 1 == len([e for e in ends if a < e < b])]
        assert all(inner)
        assert [t for t in text if t != 3] == [t for d in documents for t in d]
    else:
        assert [t for ids in items for t in ids[1:-1]] == [t for d in documents for t in d]
        assert not any(a < e < b for a, b in segments.ranges.tolist() for e in starts)
    # Greedy: the next sentence, or piece of one, would not have fitted.
    sentences = set(shards.sentence_starts.tolist())
    ordered = sorted(sentences)
    for b, length in zip(segments.ranges[:, 1].tolist(), segments.lengths.tolist(), strict=True):
        assert b in sentences or length == most
        if b in sentences and b not in starts:
            following = ordered[ordered.index(b) + 1] - b
            assert length + following > most
    with pytest.raises(ValueError, match="max_length is 2"):
        Segments(shards, frame, 2)


def truncate(a, b, most, rng):
    while len(a) + len(b) > most:
        longer = a if len(a) > len(b) else b
        if rng.random() < 0.5:
            del longer[0]
        else:
            longer.pop()


def reference_pairs(documents, max_length, short_seq_prob, seed, dupe, order):
    """google-research/bert's create_instances_from_document on lists of tokens; ALBERT's with `order`."""
    rng, instances = Random(seed), []
    for _ in range(dupe):
        for d, document in enumerate(documents):
            most = max_length - 3
            target = most
            if rng.random() < short_seq_prob:
                target = rng.randint(2, most)
            chunk, length, i = [], 0, 0
            while i < len(document):
                chunk.append(document[i])
                length += len(document[i])
                if i == len(document) - 1 or length >= target:
                    a_end = rng.randint(1, len(chunk) - 1) if len(chunk) >= 2 else 1
                    a = [t for s in chunk[:a_end] for t in s]
                    b, label = [], 0
                    if len(chunk) == 1 or (not order and rng.random() < 0.5):
                        label, wanted = 1, target - len(a)
                        for _ in range(10):
                            other = rng.randint(0, len(documents) - 1)
                            if other != d:
                                break
                        start = rng.randint(0, len(documents[other]) - 1)
                        for s in documents[other][start:]:
                            b.extend(s)
                            if len(b) >= wanted:
                                break
                        i -= len(chunk) - a_end
                    elif order and rng.random() < 0.5:
                        b, label = a, 1
                        a = [t for s in chunk[a_end:] for t in s]
                    else:
                        b = [t for s in chunk[a_end:] for t in s]
                    a, b = list(a), list(b)
                    truncate(a, b, most, rng)
                    instances.append((a, b, label))
                    chunk, length = [], 0
                i += 1
    return instances


def sentences_of(shards):
    return [
        [shards.tokens(*shards.sentence_starts[s : s + 2]).tolist() for s in range(first, last)]
        for first, last in pairwise(shards.document_starts.tolist())
    ]


@pytest.mark.parametrize("task", ["nsp", "sop"])
@pytest.mark.parametrize(("most", "short", "dupe"), [(32, 0.1, 1), (64, 0.5, 3), (12, 1.0, 1)])
def test_pairs_are_those_of_the_original_builder(shards, task, most, short, dupe):
    expected = reference_pairs(sentences_of(shards), most, short, 11, dupe, task == "sop")
    pairs = Pairs(shards, Frame(2, 3), most, task, short, dupe, seed=11)
    assert len(pairs) == len(expected)
    field = {"nsp": "next_sentence_label", "sop": "sentence_order_label"}[task]
    for i, (a, b, label) in enumerate(expected):
        item = pairs[i]
        assert item["input_ids"] == [2, *a, 3, *b, 3]
        assert item["type_ids"] == [0] * (len(a) + 2) + [1] * (len(b) + 1)
        assert item[field] == label
        assert pairs.lengths[i] == len(item["input_ids"]) <= most
    # Another seed, another builder, no put-back: none of them passes.
    for wrong in (
        reference_pairs(sentences_of(shards), most, short, 12, dupe, task == "sop"),
        reference_pairs(sentences_of(shards), most, short, 11, dupe, task != "sop"),
        reference_pairs(sentences_of(shards), most + 1, short, 11, dupe, task == "sop"),
    ):
        assert [item[:2] for item in wrong] != [item[:2] for item in expected]


def test_labels_of_pairs(shards):
    labels = Pairs(shards, Frame(2, 3), 48, "nsp", seed=1, dupe_factor=8).plan[:, 4]
    assert 0.5 < labels.mean() < 0.8  # half, and all where a chunk is one sentence
    swapped = Pairs(shards, Frame(2, 3), 48, "sop", seed=1, dupe_factor=8)
    alone = np.diff(shards.document_starts) == 1  # a document of one sentence always has another's beside it
    starts = shards.sentence_starts[shards.document_starts[:-1]][alone]
    assert swapped.plan[np.isin(swapped.plan[:, 0], starts), 4].all()


def test_pairs_need_documents_of_several_sentences(tokenizer, tmp_path):
    for text, told in (
        ("Abc.\nAbc.\n", "1 documents have at most 2"),
        ("Abc.\n\nAbc.\n", "2 documents have at most 1"),
    ):
        path = tmp_path / f"{len(text)}.txt"
        path.write_text(text)
        found = build_shards(Texts((path,)), tokenizer, tmp_path / path.stem)
        with pytest.raises(CorpusError, match=told):
            plan_pairs(found, 32, "nsp", 0.1, 1, 0)
