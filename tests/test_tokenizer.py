"""Texts to ids: equality with transformers, truncation and its count, hostile texts, broken files."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertTokenizer

from fastbert.hub import DEFAULT_MODEL, resolve
from fastbert.tokenizer import Tokenizer

MINILM = resolve(DEFAULT_MODEL)
TEXTS = [
    "",
    " \t\n",
    "Hello, World!",
    "naïve café RÉSUMÉ İstanbul ßtraße",
    "中文分词和 mixed English テスト",
    "a\u0000b \ufffd \u200d zero width",
    "emoji 🤖👩‍🚀 and unassigned \U000e0000",
    "[MASK] is [SEP] written [CLS] out [PAD]",
    "x" * 300,
    "word " * 600,
    "e\u0301" * 50,
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(MINILM, limit=512)


@pytest.fixture(scope="module")
def hugging_face():
    return AutoTokenizer.from_pretrained(MINILM)


def test_ids_equal_those_of_transformers(tokenizer, hugging_face):
    theirs = hugging_face(TEXTS, truncation=True, max_length=tokenizer.max_length)
    assert tokenizer.encode(TEXTS).ids == theirs["input_ids"]
    lowered = hugging_face([t.upper() for t in TEXTS])["input_ids"]
    assert tokenizer.with_max_length(500).encode(TEXTS).ids != lowered, "the comparison must be able to fail"


def test_pairs_have_segments_and_are_truncated_as_in_transformers(tokenizer, hugging_face):
    short, pairs = tokenizer.with_max_length(12), [("one two three four five six seven eight", "a b"), ("x", "y z")]
    theirs = hugging_face(*map(list, zip(*pairs, strict=True)), truncation=True, max_length=12)
    ours = short.encode(pairs)
    assert ours.ids == theirs["input_ids"]
    assert ours.type_ids == theirs["token_type_ids"]
    assert ours.truncated == [True, False]
    assert short.encode(["x"]).type_ids is None


def test_truncation_is_counted_exactly(tokenizer):
    short = tokenizer.with_max_length(8)
    encoded = short.encode(["a " * n for n in range(12)])  # n + 2 tokens
    assert [len(ids) for ids in encoded.ids] == [min(n + 2, 8) for n in range(12)]
    assert encoded.truncated == [n + 2 > 8 for n in range(12)]


def test_padding_and_truncation_of_the_file_are_switched_off(tokenizer):
    settings_of_file = json.loads((MINILM / "tokenizer.json").read_text())
    assert settings_of_file["padding"]["strategy"] == {"Fixed": 128}
    encoded = tokenizer.encode(["short", "word " * 300])
    assert [len(ids) for ids in encoded.ids] == [3, 302]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(["word ", "中", "é", "e\u0301", "x" * 40, "[SEP]", "[MA", "SK]", " ", ".", "\n", "ǆ"]),
        max_size=30,
    ),
    st.integers(1, 60),
    st.integers(4, 10),
)
@example(["[SEP]"], 400, 4)
@example(["e\u0301", "中"], 400, 5)
def test_cutting_characters_first_changes_no_token(parts, repeats, max_length):
    text = "".join(parts) * repeats
    short = Tokenizer.from_folder(MINILM, 512, max_length)
    ours, whole = short.encode([text]), short.backend.encode_batch([text])[0]
    assert ours.ids[0] == whole.ids
    assert ours.truncated == [bool(whole.overflowing)]


@pytest.mark.parametrize("start", range(50, 64))
@pytest.mark.parametrize("word", ["[SEP]", "embeddings.", "[MASK][SEP]"])
def test_a_cut_inside_a_word_or_a_written_special_token_changes_no_token(word, start):
    text = "a" + " " * (start - 1) + word + " and more" * 40  # characters are cut at 64
    short = Tokenizer.from_folder(MINILM, 512, 4)
    assert short.encode([text]).ids[0] == short.backend.encode(text).ids


def test_a_megabyte_costs_as_much_as_a_page(tokenizer):
    """Counted in characters that reach the tokenizer, not in seconds."""
    text = "hello world, and more text here. " * 30000
    assert len(tokenizer._head(text)) < 20 * tokenizer.max_length
    for hostile in ("x" * 10**6, " " * 10**6, "\0" * 10**6):  # no cut is proven here: the whole text is read
        assert tokenizer._head(hostile) is hostile
        assert len(tokenizer.encode([hostile]).ids[0]) <= 3


def test_lone_surrogates_are_read_as_the_replacement_character(tokenizer):
    assert (
        tokenizer.encode(["a \ud800 b", ("\udfff", "c")]).ids == tokenizer.encode(["a \ufffd b", ("\ufffd", "c")]).ids
    )


@pytest.mark.parametrize("bad", [None, 7, b"bytes", ["one"], ("a", 1), ("a", "b", "c"), 1.5, {"a": "b"}])
def test_what_is_no_text_is_named_with_its_index(tokenizer, bad):
    with pytest.raises(TypeError, match=rf"texts\[1\] must be a str.*{type(bad).__name__}"):
        tokenizer.encode(["fine", bad])


def test_threads_get_what_one_thread_gets(tokenizer):
    lists = [[f"{text} {i}" for text in TEXTS] for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer.encode, lists)) == [tokenizer.encode(texts) for texts in lists]


def test_changing_the_length_leaves_the_original_alone(tokenizer):
    before = tokenizer.encode(TEXTS)
    tokenizer.with_max_length(5).encode(TEXTS)
    assert tokenizer.encode(TEXTS) == before


@pytest.mark.parametrize(
    "config",
    [{}, {"do_lower_case": False}, {"do_lower_case": True, "strip_accents": False}, {"tokenize_chinese_chars": False}],
)
def test_vocab_txt_alone_is_enough(tmp_path, config):
    shutil.copy(MINILM / "vocab.txt", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = BertTokenizer.from_pretrained(tmp_path, **config)
    ours = Tokenizer.from_folder(tmp_path, limit=512)
    assert ours.encode(TEXTS).ids == theirs(TEXTS, truncation=True, max_length=512)["input_ids"]
    pair = ours.encode([("one", "two three")])
    assert pair.type_ids == [[0, 0, 0, 1, 1, 1]]


def test_the_configuration_wins_over_the_file(tmp_path):
    shutil.copy(MINILM / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false, "truncation_side": "left"}')
    cased = Tokenizer.from_folder(tmp_path, limit=512, max_length=4)
    vocab = cased.backend.get_vocab()
    assert cased.encode(["Hello"]).ids[0][1] == vocab["[UNK]"], "an uncased vocabulary has no Hello"
    assert cased.encode(["a b c"]).ids[0][1:-1] == [vocab["b"], vocab["c"]]


def test_lowercase_of_sentence_transformers(tmp_path):
    shutil.copy(MINILM / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    lowered = Tokenizer.from_folder(tmp_path, limit=512, lowercase=True)
    assert (
        lowered.encode(["Hello"]).ids
        == lowered.encode(["hello"]).ids
        != Tokenizer.from_folder(tmp_path, 512).encode(["Hello"]).ids
    )


def test_lengths(tmp_path):
    shutil.copy(MINILM / "tokenizer.json", tmp_path)
    assert Tokenizer.from_folder(tmp_path, limit=77).max_length == 77
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1000000000000000019884624838656}')
    assert Tokenizer.from_folder(tmp_path, limit=77).max_length == 77
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 33}')
    assert Tokenizer.from_folder(tmp_path, limit=77).max_length == 33
    with pytest.raises(ValueError, match="max_seq_length is 78 but the model has positions for 77"):
        Tokenizer.from_folder(tmp_path, limit=77, max_length=78)
    with pytest.raises(ValueError, match="max_seq_length is 2, but a pair of texts has 3 special tokens"):
        Tokenizer.from_folder(tmp_path, limit=77, max_length=2)
    assert Tokenizer.from_folder(tmp_path, limit=77, max_length=3).encode(["a b c"]).ids[0][0] == 101


def test_prompt_length_counts_cls_but_no_sep(tokenizer):
    assert tokenizer.prompt_length("query: ") == 3
    assert tokenizer.prompt_length("") == 1


@pytest.mark.parametrize("content", [b"", b"{", b"not json", b'{"model": {"type": "Nonsense"}}', b"\xff\xfe"])
def test_a_corrupt_file_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json .*is not a tokenizer"):
        Tokenizer.from_folder(tmp_path, limit=512)


def test_missing_files_are_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json .*it holds config\.json"):
        Tokenizer.from_folder(tmp_path, limit=512)
    (tmp_path / "vocab.txt").write_text("hello\nworld\n")
    with pytest.raises(ValueError, match=r"vocab\.txt lacks \[UNK\], \[CLS\], \[SEP\]"):
        Tokenizer.from_folder(tmp_path, limit=512)


def test_save_and_load_again(tmp_path, tokenizer):
    tokenizer.with_max_length(9).save(tmp_path)
    again = Tokenizer.from_folder(tmp_path, limit=512)
    assert again.max_length == 9
    assert again.encode(TEXTS) == tokenizer.with_max_length(9).encode(TEXTS)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert again.encode(TEXTS).ids == theirs(TEXTS, truncation=True)["input_ids"]
