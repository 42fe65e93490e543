"""Real English prose for pretraining runs, out of Debian's packages: Jane Austen's novels, two manuals.

    python -m benchmarks.corpora FOLDER

`FASTBERT_CORPUS` names a folder of texts to use instead. Nothing of it is stored in the repository: licences differ.
The files are prose as `fastbert pretrain --split-sentences` reads it: a blank line between paragraphs, two between
documents (chapters, pages).
"""

from __future__ import annotations

import bz2
import lzma
import os
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

PACKAGES = {"austen": "r-cran-janeaustenr", "python": "python3.11-doc", "postgresql": "postgresql-doc-15"}
PROSE_WORDS, PROSE_SHARE = 8, 0.85  # words of a paragraph at least; share of its characters that are letters or spaces


def corpus(folder: Path) -> Path:
    """A folder of texts: `FASTBERT_CORPUS`, or `folder`, which is filled if it is empty."""
    if given := os.environ.get("FASTBERT_CORPUS"):
        return Path(given)
    for name, package in PACKAGES.items():
        path = folder / f"{name}.txt"
        if not path.is_file():
            root = _unpacked(package, folder / "packages")
            documents = _novels(root) if name == "austen" else _pages(root)
            text = "\n\n\n".join("\n\n".join(paragraphs) for paragraphs in documents if paragraphs)
            scratch = path.with_suffix(".partial")
            scratch.write_text(text + "\n", encoding="utf-8")
            os.replace(scratch, path)
    return folder


def _unpacked(package: str, folder: Path) -> Path:
    """The files of a Debian package, by the system's own tools."""
    root = folder / package
    if not root.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", package], cwd=folder, check=True, capture_output=True)
        (archive,) = folder.glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "-x", archive.name, package], cwd=folder, check=True)
    return root


def _novels(root: Path) -> Iterator[list[str]]:
    """Chapters of the six novels."""
    (path,) = root.rglob("data/Rdata.rdb")
    for lines in _r_strings(path.read_bytes()):
        chapters: list[list[str]] = [[]]
        for line in [*lines, ""]:
            if re.match(r"\s*(chapter|volume)\b", line, re.IGNORECASE):
                chapters.append([])
            else:
                chapters[-1].append(line.strip().replace("_", ""))
        for chapter in chapters[1:]:
            paragraphs = "\n".join(chapter).split("\n\n")
            yield [" ".join(p.split()) for p in paragraphs if p.strip() and p.strip() != "THE END"]


def _r_strings(data: bytes) -> Iterator[list[str]]:
    """Long character vectors of a lazy-load database of R (records of a length, a letter for the codec, and data)."""
    place = 0
    while place < len(data):
        codec = data[place + 4 : place + 5]
        if codec in (b"2", b"Z"):
            stream = bz2.BZ2Decompressor() if codec == b"2" else lzma.LZMADecompressor(lzma.FORMAT_AUTO)
            first = place + 5
        else:
            stream, first = zlib.decompressobj(), place + 4
        record = stream.decompress(data[first:])
        place = len(data) - len(stream.unused_data)
        strings, at = [], 0
        for match in re.finditer(rb"\x00[\x00-\xff]\x00\x09(?=[\x00-\xff]{4})", record):  # the header of one string
            if match.start() < at:
                continue
            (length,) = struct.unpack(">i", record[match.end() : match.end() + 4])
            at = match.end() + 4 + max(0, length)
            strings.append(record[match.end() + 4 : at].decode("utf-8", "replace"))
        if len(strings) > 1000:
            yield strings


class _Paragraphs(HTMLParser):
    """Texts of paragraphs and list items; code and tables are left out."""

    BLOCKS = frozenset(("p", "li", "dd", "dt", "td", "h1", "h2", "h3", "h4", "div", "section"))
    SKIPPED = frozenset(("pre", "script", "style", "table", "nav"))

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = [""]
        self.depth = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.depth += tag in self.SKIPPED
        if tag in self.BLOCKS:
            self.found.append("")

    def handle_endtag(self, tag: str) -> None:
        self.depth = max(0, self.depth - (tag in self.SKIPPED))
        if tag in self.BLOCKS:
            self.found.append("")

    def handle_data(self, data: str) -> None:
        if not self.depth:
            self.found[-1] += data


def _pages(root: Path) -> Iterator[list[str]]:
    """Prose of HTML pages, each paragraph once."""
    seen: set[str] = set()
    for path in sorted(root.rglob("*.html")):
        if path.is_symlink():
            continue
        parser = _Paragraphs()
        parser.feed(path.read_text(encoding="utf-8", errors="replace"))
        page = []
        for text in (" ".join(found.replace("\u00b6", " ").split()) for found in parser.found):
            if text not in seen and _is_prose(text):
                seen.add(text)
                page.append(text)
        yield page


def _is_prose(text: str) -> bool:
    letters = sum(c.isalpha() or c.isspace() for c in text)
    return len(text.split()) >= PROSE_WORDS and letters > PROSE_SHARE * len(text)


if __name__ == "__main__":
    for found in sorted(corpus(Path(sys.argv[1])).glob("*.txt")):
        words = len(found.read_text(encoding="utf-8").split())
        print(f"{found}: {found.stat().st_size:,} bytes, {words:,} words")
