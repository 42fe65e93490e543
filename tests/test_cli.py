"""`fastbert embed` from outside: files, streams, messages, exit codes; killed runs are real processes."""

from __future__ import annotations

import errno
import json
import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.text import Text
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from typer.main import get_command
from typer.testing import CliRunner, Result

import fastbert
from fastbert import corpus as corpus_module
from fastbert import demo
from fastbert.cli import app
from fastbert.embedder import Embedder
from fastbert.engine import dtypes

ROOT = Path(fastbert.__file__).parent.parent
WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "owl", "runs", "sleeps", "sings"]

# An encoder whose vectors are a function of each text. Without torch a process starts ten times faster.
FAKE_ENCODER = """
import sys, types
import numpy, zlib
class Embedder:
    from_pretrained = classmethod(lambda cls, *arguments: cls())
    def encode_with_stats(self, texts, **options):
        vectors = numpy.array([[zlib.crc32(t.encode()), len(t)] for t in texts], numpy.float32)
        tensor = types.SimpleNamespace(numpy=lambda: vectors)
        return types.SimpleNamespace(vectors=tensor, num_tokens=7, num_truncated=0)
sys.modules["fastbert.embedder"] = types.ModuleType("fastbert.embedder")
sys.modules["fastbert.embedder"].Embedder = Embedder
"""
# Each call of the encoder leaves its texts in FASTBERT_TEST_LOG and then takes FASTBERT_TEST_PAUSE seconds longer.
RUN = """
import json, os, time
from fastbert.cli import app
from fastbert.embedder import Embedder
encode = Embedder.encode_with_stats
def slow(self, texts, **options):
    with open(os.environ["FASTBERT_TEST_LOG"], "a") as log:
        log.write(json.dumps(texts) + "\\n")
    time.sleep(float(os.environ["FASTBERT_TEST_PAUSE"]))
    return encode(self, texts, **options)
Embedder.encode_with_stats = slow
app()
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random encoder of 12 words and 8 positions."""
    folder = tmp_path_factory.mktemp("tiny")
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = fastbert.BertConfig(
        vocab_size=len(vocab), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=8, initializer_range=0.3,
    )  # fmt: skip
    fastbert.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The texts of each call of the encoder in this process."""
    calls: list[list[str]] = []
    encode = Embedder.encode_with_stats

    def recorded(self: Embedder, texts: list[str], **options):
        calls.append(texts)
        return encode(self, texts, **options)

    monkeypatch.setattr(Embedder, "encode_with_stats", recorded)
    return calls


def sentences(num: int) -> list[str]:
    rng = random.Random(num)
    return [f"{i} " + " ".join(rng.choices(WORDS, k=rng.randrange(1, 9))) for i in range(num)]


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(f"{t}\n" for t in texts), encoding="utf-8")
    return path


def call(*arguments: object, stdin: str | bytes = b"") -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)


def command(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, arguments)]


def environment(log: Path, pause: float = 0.0) -> dict[str, str]:
    more = {"FASTBERT_TEST_LOG": str(log), "FASTBERT_TEST_PAUSE": str(pause), "PYTHONPATH": str(ROOT)}
    return {**os.environ, **more, "COLUMNS": "100", "TERM": "xterm"}


# What it computes.


def test_files_hold_the_embedder_s_vectors(minilm: Path, tmp_path: Path) -> None:
    texts = [*demo.SENTENCES, "", "un café, s'il vous plaît"]
    source = write_lines(tmp_path / "in.txt", texts)
    options = ("--model", minilm, "--truncate-dim", 64, "--normalize", "--prompt", "query: ", "--chunk-rows", 18)
    assert call("embed", "-i", source, "-o", tmp_path / "out.npy", *options).exit_code == 0
    expected = Embedder.from_pretrained(minilm).encode(
        texts, prompt="query: ", truncate_dim=64, normalize_embeddings=True
    )
    found = np.load(tmp_path / "out.npy")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
    lines = call("embed", "-o", "-", *options, stdin=source.read_bytes()).stdout.splitlines()
    assert [json.loads(line)["text"] for line in lines] == texts
    np.testing.assert_array_equal(np.array([json.loads(line)["embedding"] for line in lines], np.float32), expected)


def test_the_demo_pairs_what_belongs_together(minilm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    pairs: list[list[str]] = []
    for row in rows:
        if row[0]:  # a cell goes over several lines; the cosine stands on the first
            pairs.append(row)
        else:
            pairs[-1] = [f"{above} {below}".strip() for above, below in zip(pairs[-1], row, strict=True)]
    expected = [(demo.SENTENCES[i], demo.SENTENCES[i + 1]) for i in range(0, 14, 2)]
    assert sorted((a, b) for _, a, b in pairs) == sorted(expected)
    cosines = [float(cosine) for cosine, _, _ in pairs]
    assert cosines == sorted(cosines, reverse=True)
    assert 0.3 < cosines[-1] < cosines[0] < 0.9
    assert all(len(line) <= 80 for line in lines[:-2])
    assert "16 sentences" in lines[-2]
    assert "tokens/s" in lines[-2]


def test_preview(tiny: Path) -> None:
    shown = call("embed", "-m", tiny, "red cat", "two [bold]owl[/bold]\n\x1b[31msings")
    assert shown.exit_code == 0
    assert "16 features a text" in shown.stdout
    assert "two [bold]owl[/bold] \N{REPLACEMENT CHARACTER}[31msings" in shown.stdout
    assert "\x1b" not in shown.stdout
    assert [line.split("│")[2].strip() for line in shown.stdout.splitlines() if "red cat" in line] == ["4"]
    many = call("embed", "-m", tiny, stdin="\n".join(sentences(50)))
    assert "first 20 rows only" in many.stderr
    assert sum(line.startswith("│") for line in many.stdout.splitlines()) == 20


def test_truncation_is_never_silent(tiny: Path, tmp_path: Path) -> None:
    texts = ["red " * 30, "red", "red " * 7, "red " * 6]
    source = write_lines(tmp_path / "in.txt", texts)
    loud = call("embed", "-m", tiny, "-i", source, "-o", tmp_path / "a.npy")
    assert "rows 4" in loud.stderr
    assert "truncated 2" in loud.stderr
    quiet = call("embed", "-m", tiny, "-i", source, "-o", tmp_path / "b.npy", "--quiet")
    assert "2 of 4 texts were truncated" in quiet.stderr
    assert quiet.stdout == ""
    short = call("embed", "-m", tiny, "--max-seq-length", 4, "red one", "red cat owl", "red red red red", "cat")
    assert "truncated 2" in short.stderr


# Interrupted runs.


def finished_parts(output: Path) -> set[int]:
    return {int(p.stem.split("-")[1]) for p in output.parent.glob(f"{output.name}.partial/part-*.npz")}


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, "the process ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def logged(log: Path) -> list[list[str]]:
    """The texts of each call of the encoder so far."""
    return [json.loads(line) for line in log.read_text().split("\n")[:-1]] if log.exists() else []


def kill_after(num_calls: int, driver: str, log: Path, arguments: tuple[object, ...]) -> None:
    """Run the command and kill it at some moment after so many calls of the encoder."""
    enough = len(logged(log)) + num_calls
    process = subprocess.Popen(command(driver + RUN, *arguments), env=environment(log, 0.1))
    wait_for(lambda: len(logged(log)) >= enough, process)
    time.sleep(random.Random(enough).uniform(0, 0.12))
    process.kill()
    process.wait()


def test_killed_runs_compute_no_part_twice(tiny: Path, tmp_path: Path) -> None:
    texts = sentences(58)
    chunks = [texts[i : i + 5] for i in range(0, len(texts), 5)]
    source, whole, output, log = (tmp_path / n for n in ("in.txt", "whole.jsonl", "out.jsonl", "log"))
    write_lines(source, texts)
    arguments = ("embed", "-m", tiny, "-i", source, "--chunk-rows", 5, "--quiet", "--resume", "-o")
    num_computed = 0
    for num_calls in (2, 3, 1, 1):
        finished = finished_parts(output)
        kill_after(num_calls, FAKE_ENCODER, log, (*arguments, output))
        assert not output.exists()
        assert finished <= finished_parts(output)
        assert not [c for c in logged(log)[num_computed:] if chunks.index(c) in finished], "a finished part again"
        num_computed = len(logged(log))
    finished = finished_parts(output)
    assert finished
    subprocess.run(command(FAKE_ENCODER + RUN, *arguments, output), env=environment(log), check=True)
    assert logged(log)[num_computed:] == [chunk for i, chunk in enumerate(chunks) if i not in finished]
    subprocess.run(command(FAKE_ENCODER + RUN, *arguments, whole), env=environment(log), check=True)
    assert output.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_a_killed_run_resumes_to_the_same_bits(tiny: Path, tmp_path: Path, calls: list[list[str]]) -> None:
    source, output, log = write_lines(tmp_path / "in.txt", sentences(40)), tmp_path / "out.npy", tmp_path / "log"
    arguments = ("embed", "-m", tiny, "-i", source, "--chunk-rows", 4, "-o")
    kill_after(3, "", log, (*arguments, output))
    num_finished = len(finished_parts(output))
    assert num_finished >= 2
    assert call(*arguments, output, "--resume").exit_code == 0
    assert len(calls) == 10 - num_finished
    assert call(*arguments, tmp_path / "whole.npy").exit_code == 0
    assert output.read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_ctrl_c_says_how_to_resume(tiny: Path, tmp_path: Path) -> None:
    source, output, log = write_lines(tmp_path / "in.txt", sentences(30)), tmp_path / "out.npy", tmp_path / "log"
    arguments = ("embed", "-m", tiny, "-i", source, "--chunk-rows", 3, "-o", output)
    process = subprocess.Popen(
        command(FAKE_ENCODER + RUN, *arguments), env=environment(log, 0.2), stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: len(finished_parts(output)) > 1, process)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "out.npy.partial keeps what was computed: the same command with --resume continues" in message
    assert "Traceback" not in message
    again = call(*arguments)
    assert again.exit_code == 2
    assert "--resume continues it, --overwrite begins again" in again.stderr


def test_a_full_disk_keeps_the_parts(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = write_lines(tmp_path / "in.txt", sentences(9)), tmp_path / "out.npy"
    arguments = ("embed", "-m", tiny, "-i", source, "--chunk-rows", 3, "-o", output, "--resume")
    with monkeypatch.context() as patch:
        fsync, calls = os.fsync, []

        def full(fd: int) -> None:
            calls.append(fd)
            if len(calls) > 3:  # the manifest and two parts fit
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(fd)

        patch.setattr(corpus_module.os, "fsync", full)
        failed = call(*arguments)
    assert failed.exit_code == 1
    assert "No space left" in failed.stderr
    assert "--resume continues" in failed.stderr
    assert finished_parts(output) == {0, 1}
    done = call(*arguments)
    assert done.exit_code == 0
    assert "rows 9" in done.stderr
    assert np.load(output).shape == (9, 16)


def test_resume_with_other_options_is_refused(tiny: Path, tmp_path: Path, calls: list[list[str]]) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.npy"
    rows = [json.dumps({"text": t}) for t in sentences(8)]
    source.write_text("\n".join([*rows[:5], '{"text": null}', *rows[6:]]))
    arguments = ("embed", "-m", tiny, "-i", source, "--chunk-rows", 2, "-o", output)
    bad = call(*arguments)
    assert (bad.exit_code, "line 6" in bad.stderr, finished_parts(output)) == (2, True, {0, 1})
    other = call(*arguments, "--resume", "--normalize", "--truncate-dim", 4)
    assert other.exit_code == 2
    assert "normalize: False then, True now" in other.stderr
    assert "truncate_dim: None then, 4 now" in other.stderr
    other = call(*arguments, "--resume", "--dtype", "bfloat16")
    assert "dtype: 'float32' then, 'bfloat16' now" in other.stderr
    source.write_text("\n".join(rows))  # the bad row is repaired: what was computed from the others still counts
    calls.clear()
    assert call(*arguments, "--resume", "--threads", torch.get_num_threads()).exit_code == 0
    assert sum(map(len, calls)) == 4


def test_auto_on_another_cpu_is_no_resume(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is kept as what it meant, so that the rows of one file never have two precisions."""
    source, output = tmp_path / "in.txt", tmp_path / "out.npy"
    source.write_bytes(b"one\ntwo\nthr\xffee\n")
    arguments = (
        "embed",
        "-m",
        tiny,
        "-i",
        source,
        "--chunk-rows",
        1,
        "-o",
        output,
        "--dtype",
        "auto",
        "--device",
        "cpu",
    )
    monkeypatch.setattr(dtypes, "auto_on_cpu", lambda: ("bfloat16", "made up"))
    assert call(*arguments).exit_code == 2
    assert finished_parts(output) == {0, 1}
    source.write_bytes(b"one\ntwo\nthree\n")
    monkeypatch.setattr(dtypes, "auto_on_cpu", lambda: ("float32", "made up"))
    other = call(*arguments, "--resume")
    assert other.exit_code == 2
    assert "dtype: 'bfloat16' then, 'float32' now" in other.stderr
    assert call(*arguments, "--resume", "--dtype", "bfloat16").exit_code == 0
    assert np.load(output).shape == (3, 16)


# Streams and terminals.


def test_a_broken_pipe_is_no_error_message(tiny: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.txt", sentences(3000))
    process = subprocess.Popen(
        command(FAKE_ENCODER + RUN, "embed", "-m", tiny, "-i", source, "-o", "-", "--chunk-rows", 100, "-q"),
        env=environment(Path(os.devnull)), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    assert json.loads(process.stdout.readline())["index"] == 0
    process.stdout.close()
    message = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(30) == 1
    assert "Traceback" not in message
    assert "error" not in message.lower()


def on_terminal(*arguments: object) -> tuple[int, str]:
    """Exit code and screen, colours removed, of a run whose stdin, stdout and stderr are one terminal."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command(FAKE_ENCODER + RUN, *arguments),
        env=environment(Path(os.devnull), 0.05), stdin=slave, stdout=slave, stderr=slave,
    )  # fmt: skip
    os.close(slave)
    screen = b""
    while select.select([master], [], [], 60)[0]:
        try:
            screen += os.read(master, 65536)
        except OSError:  # EIO: the other side is closed
            break
    os.close(master)
    return process.wait(30), re.sub("\x1b\\[[0-9;?]*[A-Za-z]", "", screen.decode())


def test_a_terminal_has_a_bar_and_a_pipe_has_none(tiny: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.txt", sentences(40))
    arguments = ("embed", "-m", tiny, "-i", source, "--chunk-rows", 4, "-o", tmp_path / "out.npy", "--overwrite")
    code, screen = on_terminal(*arguments)
    assert code == 0
    assert "rows  " in screen
    assert "━" in screen
    assert f"| {tmp_path / 'out.npy'}" in screen
    piped = call(*arguments)
    assert "━" not in piped.output
    assert piped.stdout == ""
    summary = [line for line in piped.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(summary) == 1
    assert summary[0].startswith("rows 40 | tokens computed ")


def test_nothing_to_read_shows_the_help(tiny: Path) -> None:
    code, screen = on_terminal("embed", "-m", tiny)
    assert code == 2
    assert "--input" in screen
    assert "Turn texts into vectors" in screen


def test_help_and_version_do_not_import_torch() -> None:
    code = "import sys; from fastbert.cli import app; app(sys.argv[1:], standalone_mode=False)\n"
    code += "assert not {'torch', 'pyarrow'} & set(sys.modules)"
    for arguments, words in {
        ("--help",): "embed",
        ("embed", "--help"): "--resume",
        ("--version",): fastbert.__version__,
    }.items():
        run = subprocess.run(
            command(code, *arguments),
            env=environment(Path(os.devnull)),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (run.returncode, run.stderr) == (0, "")
        assert words in run.stdout


def test_brackets_in_a_help_text_are_shown() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    helps = [getattr(p, "help", None) or "" for command in commands.values() for p in command.params]
    with_brackets = [help for help in helps if "[" in help]
    assert with_brackets
    for help in with_brackets:
        assert Text.from_markup(help).plain.count("[") == help.count("["), help


# Messages.


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("hello", "-i", "in.txt"), 2, "TEXTS or --input, not both"),
        (("-i", "gone.txt"), 2, "cannot read gone.txt: No such file or directory"),
        (("-i", "in.pdf"), 2, "'.pdf'"),
        (("-i", "empty.txt", "-o", "out.npy"), 2, "no texts in empty.txt"),
        (("-i", "in.txt", "-o", "out.csv"), 2, "'.csv'"),
        (("-i", "in.txt", "-o", "there.npy"), 2, "there.npy exists already"),
        (("-i", "in.jsonl", "--column", "body"), 2, "has no column 'body', it has 'text'"),
        (("hello", "--resume"), 2, "need --output"),
        (("hello", "-m", "./no-such-model"), 1, "model './no-such-model' was not found"),
        (("hello", "--dtype", "int3"), 1, "dtype 'int3' is not one of"),
        (("hello", "--prompt-name", "poem"), 1, "prompt name 'poem' is unknown"),
        (("hello", "--chunk-rows", "0"), 2, "--chunk-rows"),
        ((), 2, "no texts in standard input"),
    ],
)
def test_errors_are_one_message(
    arguments: tuple[str, ...], code: int, words: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.txt").write_text("red\n")
    (tmp_path / "in.jsonl").write_text('{"text": "red"}')
    (tmp_path / "there.npy").write_bytes(b"precious")
    (tmp_path / "empty.txt").touch()
    before = sorted(tmp_path.iterdir())
    model = () if "-m" in arguments else ("-m", tiny)
    result = call("embed", *arguments, *model)
    assert result.exit_code == code
    assert words in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "there.npy").read_bytes() == b"precious"


def test_debug_shows_the_traceback() -> None:
    result = call("--debug", "embed", "hello", "-m", "./no-such-model")
    assert isinstance(result.exception, FileNotFoundError)
