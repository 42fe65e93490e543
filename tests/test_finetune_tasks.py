"""What each task reads: labels, words and pieces, windows and answers; wrong data is named with its place."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors

from fastbert import finetune
from fastbert.corpus import CorpusError
from fastbert.models import BertConfig, BertForSequenceClassification
from fastbert.tokenizer import Tokenizer
from fastbert.train.batch import collate
from fastbert.train.evaluate import Evaluator
from fastbert.train.examples import Examples
from fastbert.train.finetune import prepare
from fastbert.train.tables import Table, read_table
from fastbert.train.tasks.classification import Classification, MultiLabel, Pair, Regression
from fastbert.train.tasks.embedding import Embedding
from fastbert.train.tasks.multiple_choice import Choosing
from fastbert.train.tasks.ner import WordTagging
from fastbert.train.tasks.qa import Answering, Question

CONFIG = BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=16)


@pytest.fixture(scope="module")
def tokenizer(minilm):
    return Tokenizer.from_folder(minilm, 512, 16)


def learnt(task, rows, config=CONFIG):
    return task.learn(read_table(rows), config)


def labelled(*labels):
    return [{"text": "x", "label": label} for label in labels]


# Labels


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["b", "a", "b"], ("a", "b")),
        (["10", "9", "2"], ("2", "9", "10")),
        ([1, 0, 1], ("0", "1")),
        ([True, False], ("0", "1")),
        ([2.0, -1.0], ("-1", "2")),
        ([np.int64(3), np.float32(1)], ("1", "3")),
        ([" a ", "b"], ("a", "b")),
    ],
)
def test_names_of_labels(values, names, tokenizer):
    task = learnt(Classification(), labelled(*values))
    assert task.labels == names
    config = task.configure(CONFIG)
    assert config.id2label == dict(enumerate(names))
    assert config.label2id == {name: i for i, name in enumerate(names)}
    examples = task.examples(read_table(labelled(*values)), tokenizer)
    assert [names[i] for i in examples.labels["labels"]] == [
        str(v).strip() if isinstance(v, str) else str(int(v)) for v in values
    ]


def test_known_names_keep_their_ids():
    checkpoint = CONFIG.replace(id2label={0: "pos", 1: "neg", 2: "neutral"})
    assert learnt(Classification(), labelled("neg", "pos"), checkpoint).labels == ("pos", "neg", "neutral")
    assert learnt(Classification(), labelled("neg", "new"), checkpoint).labels == ("neg", "new")
    table = Table("t", {"text": ["x", "y"], "label": ["neg", "pos"]}, {"label": ("pos", "neg", "other")})
    assert Classification().learn(table, CONFIG).labels == ("pos", "neg", "other")
    assert replace(Classification(), labels=("neg", "pos")).learn(table, CONFIG).labels == ("neg", "pos")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "t, row 2: column 'label' holds None, a label is needed"),
        ("", "holds '', a label is needed"),
        (float("nan"), "holds nan, a label is needed"),
        (0.5, r"holds 0.5: for numbers use the task regression"),
    ],
)
def test_rows_without_a_label(value, message):
    with pytest.raises(CorpusError, match=message):
        Classification().learn(read_table(labelled("a", value), "t"), CONFIG)


def test_a_label_that_training_lacks(tokenizer):
    task = learnt(Classification(), labelled("a", "b"))
    message = r"eval, row 3: the label 'c' in column 'label' is not one of the 2 known ones: 'a', 'b'"
    with pytest.raises(CorpusError, match=message):
        task.examples(read_table(labelled("a", "b", "c"), "eval"), tokenizer)
    with pytest.raises(CorpusError, match="one label 'a' throughout"):
        learnt(Classification(), labelled("a", "a"))
    with pytest.raises(CorpusError, match="a name twice"):
        learnt(Classification(labels=("a", "a")), labelled("a"))


def test_numbers_for_regression(tokenizer):
    table = read_table(labelled("1.5", 2, "-3e1"))
    assert Regression().examples(table, tokenizer).labels["labels"].tolist() == [1.5, 2.0, -30.0]
    for wrong in ("x", None, "nan", ""):
        with pytest.raises(CorpusError, match=r"row 2: column 'label' holds .*, a number is needed"):
            Regression().examples(read_table(labelled(1, wrong)), tokenizer)


def test_several_labels(tokenizer):
    expected = [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    for rows in (labelled("a, c", "", "b"), labelled(["c", "a"], [], ["b"])):
        task = learnt(MultiLabel(), rows)
        assert task.examples(read_table(rows), tokenizer).labels["labels"].tolist() == expected
    rows = [{"text": "x", **dict(zip("abc", row, strict=True))} for row in expected]
    task = learnt(MultiLabel(label_columns=("a", "b", "c")), rows)
    assert task.labels == ("a", "b", "c")
    assert task.examples(read_table(rows), tokenizer).labels["labels"].tolist() == expected
    with pytest.raises(CorpusError, match=r"row 2: column 'c' holds 2, not 0 or 1"):
        task.examples(read_table([rows[0], {**rows[0], "c": 2}]), tokenizer)
    with pytest.raises(CorpusError, match=r"row 1: the label 'z'"):
        learnt(MultiLabel(), labelled("a,b")).examples(read_table(labelled("z")), tokenizer)
    with pytest.raises(CorpusError, match="holds 3: a list of labels is needed"):
        learnt(MultiLabel(), labelled(3))


# Texts


def test_pairs_have_segments_and_are_cut_from_the_longer(tokenizer, minilm):
    rows = [{"text": "one " * 30, "text_pair": "two three", "label": i} for i in (0, 1)]
    examples = learnt(Pair(), rows).examples(read_table(rows), tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(minilm)(
        rows[0]["text"], rows[0]["text_pair"], truncation=True, max_length=16
    )
    assert examples[0] == {"input_ids": theirs["input_ids"], "type_ids": theirs["token_type_ids"], "labels": 0}
    assert examples.num_truncated == 2
    with pytest.raises(CorpusError, match=r"no column 'text_pair'.*--text-pair-column"):
        learnt(Pair(), labelled(0, 1)).examples(read_table(labelled(0, 1)), tokenizer)


def test_empty_texts_are_sequences(tokenizer):
    rows = [{"text": "", "label": 0}, {"text": "a", "label": 1}]
    examples = learnt(Classification(), rows).examples(read_table(rows), tokenizer)
    assert examples.lengths.tolist() == [2, 3]


def test_examples_give_back_what_they_were_given():
    ids, types = [[1, 2], [3], [4, 5, 6], [7]], [[0, 0], [1], [0, 1, 1], [0]]
    examples = Examples(ids, types, {"labels": np.array([0, 1])}, {"tags": ids}, group=2)
    assert examples.lengths.tolist() == [3, 4]
    assert examples[1] == {"input_ids": ids[2:], "type_ids": types[2:], "labels": 1, "tags": [4, 5, 6, 7]}
    batch = collate([examples[0], examples[1]], [0, 1], token_fields=("tags",))
    assert batch.packed.input_ids.tolist() == batch.labels["tags"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    with pytest.raises(ValueError, match="4 sequences cannot be items of 3"):
        Examples(ids, group=3)
    with pytest.raises(ValueError, match="2 items but 1 values of 'labels'"):
        Examples(ids, labels={"labels": np.array([1])}, group=2)


# Words

SENTENCES = [
    {"words": ["Walkington", "met", "\u200b", "Hello-World", "."], "tags": ["B-P", "O", "O", "B-P", "O"]},
    {"words": [], "tags": []},
    {"words": ["unbelievableness"] * 12, "tags": ["B-P"] + ["I-P"] * 11},
]


@pytest.mark.parametrize("label_all_pieces", [False, True])
def test_first_pieces_bear_the_labels(label_all_pieces, tokenizer, minilm):
    table = read_table(SENTENCES)
    task = WordTagging(label_all_pieces=label_all_pieces).learn(table, CONFIG)
    assert task.labels == ("B-P", "I-P", "O")
    examples = task.examples(table, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(minilm)
    for i, row in enumerate(SENTENCES):
        encoded = theirs(row["words"], is_split_into_words=True, truncation=True, max_length=16)
        seen, expected = set(), []
        for word in encoded.word_ids():
            counts = word is not None and (label_all_pieces or word not in seen)
            expected.append(task.labels.index(row["tags"][word]) if counts else -100)
            seen.add(word)
        assert examples[i] == {"input_ids": encoded["input_ids"], "labels": expected}
    assert examples.num_truncated == 1
    first, _, cut = examples.reference
    assert first.pieces[2] == -1  # the word has no piece
    assert cut.pieces.count(-1) > 0


def test_words_without_a_prediction_count_as_outside(tokenizer):
    table = read_table(SENTENCES)
    task = WordTagging().learn(table, CONFIG)
    examples = task.examples(table, tokenizer)
    perfect = [np.where(np.array(examples[i]["labels"]) < 0, 0, examples[i]["labels"]) for i in range(3)]
    scores = task.metrics(examples, perfect)
    kept = len(SENTENCES[2]["words"]) - examples.reference[2].pieces.count(-1)
    assert scores["accuracy"] == pytest.approx((5 + kept) / 17)
    assert scores["recall"] == pytest.approx(2 / 3)  # the entity that was cut is found too short
    everything_o = [np.full(len(examples[i]["labels"]), 2) for i in range(3)]
    assert task.metrics(examples, everything_o)["f1"] == 0.0


def test_lone_surrogates_are_read(tokenizer):
    rows = [{"words": ["a\ud800", "b"], "tags": ["B-X", "O"]}]
    assert len(learnt(WordTagging(), rows).examples(read_table(rows), tokenizer)) == 1
    rows = [question("who\ud800", "Bob", "\udfff Bob")]
    examples = Answering(doc_stride=2, max_query_length=5).examples(read_table(rows), tokenizer)
    spans = examples.reference[1][0]
    first = examples[0]["start_positions"]
    assert rows[0]["context"][spans[first, 0] : spans[first, 1]] == "Bob"


def test_parts_of_speech_have_no_entities(tokenizer):
    table = read_table([{"words": "a b", "tags": "DET NOUN"}, {"words": "c", "tags": "VERB"}])
    task = WordTagging().learn(table, CONFIG)
    examples = task.examples(table, tokenizer)
    assert task.metrics(examples, [np.array([0, 0, 1, 0]), np.array([0, 2, 0])]) == {"accuracy": 1.0, "f1": 1.0}


def test_tags_in_another_scheme_are_read_as_iob2(tokenizer):
    table = read_table([{"words": ["a", "b"], "tags": ["I-X", "I-X"]}, {"words": ["c"], "tags": ["O"]}])
    with pytest.warns(UserWarning, match="1 sentences have entities that do not begin with B-"):
        task = WordTagging().learn(table, CONFIG)
    assert task.labels == ("B-X", "I-X", "O")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"words": ["a", "b"], "tags": ["O"]}, "row 2: 2 words but 1 tags"),
        ({"words": [1, 2], "tags": ["O", "O"]}, "row 2: column 'words' holds .*a list of strings is needed"),
        ({"words": ["a"], "tags": ["B-Y"]}, "row 2: the label 'B-Y' in column 'tags'"),
    ],
)
def test_wrong_sentences(row, message, tokenizer):
    good = {"words": ["a", "b"], "tags": ["O", "B-X"]}
    task = WordTagging().learn(read_table([good]), CONFIG)
    with pytest.raises(CorpusError, match=message):
        task.examples(read_table([good, row]), tokenizer)


def test_byte_level_words_keep_their_space(tmp_path):
    pieces = ["<s>", "</s>", "<unk>", *pre_tokenizers.ByteLevel.alphabet()]
    merges = [("\u0120", "h"), ("h", "i")]
    vocab = {piece: i for i, piece in enumerate([*pieces, "\u0120h", "hi"])}
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), add_prefix_space=False)
    Tokenizer(backend, 16).save(tmp_path)
    tokenizer = WordTagging().tokenizer(tmp_path, 16, None)
    assert tokenizer.config["add_prefix_space"] is True
    encoded = tokenizer.backend.encode(["hi", "hi"], is_pretokenized=True)
    assert encoded.tokens == ["<s>", "\u0120h", "i", "\u0120h", "i", "</s>"]
    assert tokenizer.encode(["hi hi"]).ids == [encoded.ids]


# Answers

CONTEXT = "Anna was born in Bern. " + "Nothing else is known of her early life there. " * 3 + "She died in Oslo, 1923."


def question(text, answer, context=CONTEXT):
    starts = [context.index(answer)] if answer else []
    return {
        "question": text,
        "context": context,
        "answers": {"text": [answer] if answer else [], "answer_start": starts},
    }


QUESTIONS = [question("Where was she born?", "Bern"), question("When did she die?", "1923"), question("Why?", "")]


@pytest.fixture(scope="module")
def windows(minilm):
    task = Answering(doc_stride=6, max_query_length=5).learn(read_table(QUESTIONS), CONFIG)
    tokenizer = Tokenizer.from_folder(minilm, 512, 24)
    return task, task.examples(read_table(QUESTIONS), tokenizer)


def test_windows_are_those_of_transformers(windows, minilm):
    task, examples = windows
    theirs = transformers.AutoTokenizer.from_pretrained(minilm)
    assert task.unanswerable
    place = 0
    for row, asked in zip(QUESTIONS, examples.reference[0], strict=True):
        short = theirs.decode(theirs(row["question"], add_special_tokens=False)["input_ids"][:5])
        encoded = theirs(
            short, row["context"], truncation="only_second", max_length=24, stride=6,
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        assert asked.windows == list(range(place, place + len(encoded["input_ids"])))
        for w, i in enumerate(asked.windows):
            assert examples[i]["input_ids"] == encoded["input_ids"][w]
            assert examples[i]["type_ids"] == encoded["token_type_ids"][w]
            spans = [
                s for s, part in zip(encoded["offset_mapping"][w], encoded.sequence_ids(w), strict=True) if part == 1
            ]
            assert [tuple(s) for s in examples.reference[1][i] if s[0] >= 0] == spans
        place += len(asked.windows)
    assert place == len(examples) > 6


def test_positions_are_those_of_the_answer(windows):
    _, examples = windows
    found = []
    for row, asked in zip(QUESTIONS, examples.reference[0], strict=True):
        for i in asked.windows:
            first, last = examples[i]["start_positions"], examples[i]["end_positions"]
            spans = examples.reference[1][i]
            text = row["context"][spans[first, 0] : spans[last, 1]] if first else ""
            found.append((row["question"], text))
    assert ("Where was she born?", "Bern") in found
    assert ("When did she die?", "1923") in found
    assert {text for _, text in found} == {"", "Bern", "1923"}


def scores_of(examples, asked, text, context):
    """Scores of one question's windows that point at `text`, or at the first token."""
    outputs = {}
    start = context.index(text)
    for i in asked.windows:
        scores, spans = np.zeros((len(examples[i]["input_ids"]), 2), np.float32), examples.reference[1][i]
        scores[0] = 1.0
        scores[(spans[:, 0] <= start) & (spans[:, 1] > start), 0] = 5.0
        scores[(spans[:, 0] < start + len(text)) & (spans[:, 1] >= start + len(text)), 1] = 5.0
        outputs[i] = scores
    return outputs


def test_the_best_span_of_all_windows_is_the_answer(windows):
    task, examples = windows
    asked, offsets = examples.reference
    for one, answer in ((asked[0], "Bern"), (asked[1], "Oslo, 1923")):
        outputs = scores_of(examples, one, answer, CONTEXT)
        assert task.answer(one, offsets, outputs) == answer
        assert replace(task, max_answer_length=1).answer(one, offsets, outputs) != "Oslo, 1923"
        for scores in outputs.values():
            scores[0] = 9.0
        assert task.answer(one, offsets, outputs) == ""
        assert replace(task, unanswerable=False).answer(one, offsets, outputs) == answer
    # An end before its start is no span, however well it scores.
    spans = np.array([[-1, -1], [0, 4], [5, 8]])
    backwards = np.array([[0, 0], [0, 9], [9, 0]], np.float32)
    assert task.answer(Question("Anna was", [], [0]), [spans], [backwards]) in ("Anna", "was")


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"text": ["Bern"], "answer_start": [3]}, r"the answer 'Bern' should begin at character 3, there is 'a wa'"),
        ("Paris", "the answer 'Paris' does not occur in its context"),
        (["Bern"], "a text, or a mapping with lists 'text' and 'answer_start', is needed"),
    ],
)
def test_wrong_answers(answers, message):
    with pytest.raises(CorpusError, match=message):
        Answering().learn(read_table([{**QUESTIONS[0], "answers": answers}]), CONFIG)


def test_windows_need_room(tokenizer):
    with pytest.raises(ValueError, match=r"max_length 16 leaves -51 tokens .* but doc_stride is 128"):
        Answering().examples(read_table(QUESTIONS), tokenizer)


# Choices and vectors


def test_choices(tokenizer):
    rows = [{"text": "q", "choices": ["a", "b b"], "label": "1"}, {"text": "r", "choices": ["c", ""], "label": 0}]
    examples = Choosing().examples(read_table(rows), tokenizer)
    assert (examples.group, examples.lengths.tolist()) == (2, [11, 9])
    assert examples.labels["labels"].tolist() == [1, 0]
    for wrong, message in (
        ({**rows[0], "label": 2}, r"row 2: column 'label' holds 2, but the right choice is a number from 0 to 1"),
        ({**rows[0], "label": -1}, "from 0 to 1"),
        ({**rows[0], "choices": ["a"]}, "row 2: 1 choices but row 1 has 2"),
        ({**rows[0], "choices": "a"}, "a list of texts is needed"),
    ):
        with pytest.raises(CorpusError, match=message):
            Choosing().examples(read_table([rows[0], wrong]), tokenizer)


def test_scores_are_brought_to_cosines(tokenizer):
    rows = [{"anchor": "a", "positive": "b", "score": s} for s in (0, 2.5, 5)]
    task = learnt(Embedding(loss="cosine"), rows)
    assert task.examples(read_table(rows), tokenizer).labels["labels"].tolist() == [0.0, 0.5, 1.0]
    between = [{**rows[0], "score": s} for s in (0.25, 0.75)]
    assert learnt(Embedding(loss="cosine"), between).score_range == (0.0, 1.0)
    with pytest.raises(CorpusError, match=r"row 1: column 'score' holds 6, outside of the range 0 to 5"):
        task.examples(read_table([{**rows[0], "score": 6}]), tokenizer)
    with pytest.raises(CorpusError, match="holds 5 throughout"):
        learnt(Embedding(loss="cosent"), rows[2:])
    with pytest.raises(ValueError, match="negative_columns go with"):
        Embedding(loss="cosine", negative_columns=("n",))
    rows = [{"anchor": "a", "positive": "b", "n1": "c", "n2": "d d"}]
    examples = Embedding(negative_columns=("n1", "n2")).examples(read_table(rows), tokenizer)
    assert (examples.group, examples.lengths.tolist()) == (4, [13])


# Loading and evaluating


@pytest.fixture
def checkpoint(tmp_path, minilm):
    """A classifier of moods with a tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(minilm / name, tmp_path / name)
    torch.manual_seed(0)
    model = BertForSequenceClassification(CONFIG.replace(id2label={0: "sad", 1: "happy"}, label2id=None))
    model.save_pretrained(tmp_path)
    return tmp_path, model


def test_a_head_for_the_same_labels_is_kept(checkpoint):
    folder, model = checkpoint
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ready = prepare(folder, labelled("happy", "sad"), task="classification")
    assert ready.task.labels == ("sad", "happy")
    assert torch.equal(ready.model.classifier.weight, model.classifier.weight)


@pytest.mark.parametrize("labels", [("a", "b"), ("happy", "sad", "so")])
def test_a_head_for_other_labels_is_replaced(checkpoint, labels):
    folder, model = checkpoint
    with pytest.warns(UserWarning, match="replaced by a new one"):
        ready = prepare(folder, labelled(*labels), task="classification", seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same = prepare(folder, labelled(*labels), task="classification", seed=1)
        other = prepare(folder, labelled(*labels), task="classification", seed=2)
    assert ready.model.classifier.weight.shape == (len(labels), 8)
    assert torch.equal(ready.model.classifier.weight, same.model.classifier.weight)
    assert not torch.equal(ready.model.classifier.weight, other.model.classifier.weight)
    for name, value in model.bert.state_dict().items():
        assert torch.equal(ready.model.bert.state_dict()[name], value)


def test_another_task_takes_the_encoder(checkpoint):
    folder, model = checkpoint
    rows = [{"words": ["a", "b"], "tags": ["X", "Y"]}]
    with pytest.warns(UserWarning, match="replaced by a new one"):
        ready = prepare(folder, rows, task="ner")
    assert torch.equal(ready.model.bert.embeddings.LayerNorm.bias, model.bert.embeddings.LayerNorm.bias)
    assert ready.model.config.id2label == {0: "X", 1: "Y"}


def test_evaluation_does_not_depend_on_its_batches(checkpoint):
    folder, _ = checkpoint
    rows = [{"text": "word " * n, "label": ("sad", "happy")[n % 2]} for n in range(1, 20)]
    ready = prepare(folder, rows, rows, "classification")
    calls = [Evaluator(ready.task, ready.eval, ready.task.objective(), micro) for micro in (16384, 30)]
    whole, small = (call(ready.model.train()) for call in calls)
    assert ready.model.training
    assert whole == pytest.approx(small, rel=1e-5)
    torch.testing.assert_close(np.stack(calls[0].outputs(ready.model)), np.stack(calls[1].outputs(ready.model)))
    assert len(calls[1]._batches()) > 5
    backwards = Table("b", {name: values[::-1] for name, values in read_table(rows).columns.items()})
    outputs = Evaluator(ready.task, ready.task.examples(backwards, ready.tokenizer), ready.task.objective())
    np.testing.assert_allclose(outputs.outputs(ready.model)[::-1], calls[0].outputs(ready.model), atol=1e-5)


def test_a_split_batch_of_compared_texts_is_said(checkpoint):
    folder, _ = checkpoint
    rows = [{"anchor": "a b c", "positive": "d"}] * 4
    with pytest.warns(UserWarning, match="a batch may have 32 tokens but a forward pass takes 20"):
        prepare(folder, rows, task="embedding", micro_tokens=20)


def test_library_calls_that_cannot_be(checkpoint):
    folder, _ = checkpoint
    rows = labelled("sad", "happy")
    with pytest.raises(ValueError, match=r"unknown task 'clasification' \(nearest: classification\)"):
        finetune(folder, rows, task="clasification")
    with pytest.raises(ValueError, match="finetune\\(\\) sets 'epochz', which no option is called"):
        finetune(folder, rows, epochz=1)
    with pytest.raises(ValueError, match="text_pair_column means nothing to the task ner"):
        finetune(folder, rows, task="ner", text_pair_column="x")
    with pytest.raises(ValueError, match="set text_column on it"):
        finetune(folder, rows, task=Classification(), text_column="x")
    with pytest.raises(ValueError, match="max_seq_length is 600 but the model has positions for 512"):
        finetune(folder, rows, max_length=600)
    with pytest.raises(CorpusError, match="eval has no column 'label'"):
        finetune(folder, rows, [{"text": "x"}])
    with pytest.raises(FileNotFoundError, match="was not found"):
        finetune(folder / "nothing", rows)
