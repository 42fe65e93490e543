"""README and docs/ are true: blocks run, commands parse, links lead somewhere, quoted errors exist, the site builds."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from typer.main import get_command

import fastbert
from benchmarks.__main__ import app as suite
from fastbert.cli import app

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = ("", "csrc", "fastbert", "fastbert/models", "fastbert/train", "tests", "benchmarks")
GUIDES = sorted(path for path in DOCS.rglob("*.md"))
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in GUIDES} | {"README.md": README}
PROSE = PAGES | {"CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")}


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of a language; those of none are the shell's."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in fenced if name == language]


# The README's blocks stand alone; a guide's follow each other.
SCRIPTS = {f"README.md-{i}": code for i, code in enumerate(blocks(README, "python"))}
SCRIPTS |= {name: "\n".join(blocks(text, "python")) for name, text in PAGES.items() if name != "README.md"}


@pytest.mark.parametrize("name", [name for name, code in SCRIPTS.items() if code])
def test_python_blocks(name, tmp_path):
    done = subprocess.run([sys.executable, "-c", SCRIPTS[name]], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_embed_commands_of_the_readme(tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = ["a first text", "a second one"] * 3
    (tmp_path / "queries.txt").write_text("\n".join(texts) + "\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "corpus.parquet")
    commands = re.findall(r"^(?:cat queries\.txt \| )?fastbert embed .*?(?=\s+#|$)", README, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        if "--resume" in command:
            (tmp_path / "vectors.npy").unlink()
        run = command.replace("fastbert", f"{shlex.quote(sys.executable)} -c 'from fastbert.cli import app; app()'")
        done = subprocess.run(run, shell=True, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, (command, done.stderr)
    assert (tmp_path / "vectors.npy").exists()
    assert len((tmp_path / "vectors.jsonl").read_text().splitlines()) == len(texts)


def commands(text: str) -> list[list[str]]:
    """The words of every shell command in fenced blocks and between backticks, without variables before it."""
    lines = [line for block in blocks(text, "") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`((?:fastbert|make|python -m|torchrun|pytest) [^`\n]+)`", text)
    found = []
    for line in lines:
        for part in re.split(r"\s\|\s|\s>\s", line):
            if re.match(r"(\w+=\S+ )*(fastbert|make|python|pytest|torchrun)\s", part):
                words = shlex.split(part, comments=True)
                found.append([w for i, w in enumerate(words) if not (re.match(r"[A-Z_]+=", w) and i == 0)])
    return found


class Reached(Exception):
    """The command line was understood: what it would do begins here."""


def fault(words: list[str]) -> str | None:
    """What is wrong with a command: an option that is not there, a value that does not fit, no such file or target."""
    if "fastbert" in words[:1] or ("fastbert" in words and words[words.index("fastbert") - 1] == "-m"):
        return _fault_of_ours(words[words.index("fastbert") + 1 :])
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return next((f"make has no target {word}" for word in words[1:2] if word not in targets), None)
    if "pytest" in words:
        paths = [word.split("::")[0] for word in words if "/" in word or word == "benchmarks"]
        return next((f"{path} does not exist" for path in paths if not (ROOT / path).exists()), None)
    if words[:2] == ["python", "-m"]:
        place = ROOT / words[2].replace(".", "/")
        source = place.with_suffix(".py") if place.with_suffix(".py").exists() else place / "__main__.py"
        if not source.exists():
            return f"there is no module {words[2]}"
        options = [word for word in words[3:] if word.startswith("--")]
        return next((f"{words[2]} has no {o}" for o in options if f'"{o}"' not in source.read_text()), None)
    return None


def _fault_of_ours(words: list[str]) -> str | None:
    if not words or "COMMAND" in words or words == ["--help"]:
        return None
    command = get_command(suite) if words[0] == "bench" else get_command(app).commands.get(words[0])
    if command is None:
        return f"there is no command {words[0]}"
    try:
        context = command.make_context(words[0], words[1:])
        if words[0] in ("finetune", "pretrain", "serve") and len(words) > 2 and "..." not in words:
            with context:
                context.invoke(command.callback, **context.params)
    except Reached:
        return None
    except SystemExit as error:
        return None if error.code in (0, None) else str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.fixture
def parsed_only(monkeypatch, tmp_path):
    """Commands stop where they have understood their options."""

    def reached(*args, **kwargs):
        raise Reached

    for place in ("fastbert.hub.resolve", "fastbert.train.finetune.prepare", "fastbert.train.pretrain.prepare"):
        monkeypatch.setattr(place, reached)
    monkeypatch.chdir(tmp_path)
    Path("keys.txt").write_text("a key\n")
    Path("run.toml").write_text(blocks(PAGES["docs/guides/finetune.md"], "toml")[0])


@pytest.mark.usefixtures("parsed_only")
def test_commands_parse():
    found = [(name, words) for name, text in PROSE.items() for words in commands(text)]
    assert len(found) > 100
    assert {words[1] for _, words in found if words[0] == "fastbert"} >= set(get_command(app).commands)
    faults = [(name, shlex.join(words), what) for name, words in found if (what := fault(words))]
    assert faults == []


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("fastbert embed --no-such-option x", "no-such-option"),
        ("fastbert embd x", "no command"),
        ("fastbert bench --compere OLD.csv NEW.csv", "No such option"),
        ("fastbert embed --threads none x", "integer"),
        ("fastbert pretrain --data a.txt --out OUT --objective mlm+nps", "objective"),
        ("fastbert finetune classification --train t.csv --out OUT --batch-size 1 --batch-tokens 2", "exclude"),
        ("fastbert finetune clasification --train t.csv --out OUT", "unknown task"),
        ("torchrun --nproc-per-node 8 -m fastbert pretrain --data a.txt --out OUT --strategy fdsp", "strategy"),
        ("fastbert serve MODEL --compat tie", "compat"),
        ("make tset", "no target"),
        ("python -m benchmarks.gpu --drry-run", "has no --drry-run"),
        ("python -m benchmarks.gpus", "no module"),
        ("python -m pytest tests/test_none.py", "does not exist"),
    ],
)
@pytest.mark.usefixtures("parsed_only")
def test_wrong_commands_are_found(command, what):
    [words] = commands(f"```\n{command}   # a comment\n```\n")
    assert what in (fault(words) or "")
    assert commands(f"see `{command}`") == [words]


def test_tree_is_true():
    for name in re.findall(r"\b([a-z_]+/|[a-z_]+\.(?:py|md))(?=\s|,|$)", README.split("## What is where")[1]):
        assert any((ROOT / folder / name).exists() for folder in FOLDERS), name


def test_named_files_exist():
    paths = {
        (name, path)
        for name, text in PROSE.items()
        for path in re.findall(r"`((?:fastbert|tests|csrc|benchmarks|examples|docs)/[\w./-]*)`", text)
    }
    assert len(paths) > 40
    built = {"fastbert/_C"}
    assert [found for found in paths if found[1] not in built and not (ROOT / found[1]).exists()] == []


def test_links_outside_of_the_site():
    for name in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", PROSE[name]):
            assert (ROOT / target).exists(), (name, target)


@cache
def messages() -> list[str]:
    """Every text in the code; what is put into it at run time is one NUL."""
    found = []
    for path in [*(ROOT / "fastbert").rglob("*.py"), ROOT / "setup.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def is_said(quoted: str) -> bool:
    """Whether the code has a message with these words; … stands for what differs."""
    pattern = re.compile(".*".join(map(re.escape, quoted.split("…"))), re.DOTALL)
    return any(pattern.search(message) for message in messages())


def test_quoted_errors_exist():
    quoted = re.findall(r"^### (.+)$", PAGES["docs/guides/troubleshooting.md"], re.MULTILINE)
    assert len(quoted) > 25
    assert [text for text in quoted if not is_said(text.strip())] == []
    assert not is_said("texts are longer than max_seq_lenght")
    assert not is_said("model … was not lost")


class Page(HTMLParser):
    """The ids of a page, its links, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids.add(given.get("id", ""))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        self.loads += [given[name] for name in ("src", "href") if name in given and tag not in ("a", "base")]


def site_faults(site: Path) -> list[str]:
    """Links and anchors that lead nowhere, and whatever is loaded from elsewhere."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    found = []
    for path, page in pages.items():
        name = path.relative_to(site).as_posix()
        found += [f"{name} loads {link}" for link in page.loads if re.match(r"(\w+:)?//", link)]
        if name == "404.html":  # its links are absolute
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = path if not parts.path else Path(os.path.normpath(path.parent / unquote(parts.path)))
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                found.append(f"{name}: {link} leads nowhere")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                found.append(f"{name}: {link} has no such anchor")
    for style in site.rglob("*.css"):
        found += [f"{style.name} loads {m}" for m in re.findall(r"url\(\s*['\"]?(?:\w+:)?//[^)]*", style.read_text())]
    return found


# What docs/hooks.py reads from the code: an option of every command, a field of every dataclass of options.
WRITTEN_BY_HOOKS = {
    "cli.html": ["--compare", "--resume", "--max-batch-tokens", "--no-measure", "--layers", "--lr", "--objective"],
    "train.html": ["micro_tokens", "text_column", "whole_word"],
    "serve.html": ["max_queue_tokens"],
    "models.html": ["num_labels", "hidden_size", "embedding_size", "relative_attention_num_buckets", "n_layers"],
}


def test_site(tmp_path):
    """It builds without a warning, loads nothing from elsewhere, leads nowhere wrong; all public names are in it."""
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert site_faults(site) == []
    documented = {i.rpartition(".")[2] for path in site.rglob("*.html") for i in Page(path.read_text()).ids if "." in i}
    public = {*fastbert.__all__, *fastbert.models.__all__, *fastbert.ops.__all__} - {"OPS"}
    assert public - documented == set()
    for page, words in WRITTEN_BY_HOOKS.items():
        text = (site / "reference" / page).read_text()
        assert [word for word in words if f"<code>{word}</code>" not in text] == [], page
    index = json.loads((site / "search" / "search_index.json").read_text())
    pages = {entry["location"].split("#")[0] for entry in index["docs"]}
    assert pages == {path.relative_to(DOCS).with_suffix(".html").as_posix() for path in GUIDES}


@pytest.mark.parametrize(
    ("html", "what"),
    [
        ('<a href="b.html#there">', None),
        ('<a href="b.html#gone">', "no such anchor"),
        ('<a href="c.html">', "leads nowhere"),
        ('<a href="#gone">', "no such anchor"),
        ('<a href="https://elsewhere.example">', None),
        ('<script src="https://elsewhere.example/x.js"></script>', "loads"),
        ('<link rel="stylesheet" href="//elsewhere.example/x.css">', "loads"),
    ],
)
def test_site_faults_are_found(html, what, tmp_path):
    (tmp_path / "a.html").write_text(html)
    (tmp_path / "b.html").write_text('<h1 id="there">')
    faults = site_faults(tmp_path)
    assert faults == [] if what is None else what in faults[0]
