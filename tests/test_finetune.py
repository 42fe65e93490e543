"""Fine-tuning: every kind of task learns, its folder loads elsewhere, and wrong input is named."""

from __future__ import annotations

import csv
import json
import math
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner

from fastbert.cli import app
from fastbert.models import AutoConfig, BertConfig, BertForSequenceClassification, BertModel
from fastbert.train.finetune import finetune, prepare
from fastbert.train.finetune_arguments import TASK_NAMES, FinetuneArguments
from fastbert.train.tables import read_table
from fastbert.train.tasks import TASKS

LEARN = {"learning_rate": 5e-3, "warmup_steps": 0.0, "quiet": True, "save_strategy": "no", "report_to": "none"}
FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")


@pytest.fixture(scope="module")
def tiny(minilm, tmp_path_factory):
    """A BERT of two layers with random weights and a real tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1}
    BertModel(BertConfig(max_position_embeddings=64, **sizes, **still)).save_pretrained(folder)
    for name in FILES:
        shutil.copy(minilm / name, folder / name)
    return folder


def texts(num=64, seed=0):
    """Sentences that hold one of three words, with that word."""
    rng = np.random.default_rng(seed)
    filler = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "went", "home", "to", "sleep", "for", "long"]
    found = []
    for _ in range(num):
        word = ["good", "bad", "blue"][rng.integers(3)]
        words = [*rng.choice(filler, rng.integers(2, 12)), word]
        found.append((" ".join(rng.permutation(words)), word))
    return found


def rows_of(task):
    """Rows of a task that a small model can learn, and the columns that are not the default."""
    found = texts()
    rng = np.random.default_rng(1)
    if task == "classification":
        return [{"text": t, "label": w} for t, w in found], {}
    if task == "regression":
        return [{"text": t, "label": {"good": 1, "bad": -1, "blue": 0}[w]} for t, w in found], {}
    if task == "multi-label":
        return [{"text": t, "label": {"good": "x,y", "bad": "", "blue": "y"}[w]} for t, w in found], {}
    if task == "pair":
        pairs = [(t, str(rng.choice(["good", "bad"])), w) for t, w in found if w != "blue"]
        return [{"text": t, "text_pair": o, "label": int(o == w)} for t, o, w in pairs], {}
    if task == "ner":
        kinds = {"good": "B-G", "cat": "B-ANIMAL", "mat": "I-ANIMAL"}
        rows = [{"words": t.split(), "tags": [kinds.get(w, "O") for w in t.split()]} for t, _ in found]
        for row in rows:  # only B- begins an entity
            row["tags"] = ["O" if tag[0] == "I" else tag for tag in row["tags"]]
        return rows, {}
    if task == "qa":
        rows = [
            {"question": "what is it?", "context": t, "answers": {"text": [w], "answer_start": [t.index(w)]}}
            for t, w in found
        ]
        return rows, {"doc_stride": 4, "max_query_length": 8}
    if task == "multiple-choice":
        rows = [{"text": "good", "a": t, "b": "bad bad", "c": "blue", "label": 0} for t, w in found if w == "good"]
        swapped = [{**r, "a": r["b"], "b": r["a"], "label": 1} for r in rows[::2]]
        return rows[1::2] + swapped, {"choices_columns": ("a", "b", "c")}
    names = sorted({w for t, _ in found for w in t.split()})
    return [{"anchor": f"{a} {b}", "positive": f"{b} {a} {a}"} for a in names for b in names[:4]], {}


METRIC = {
    "classification": "accuracy", "regression": "pearson", "multi-label": "f1_micro", "pair": "accuracy", "ner": "f1",
    "qa": "f1", "multiple-choice": "accuracy", "embedding": "mrr@10",
}  # fmt: skip


@pytest.mark.parametrize("task", TASK_NAMES)
def test_every_task_learns(task, tiny, tmp_path):
    rows, columns = rows_of(task)
    epochs = 25 if task == "pair" else 14
    told = {**LEARN, **columns, "num_train_epochs": epochs, "batch_size": 16, "output_dir": str(tmp_path), "seed": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a fresh head; a folder without pooling
        ready = prepare(tiny, rows, rows, task, **told)
        before = ready.evaluator()(ready.model)
        result = ready.run()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics == result.metrics
    keys = {"eval_loss", f"eval_{METRIC[task]}", "train_seconds", "tokens_per_second", "padding_saved", "train_loss"}
    assert keys <= set(metrics)
    assert metrics["eval_loss"] < 0.5 * before["loss"], "it did not learn"
    assert metrics[f"eval_{METRIC[task]}"] > max(0.9, before[METRIC[task]] + 0.05)
    assert 0 < metrics["padding_saved"] < 1
    after = ready.evaluator()(result.model)  # what the metrics say is of the model that is returned
    assert after["loss"] == pytest.approx(metrics["eval_loss"], rel=1e-4)
    assert f'pipeline_tag: "{TASKS[task].pipeline_tag}"' in (tmp_path / "README.md").read_text()
    assert_loads_elsewhere(task, tmp_path, result.model, ready)


def assert_loads_elsewhere(task, folder, model, ready):
    """transformers or sentence-transformers give the same numbers for the folder."""
    if task == "embedding":
        from sentence_transformers import SentenceTransformer

        from fastbert import Embedder

        theirs = SentenceTransformer(str(folder), device="cpu").encode(["the cat", "good"])
        ours = Embedder.from_pretrained(folder, "float32").encode(["the cat", "good"])
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        return
    auto = getattr(transformers, TASKS[task].classes.__name__)
    theirs, tokenizer = auto.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)
    calls = {"multiple-choice": (["good", "good"], ["bad", "blue"]), "pair": ("good cat", "bad")}
    called = tokenizer(*calls.get(task, ("the good cat sat",)), return_tensors="pt", padding=True)
    if task == "multiple-choice":
        called = {name: value[None] for name, value in called.items()}
    with torch.inference_mode():
        expected, found = theirs(**called), model(**called)
    for name in ("logits", "start_logits"):
        if name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)
    assert theirs.config.id2label == dict(ready.model.config.id2label)
    again = ready.task.classes.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_an_interrupted_run_ends_the_same(tiny, tmp_path):
    rows, _ = rows_of("embedding")
    told = {**LEARN, "save_strategy": "epoch", "num_train_epochs": 2, "batch_size": 16}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = finetune(tiny, rows, task="embedding", output_dir=str(tmp_path), **told).model.state_dict()
        shutil.rmtree(max(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2])))
        again = finetune(tiny, rows, task="embedding", output_dir=str(tmp_path), resume=True, **told)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, whole[name]), name


def test_the_command_knows_all_tasks():
    assert tuple(TASKS) == TASK_NAMES


@pytest.mark.parametrize("loss", ["cosine", "cosent"])
def test_scores_order_cosines(loss, tiny):
    words = sorted({w for t, _ in texts() for w in t.split()})
    rows = [{"a": a, "b": b, "score": 5.0 * (a[0] == b[0])} for a in words for b in words]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ready = prepare(
            tiny, rows, rows, "embedding", text_column="a", text_pair_column="b", loss=loss, num_train_epochs=4, **LEARN
        )
    assert ready.train.labels["labels"].max() == (1.0 if loss == "cosine" else 5.0)
    before = ready.evaluator()(ready.model)
    found = ready.run().metrics
    assert found["eval_loss"] < before["loss"]
    assert found["eval_spearman"] > before["spearman"] + 0.1


def test_the_loss_is_that_of_a_padded_model(tiny):
    """Evaluation against transformers: the mean over all examples, whatever the batches were."""
    for task in ("classification", "ner", "regression", "multi-label"):
        rows, columns = rows_of(task)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ready = prepare(tiny, rows, rows, task, **columns, micro_tokens=100, **LEARN)
        theirs = getattr(transformers, TASKS[task].classes.__name__.replace("AutoModel", "Bert"))(
            transformers.BertConfig(**{**ready.model.config.to_dict(), "attn_implementation": "eager"})
        ).eval()
        theirs.load_state_dict(ready.model.state_dict())
        from benchmarks.training import _Items, _Padding

        batch = _Padding(None)([_Items(ready.train)[i] for i in range(len(ready.train))])
        with torch.inference_mode():
            expected = float(theirs(**batch).loss)
            batch["attention_mask"][:] = 1
            mutant = float(theirs(**batch).loss)
        loss = ready.evaluator()(ready.model)["loss"]
        assert loss == pytest.approx(expected, rel=1e-5), task
        assert abs(mutant - expected) > 2e-4 * expected, "padding must matter here"


def test_training_is_that_of_trainer(tiny, tmp_path):
    """The benchmark's comparison: same weights, order, schedule and decay end in the same model."""
    from benchmarks import training

    rows, _ = rows_of("classification")
    seen, kept = [], {}

    def keep(model, run, examples):
        kept["theirs"] = {name: value.clone() for name, value in model.state_dict().items()}
        return []

    arguments = FinetuneArguments(num_train_epochs=2, batch_size=16, learning_rate=1e-3, bf16=False, quiet=True)
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        run = prepare(tiny, rows, rows, "classification", arguments)
        run.model.save_pretrained(tmp_path)
        patch.setattr(training, "padded_outputs", keep)
        call = training._Padding.__call__
        patch.setattr(training._Padding, "__call__", lambda self, items: seen.append(len(items)) or call(self, items))
        training.run_trainer(run, tmp_path)

        def ours(**changed):
            model = run.task.load(tmp_path, run.tokenizer)
            return (
                replace(run, model=model, eval=None, arguments=replace(arguments, **changed)).run().model.state_dict()
            )

        same, no_decay, other_order = ours(), ours(weight_decay=0.0), ours(seed=7)
    assert seen == [16] * 8
    start = BertForSequenceClassification.from_pretrained(tmp_path).state_dict()

    def distance(a):
        return float(sum((a[name] - kept["theirs"][name]).square().sum() for name in a)) ** 0.5

    moved = distance(start)
    assert distance(same) < 2e-3 * moved
    assert distance(no_decay) > 1e-2 * moved
    assert distance(other_order) > 0.05 * moved


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def run_cli(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    return result, result.output


def test_the_command(tiny, tmp_path):
    rows, _ = rows_of("classification")
    train, out = write_csv(tmp_path / "t[red].csv", rows[:40]), tmp_path / "OUT"
    evaluation = write_csv(tmp_path / "e.csv", rows[40:])
    command = [
        "finetune", "classification", "--model", tiny, "--train", train, "--eval", evaluation, "--text-column", "text",
        "--label-column", "label", "--epochs", 1, "--batch-size", 32, "--lr", "5e-5", "--max-length", 16, "--seed", 1,
        "--out", out,
    ]  # fmt: skip
    shown, told = run_cli(*command, "--dry-run")
    assert shown.exit_code == 0, told
    assert "t[red].csv: 40 items" in told
    assert "good" in told
    assert not out.exists()
    result, told = run_cli(*command)
    assert result.exit_code == 0, told
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"eval_accuracy", "eval_loss", "train_seconds", "tokens_per_second", "padding_saved"} <= set(metrics)
    assert json.loads((out / "tokenizer_config.json").read_text())["model_max_length"] == 16
    config = AutoConfig.from_pretrained(out)
    assert config.id2label == {0: "bad", 1: "blue", 2: "good"}
    result, told = run_cli(*command)
    assert result.exit_code == 1
    assert "overwrite" in told
    result, told = run_cli(*command, "--resume")
    assert result.exit_code == 0, told


def test_options_from_a_file(tiny, tmp_path):
    rows, _ = rows_of("classification")
    renamed = [{"t": r["text"], "label": r["label"]} for r in rows]
    train = write_csv(tmp_path / "t.csv", renamed)
    config = tmp_path / "run.toml"
    config.write_text(
        f'train = "{train}"\nmodel = "{tiny}"\ntext-column = "t"\nmax_steps = 1\nlabels = ["blue", "bad"]\n'
    )
    command = ["finetune", "classification", "--config", config, "--out", tmp_path / "o"]
    result, told = run_cli(*command)
    assert result.exit_code == 2
    assert "the label 'good' in column 'label' is not one of the 2 known ones: 'blue', 'bad'" in told
    result, told = run_cli(*command, "--text-column", "x", "--labels", "blue,bad,good")
    assert result.exit_code == 2
    assert "no column 'x', it has 't', 'label': choose with --text-column" in told
    result, told = run_cli(*command, "--labels", "blue, bad,good", "--bf16", "false")
    assert result.exit_code == 0, told
    assert AutoConfig.from_pretrained(tmp_path / "o").label2id == {"blue": 0, "bad": 1, "good": 2}
    config.write_text("txt-column = 1\n")
    result, told = run_cli(*command)
    assert result.exit_code == 1
    assert "run.toml sets 'txt_column', which no option is called (nearest: text_column" in told
    for short, long in {"epochs": "num_train_epochs", "lr": "learning_rate", "out": "output_dir"}.items():
        config.write_text(f"{short} = 1\n")
        result, told = run_cli(*command)
        assert result.exit_code == 1
        assert f"run.toml sets '{short}', which no option is called: write {long}. The names are " in told
        names = told[told.index("The names are ") :].removeprefix("The names are ").split(", ")
        assert {"train", "eval", "model", long} <= {name.strip() for name in names}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classification"], "--train FILE is needed"),
        (["classification", "--train", "x.csv"], "--out FOLDER is needed"),
        (["clasification", "--train", "x.csv", "--out", "o"], "unknown task 'clasification'"),
        (["ner", "--train", "x.csv", "--out", "o", "--text-column", "t"], "text_column means nothing to the task ner"),
        (["ner", "--train", "x.csv", "--out", "o", "--lr", "-1"], "learning_rate is -1.0; it must be 0 or more"),
        (["ner", "--train", "x.csv", "--out", "o"], "cannot read x.csv: no such file"),
        (["ner", "--train", "x.csv", "--out", "o", "--bf16", "maybe"], "bf16 is 'maybe'; it must be"),
        (["embedding", "--train", "x.csv", "--out", "o", "--score-range", "5,0"], "score_range is (5.0, 0.0)"),
    ],
)
def test_wrong_calls_of_the_command(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result, told = run_cli("finetune", *arguments)
    assert result.exit_code in (1, 2)
    assert message in " ".join(told.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


def test_every_flag_reaches_its_field(monkeypatch):
    """Flags are generated: of each kind one is followed to the dataclass."""
    given = {}
    monkeypatch.setattr("fastbert.train.finetune.prepare", lambda *a: given.update(options=a[-1]) or _Nothing())
    flags = ["--epochs", "2.5", "--lr", "0.1", "--no-quiet", "--resume", "--label-columns", "a, b", "--loss", "cosent"]
    flags += ["--time-budget", "10m", "--bf16", "true", "--score-range", "0,5", "--early-stopping-patience", "2"]
    result, told = run_cli("finetune", "embedding", "--train", "x", "--out", "o", *flags)
    assert result.exit_code == 0, told
    options = given["options"]
    assert (options.num_train_epochs, options.learning_rate, options.quiet, options.resume) == (2.5, 0.1, False, True)
    assert (options.label_columns, options.loss, options.time_budget) == (("a", "b"), "cosent", "10m")
    assert (options.bf16, options.score_range, options.early_stopping_patience) == (True, (0.0, 5.0), 2)
    assert replace(options, output_dir=None, resume=False, time_budget=None) == FinetuneArguments(
        num_train_epochs=2.5, learning_rate=0.1, label_columns=("a", "b"), loss="cosent", bf16=True,
        score_range=(0.0, 5.0), early_stopping_patience=2,
    )  # fmt: skip


class _Nothing:
    def run(self):
        """What a run that was patched away does."""


@pytest.mark.parametrize("task", ["pair", "ner"])
def test_the_benchmark_reads_both_systems_alike(task, tiny, tmp_path):
    from benchmarks import training

    rows, _ = rows_of(task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = prepare(tiny, rows, rows, task, **LEARN)
    run.model.save_pretrained(tmp_path)
    theirs = getattr(transformers, run.task.classes.__name__).from_pretrained(tmp_path)
    found, expected = training.padded_outputs(theirs, run, run.eval), run.evaluator().outputs(run.model)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_rows_of_the_benchmark(tiny):
    from benchmarks import training
    from benchmarks.labelled import Labelled

    rows, _ = rows_of("classification")
    table = read_table(rows)
    arguments = FinetuneArguments(num_train_epochs=2, batch_size=16, learning_rate=5e-3, bf16=False, quiet=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = Labelled(table, table, TASKS["classification"](), "accuracy")
        found = training.bench("moods", data, arguments, 2, str(tiny))
    ours, paired, grouped = found
    assert [row.system for row in found] == list(training.SYSTEMS)
    assert ours.metric_mean == pytest.approx(paired.metric_mean, abs=0.02)  # one example of 64 may fall either way
    assert (ours.padding, paired.seeds, paired.train_items) == (0.0, 2, 64)
    assert 0 < paired.padding < 0.6
    assert 0 < grouped.padding < 0.6
    assert all(row.tokens_per_second > 0 for row in found)
    shown = training.show(found)
    assert shown.row_count == 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = {
            measured: training.bench("moods", data, arguments, 2, str(tiny), measured, ["fastbert", "transformers"])[0]
            for measured in ("metric", "speed")
        }
    assert parts["metric"].metric_mean == ours.metric_mean
    assert math.isnan(parts["metric"].tokens_per_second)
    assert math.isnan(parts["speed"].metric_mean)
    assert parts["speed"].tokens_per_second > 0
