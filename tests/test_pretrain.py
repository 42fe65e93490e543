"""Pretraining end to end, small: every objective learns, what it leaves loads elsewhere, and bad input is refused."""

from __future__ import annotations

import json
import math
import random
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fastbert.cli import app
from fastbert.corpus import CorpusError
from fastbert.models import AutoModel, AutoModelForMaskedLM
from fastbert.models.electra_pair import ElectraPair
from fastbert.tokenizer import Tokenizer
from fastbert.train.estimate import probe, state_bytes
from fastbert.train.families import build_config
from fastbert.train.heldout import HeldOut
from fastbert.train.pretrain import _first_rank, prepare, pretrain
from fastbert.train.vocabulary import train_vocabulary

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
COMMON = {
    "seq_length": 32, "vocab_size": 150, "max_steps": 6, "batch_tokens": 512, "micro_tokens": 256, "save_steps": 3,
    "eval_steps": 6, "logging_steps": 2, "quiet": True, "report_to": "none", "device": "cpu", "peak_tflops": 0.01,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """The models are too small for more, and threads of other processes are in the way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Documents of two topics; each has its own words, in chains: a word tells which ones follow."""
    rng, lines = random.Random(1), []
    for document in range(80):
        words = [f"{'xy'[document % 2]}{a}{b}" for a in "abcdefgh" for b in "klm"]
        for _ in range(12):
            at = rng.randrange(len(words))
            lines.append(" ".join(words[(at + k) % len(words)] for k in range(rng.randint(4, 8))) + " .")
        lines.append("")
    path = tmp_path_factory.mktemp("texts") / "chains.txt"
    path.write_text("\n".join(lines))
    return path


def config_json(folder, model_type, **more):
    path = folder / f"{model_type}.json"
    fields = dict(SMALL, model_type=model_type, vocab_size=150, max_position_embeddings=70, initializer_range=0.05)
    if model_type == "distilbert":
        fields = {"model_type": "distilbert", "vocab_size": 150, "dim": 32, "n_layers": 2, "n_heads": 2}
        fields |= {"hidden_dim": 64, "max_position_embeddings": 70}
    if model_type in ("albert", "electra"):
        fields["embedding_size"] = 32
    if model_type == "roberta":
        fields |= {"vocab_size": 400, "type_vocab_size": 1}
    path.write_text(json.dumps({**fields, **more}))
    return str(path)


def run(texts, folder, **options):
    return pretrain(data=texts, **{**COMMON, "output_dir": str(folder), **options})


FAMILIES = {
    "bert": "mlm",
    "bert-nsp": "mlm+nsp",
    "roberta": "mlm",
    "albert": "mlm+sop",
    "distilbert": "mlm",
    "electra": "electra",
    "mpnet": "mlm",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_and_its_folder_loads_everywhere(texts, tmp_path, name):
    import transformers

    family = name.split("-")[0]
    more = {"vocab_size": 400} if family == "roberta" else {}
    result = run(
        texts,
        tmp_path / "out",
        config_json=config_json(tmp_path, family),
        objective=FAMILIES[name],
        holdout=0.2,
        **more,
    )
    assert result.steps == 6
    assert result.metrics["eval_mlm_accuracy"] >= 0.0
    assert math.isfinite(result.metrics["eval_loss"])
    assert {"bert-nsp": "eval_nsp", "albert": "eval_sop", "electra": "eval_disc_recall"}.get(name, "eval_loss") in (
        result.metrics
    )
    tokenizer = Tokenizer.from_folder(tmp_path / "out", 32)
    ids = torch.tensor(tokenizer.encode(["xak xal xam .", "yak yal yam ."]).ids)
    ours = AutoModel.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        theirs = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()(ids).last_hidden_state
        torch.testing.assert_close(ours(ids).last_hidden_state, theirs, rtol=1e-4, atol=1e-5)
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert reader("xak xal")["input_ids"] == tokenizer.encode(["xak xal"]).ids[0]
    if name == "electra":
        pair = ElectraPair.from_pretrained(tmp_path / "out")
        assert pair.generator.config.hidden_size == 8
        assert pair.generator.electra.embeddings is pair.discriminator.electra.embeddings
    else:
        assert transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out")(ids).logits.shape[-1] >= 150


def unigram_entropy(run):
    counts = run.shards.unigram_counts(run.tokenizer.num_ids)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def test_it_learns(tmp_path):
    """Sentences that repeat a word: the unmasked ones tell it, which the shares of words alone do not."""
    rng, words = random.Random(1), [a + b for a in "abcdef" for b in "klmn"]
    lines = [" ".join([rng.choice(words)] * rng.randint(3, 8)) + " .\n" for _ in range(1500)]
    path = tmp_path / "words.txt"
    path.write_text("\n".join(lines))
    options = {"max_steps": 60, "save_strategy": "no", "eval_steps": 60, "learning_rate": 1e-2, "holdout": 0.2}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    made = prepare(
        data=path, output_dir=str(tmp_path / "out"), config_json=config_json(tmp_path, "bert", **dropout),
        **{**COMMON, **options},
    )  # fmt: skip
    before, entropy = made.evaluator()(made.model.eval()), unigram_entropy(made)
    after = made.run().metrics
    assert before["loss"] > entropy
    assert after["eval_loss"] < 0.5 * entropy
    assert after["eval_mlm_accuracy"] > 0.5
    assert after["eval_perplexity"] == pytest.approx(math.exp(after["eval_loss"]))


def test_distillation_begins_with_the_teacher(texts, tmp_path):
    teacher = tmp_path / "teacher"
    run(texts, teacher, config_json=config_json(tmp_path, "bert", num_hidden_layers=4))
    made = prepare(data=texts, **{**COMMON, "vocab_size": None}, teacher=str(teacher), output_dir=str(tmp_path / "s"))
    assert made.objective_name == "distil"
    assert made.model.config.model_type == "distilbert"
    assert made.model.config.n_layers == 2
    table = AutoModelForMaskedLM.from_pretrained(teacher).base_model.embeddings.word_embeddings.weight
    assert torch.equal(made.model.base_model.embeddings.word_embeddings.weight, table)
    result = made.run()
    assert "teacher" not in " ".join(dict(result.model.named_parameters()))
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "s").config.n_layers == 2


def test_a_resumed_run_ends_in_the_same_weights(texts, tmp_path):
    options = {"config_json": config_json(tmp_path, "bert"), "objective": "mlm+nsp"}
    whole = run(texts, tmp_path / "out", **options).model.state_dict()
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    tokens = (tmp_path / "out" / "data" / "tokens" / "manifest.json").stat().st_mtime_ns
    resumed = run(texts, tmp_path / "out", resume=True, **options)
    assert (tmp_path / "out" / "data" / "tokens" / "manifest.json").stat().st_mtime_ns == tokens
    assert all(torch.equal(value, resumed.model.state_dict()[name]) for name, value in whole.items())
    other = run(texts, tmp_path / "other", seed=7, **options).model.state_dict()
    assert not all(torch.equal(value, other[name]) for name, value in whole.items())


def test_a_second_phase_goes_on_with_longer_items(texts, tmp_path):
    first = run(texts, tmp_path / "one", config_json=config_json(tmp_path, "bert"))
    options = {**COMMON, "vocab_size": None, "seq_length": 64, "segments": "full-sentences"}
    second = prepare(data=texts, model=str(tmp_path / "one"), output_dir=str(tmp_path / "two"), **options)
    assert second.train.lengths.max() == 64
    assert all(torch.equal(value, second.model.state_dict()[name]) for name, value in first.model.state_dict().items())
    assert second.run().steps == 6
    with pytest.raises(ValueError, match="seq_length is 96 but the model has positions for 70"):
        prepare(
            data=texts, model=str(tmp_path / "one"), output_dir=str(tmp_path / "x"), **{**options, "seq_length": 96}
        )


def test_held_out_loss_is_that_of_one_large_batch(texts, tmp_path):
    run = prepare(
        data=texts, **COMMON, config_json=config_json(tmp_path, "bert"), output_dir=str(tmp_path), holdout=0.2
    )
    model = run.model.eval()
    one, many = (HeldOut(run.objective, run.eval, micro)(model) for micro in (100_000, 64))
    assert len(run.eval) > 10
    assert one.keys() == many.keys()
    for name, value in one.items():
        assert many[name] == pytest.approx(value, rel=1e-5), name
    other = HeldOut(run.objective, run.train, 4096)(model)
    assert other["loss"] != pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("family", "size"),
    [
        ("bert", "tiny"),
        ("bert", "medium"),
        ("bert", "base"),
        ("bert", "large"),
        ("distilbert", "base"),
        ("albert", "base"),
        ("electra", "small"),
        ("electra", "base"),
        ("roberta", "base"),
        ("mpnet", "base"),
    ],
)
def test_sizes_are_those_of_the_papers(family, size):
    class Vocabulary:
        num_ids, config = 30522, {"pad_token": "<pad>"}

        class backend:
            @staticmethod
            def token_to_id(token):
                return 1 if family in ("roberta", "mpnet") else 0

    config = build_config(family, size, Vocabulary(), 128)
    with torch.device("meta"):
        found = sum(p.numel() for p in AutoModel.from_config(config).parameters())
    # Published checkpoints with a vocabulary of 30,522, by transformers.
    assert (
        found
        == {
            ("bert", "tiny"): 4_385_920,
            ("bert", "medium"): 41_373_184,
            ("bert", "base"): 109_482_240,
            ("bert", "large"): 335_141_888,
            ("distilbert", "base"): 66_362_880,
            ("albert", "base"): 11_683_584 + 522 * 128,
            ("electra", "small"): 13_483_008,
            ("electra", "base"): 108_891_648,
            ("roberta", "base"): 124_645_632 - (50265 - 30522) * 768,
            ("mpnet", "base"): 109_486_464 - (30527 - 30522) * 768,
        }[family, size]
    )


@pytest.mark.parametrize("family", ["bert", "distilbert", "albert"])
def test_dropout_and_deviation_of_a_new_model(family, texts, tmp_path):
    options = {**COMMON, "data": texts, "model_type": family, "size": "tiny", "vocab_size": 150}
    run = prepare(**options, dropout=0.25, initializer_range=0.09, output_dir=str(tmp_path))
    config = run.model.config
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.25, 0.25)
    assert run.model.base_model.embeddings.word_embeddings.weight.std().item() == pytest.approx(0.09, rel=0.05)
    with pytest.raises(ValueError, match=r"dropout=0.2 and model='DIR' exclude each other"):
        prepare(**{**options, "vocab_size": None}, model="DIR", dropout=0.2, output_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"initializer_range is 0.0; it must be above 0"):
        prepare(**options, initializer_range=0.0, output_dir=str(tmp_path))


def test_probe_measures_and_changes_nothing(texts, tmp_path):
    run = prepare(data=texts, **COMMON, config_json=config_json(tmp_path, "bert"), output_dir=str(tmp_path))
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    from fastbert.train.batch import collate

    def measured(num):
        batch = collate([run.train[i] for i in range(num)], range(num))
        return probe(run.model, run.objective, batch, torch.device("cpu"), torch.float32)

    few, many = measured(10), measured(40)
    assert many.num_tokens > 3 * few.num_tokens
    # Hidden states, queries, keys, values, feed-forward, of 2 layers: at least so many numbers a token.
    assert many.saved_bytes > 4 * 2 * (32 * 6 + 64) * many.num_tokens
    assert many.saved_bytes_per_token == pytest.approx(few.saved_bytes_per_token, rel=0.15)
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert all(p.grad is None for p in run.model.parameters())
    frozen = torch.nn.Linear(3, 4)
    frozen.bias.requires_grad_(False)
    assert state_bytes(frozen) == 12 * 16 + 4 * 4


def test_other_ranks_wait_for_the_first(tmp_path, monkeypatch):
    done = tmp_path / "done"
    monkeypatch.setenv("RANK", "1")
    began = time.monotonic()
    threading.Timer(0.5, done.touch).start()
    _first_rank(done.exists, lambda: pytest.fail("rank 1 must not build"))
    assert time.monotonic() - began >= 0.4


def test_command_line(texts, tmp_path):
    options = [
        "--vocab-size", "150", "--size", "tiny", "--seq-length", "32", "--max-steps", "2", "--batch-tokens", "256",
        "--peak-tflops", "0.01", "--objective", "mlm+nsp", "--quiet", "--report-to", "none",
    ]  # fmt: skip
    command = ["pretrain", "--data", str(texts), "--out", str(tmp_path / "out"), *options]
    dry = CliRunner().invoke(app, [*command, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    for told in (
        "80 documents, 960 sentences",
        "BertForPreTraining",
        "2 steps",
        "MFLOP a token",
        "tokens/s on",
        "at 0.01",
    ):
        assert told in " ".join(dry.output.replace("│", " ").split()), told
    assert not (tmp_path / "out" / "model.safetensors").exists()
    config = tmp_path / "run.toml"
    config.write_text('max_steps = 1\nlearning_rate = 3e-4\nobjective = "mlm"\n')
    two = texts.with_name("more.txt")
    two.write_text("more xak xal .\nthan that .\n")
    done = CliRunner().invoke(app, [*command, "--config", str(config), str(two)])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["train_loss"] > 0
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 2  # the flag wins over the file
    for wrong, told in (
        (["pretrain", "--out", "x"], "--data FILES"),
        (["pretrain", "--data", str(texts)], "--out FOLDER"),
        ([*command, "--seq-length", "4"], "seq_length is 4"),
    ):
        result = CliRunner().invoke(app, wrong)
        assert result.exit_code != 0
        assert told in result.output + (result.stderr or "")


def test_refusals(texts, tmp_path):
    out = {"output_dir": str(tmp_path / "out"), "data": texts}
    options = {**COMMON, **out}
    with pytest.raises(ValueError, match="output_dir is None"):
        pretrain(data=texts, vocab_size=150)
    with pytest.raises(ValueError, match="there is no tokenizer"):
        pretrain(**{**options, "vocab_size": None})
    with pytest.raises(ValueError, match=r"mlm\+nsp needs a head for pairs; albert, bert have one, roberta has not"):
        pretrain(**{**options, "vocab_size": 400}, model_type="roberta", size="tiny", objective="mlm+nsp")
    with pytest.raises(ValueError, match="trains an electra, but the model is a bert"):
        pretrain(**options, size="tiny", objective="electra")
    with pytest.raises(ValueError, match="needs a teacher"):
        pretrain(**options, size="tiny", objective="distil")
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ ids but the model a vocabulary of 20"):
        pretrain(**options, config_json=config_json(tmp_path, "bert", vocab_size=20))
    with pytest.raises(ValueError, match=r"tokenizer=.* and vocab_size=150 exclude each other"):
        pretrain(**options, tokenizer="somewhere")
    with pytest.raises(ValueError, match=r"'vocabsize'.*vocab_size"):
        pretrain(vocabsize=3, **out)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    with pytest.raises(CorpusError, match=r"empty\.txt: no text"):
        pretrain(**{**options, "data": empty})
    with pytest.raises(CorpusError, match="does not exist"):
        pretrain(**{**options, "data": tmp_path / "none.txt"})
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a b c"}\n')
    with pytest.raises(CorpusError, match="no column 'body'"):
        pretrain(**{**options, "data": rows}, column="body")
    with pytest.raises(ValueError, match="mpnet needs a padding token with id 1, but the tokenizer's has id 0"):
        build_config("mpnet", "tiny", train_vocabulary(["ab ba"] * 9, 20, max_length=9), 16)
