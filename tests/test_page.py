"""The page at /: one file that needs nobody else, checked as text and, where there is a Chromium, as seen."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import re
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import servers
from fastbert import Embedder
from fastbert.serve import docs
from tests.serving import live, tiny_model

PAGE = Path(servers.__file__).parent.parent / "fastbert" / "serve" / "page" / "index.html"
VOID = {"meta", "link", "input", "br", "img"}


class Document(HTMLParser):
    """Elements with their attributes and texts; tags that are not closed, or closed twice, are noted."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.unbalanced: list[str] = []
        self.texts: dict[str, str] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]] = self.texts.get(self.open[-1], "") + data

    def attribute(self, name: str) -> list[str]:
        return [attributes[name] or "" for _, attributes in self.elements if name in attributes]


def digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def faults(text: str) -> list[str]:
    """What is wrong with a page."""
    document, found = Document(text), []
    script, style = document.texts.get("script", ""), document.texts.get("style", "")
    policy = next((a.get("content") or "" for t, a in document.elements if a.get("http-equiv")), "")
    for kind, content in (("script", script), ("style", style)):
        if f"{kind}-src '{digest(content)}'" not in policy:
            found.append(f"the policy does not have the {kind}'s hash: {kind}-src '{digest(content)}'")
    for rule in ("default-src 'none'", "connect-src 'self'", "base-uri 'none'", "form-action 'none'"):
        if rule not in policy:
            found.append(f"the policy lacks {rule}")
    if "unsafe" in policy or "*" in policy.replace("'sha256-", ""):
        found.append("the policy has a hole")
    if sum(tag == "script" for tag, _ in document.elements) != 1:
        found.append("not one script")
    for name in ("src", "href", "action", "srcset", "data"):
        found += [
            f"{name} leads away: {v}" for v in document.attribute(name) if re.match(r"\s*(\w+:)?//|\w+:(?!image/)", v)
        ]
    found += [f"loads a resource: {m}" for m in re.findall(r"@import|url\(\s*['\"]?(?!data:)[^)]*", style)]
    for _, attributes in document.elements:
        found += [f"an attribute that the policy blocks: {name}" for name in attributes if re.match(r"on|style$", name)]
    risky = r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function|DOMParser|Contextual|srcdoc"
    found += [f"parses text as code: {m}" for m in re.findall(risky, script)]
    found += [
        f"an address in the script: {m}" for m in re.findall(r"(?:https?|wss?):\S+", script) if "www.w3.org" not in m
    ]
    ids = document.attribute("id")
    found += [f"two elements have the id {i}" for i in set(ids) if ids.count(i) > 1]
    found += [
        f"the script asks for #{i}, which is not there" for i in re.findall(r'\$\("([\w-]+)"\)', script) if i not in ids
    ]
    found += [f"a label for #{i}, which is not there" for i in document.attribute("for") if i not in ids]
    if document.unbalanced or document.open:
        found.append(f"unbalanced tags: {document.unbalanced + document.open}")
    if "lang" not in dict(document.elements[0][1]) or not document.texts.get("title"):
        found.append("no language or no title")
    return found


def test_one_file_that_needs_nobody():
    assert faults(PAGE.read_text(encoding="utf-8")) == []
    assert PAGE.stat().st_size < 64_000


def docs_faults(html: str, paths: set[str]) -> list[str]:
    """What is wrong with the page of the routes: it loads nothing, runs nothing, names every route."""
    document = Document(html)
    tags = {tag for tag, _ in document.elements}
    found = [f"a {tag} element" for tag in tags & {"script", "link", "img", "iframe", "form", "base"}]
    found += [f"leads away: {v}" for v in document.attribute("href") if "//" in v or ":" in v]
    found += [f"loads a resource: {m}" for m in re.findall(r"@import|url\(", document.texts.get("style", ""))]
    named = set(re.findall(r"<b>\w+</b> <code>([^<]*)</code>", html))
    found += [f"{path} is missing" for path in paths - named]
    if document.unbalanced or document.open:
        found.append(f"unbalanced tags: {document.unbalanced + document.open}")
    return found


def test_docs_need_no_network(minilm: Path):
    with live({"minilm": minilm}, warmup=False) as server:
        with urllib.request.urlopen(f"{server.address}/docs", timeout=20) as answer:
            policy, html = answer.headers["content-security-policy"], answer.read().decode()
        with urllib.request.urlopen(f"{server.address}/openapi.json", timeout=20) as answer:
            paths = set(json.load(answer)["paths"])
    assert "default-src 'none'" in policy
    assert docs_faults(html, paths) == []
    assert "encoding_format" in html
    assert "Retry-After" in html
    for what, spoilt in (
        ("script", html.replace("</body>", '<script src="//cdn.example/swagger-ui.js"></script></body>')),
        ("leads away", html.replace('href="./"', 'href="https://elsewhere.example"')),
        ("/v2/embed is missing", html.replace("/v2/embed", "/v3/embed")),
        ("unbalanced", html.replace("</table>", "", 1)),
    ):
        assert any(what in fault for fault in docs_faults(spoilt, paths)), what


def test_docs_show_markup_as_text():
    operation = {"tags": ["<t>"], "description": "<img src=x> `<b>`"}
    document = {"info": {"title": "<i>", "version": "1"}, "paths": {"/<p>": {"get": operation}}}
    html = docs.page(document)
    assert not re.search(r"<img|<i>|<t>|<p>`|/<p>", html)
    assert "<code>&lt;b&gt;</code>" in html


@pytest.mark.parametrize(
    ("what", "spoil"),
    [
        ("hash", lambda t: t.replace('"use strict"', '"use  strict"')),
        ("hash", lambda t: t.replace("--page: #f6f7f9", "--page: #f6f7f8")),
        ("policy lacks connect-src", lambda t: t.replace("connect-src 'self'", "connect-src https:")),
        ("hole", lambda t: t.replace("img-src data:", "img-src *")),
        ("not one script", lambda t: t.replace("</head>", "<script></script></head>")),
        ("leads away", lambda t: t.replace('href="docs"', 'href="//elsewhere.example/docs"')),
        ("leads away", lambda t: t.replace('href="docs"', 'href="https://elsewhere.example"')),
        ("resource", lambda t: t.replace("body {", "body { background: url(x.png);")),
        ("policy blocks", lambda t: t.replace("<main>", '<main onclick="x()">')),
        ("policy blocks", lambda t: t.replace("<main>", '<main style="color:red">')),
        ("parses text", lambda t: t.replace("node.append(", "node.innerHTML = (", 1)),
        ("address", lambda t: t.replace('fetch("stats"', 'fetch("https://elsewhere.example/stats"')),
        ("two elements", lambda t: t.replace("<main>", '<main id="tiles">')),
        ("asks for", lambda t: t.replace('id="tiles"', 'id="tile"')),
        ("unbalanced", lambda t: t.replace("</footer>", "")),
    ],
)
def test_faults_are_found(what: str, spoil: Callable[[str], str]):
    text = PAGE.read_text(encoding="utf-8")
    spoilt = spoil(text)
    assert spoilt != text
    assert any(what in fault for fault in faults(spoilt)), faults(spoilt)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
in_chromium = pytest.mark.skipif(
    not (CHROMIUM and DRIVER and importlib.util.find_spec("selenium")),
    reason="needs a Chromium, its driver and selenium: apt install chromium chromium-driver; pip install selenium",
)
TEXTS = ["A ferry crosses the bay.", "The boat did not sail.", "Two eggs and butter."]
KEY = "a key of the test"
QUICK = ("--threads", "1", "--no-warmup", "--drain-grace-s", "0")


@pytest.fixture(scope="module")
def server(minilm: Path) -> Iterator[servers.Server]:
    with servers.start("fastbert", str(minilm), *QUICK, "--api-key", KEY, served_name="minilm") as server:
        yield server


class Browser:
    """A headless Chromium that can reach this machine only."""

    def __init__(self) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--window-size=1280,900",
        ):
            options.add_argument(argument)
        options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))

    def open(self, url: str) -> None:
        self.driver.get(url)
        self.driver.execute_script("sessionStorage.clear()")
        self.driver.get(url)
        self.driver.get_log("browser")

    def js(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(f"return {code}", *arguments)

    def until(self, code: str, *arguments: Any) -> Any:
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, 20, 0.05).until(lambda _: self.js(code, *arguments), f"never: {code}")

    def all(self, css: str) -> list[Any]:
        return self.driver.find_elements("css selector", css)

    def one(self, css: str) -> Any:
        return self.driver.find_element("css selector", css)

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def scheme(self, name: str) -> None:
        feature = {"name": "prefers-color-scheme", "value": name}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def offline(self, wanted: bool) -> None:
        conditions = {"offline": wanted, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.driver.execute_cdp_cmd("Network.emulateNetworkConditions", conditions)

    def use_key(self, key: str) -> None:
        self.until("!document.getElementById('key').hidden")
        self.one("#key-value").clear()
        self.one("#key-value").send_keys(key)
        self.one("#key button").click()

    def run(self, tab: str, *fields: str) -> None:
        """Fill the fields of a tab, send, wait for what comes."""
        self.one(f"#tab-{tab}").click()
        for area, text in zip(self.all("#task input, #task textarea"), fields, strict=True):
            self.js("(arguments[0].value = arguments[1])", area, text)
        self.js("document.querySelector('#task .result').replaceChildren()")
        self.one("#task button.go").click()
        self.until("document.querySelector('#task .result > :not(.hint)') !== null")

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def addresses(self) -> set[str]:
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.driver.quit()


@pytest.fixture
def page(chromium: Browser, server: servers.Server) -> Browser:
    """The page, open, with the key given."""
    chromium.resize(1280, 900)
    chromium.open(server.url("/"))
    chromium.until("document.getElementById('status').textContent === 'ready'")
    chromium.js("(sessionStorage.setItem('fastbert-key', arguments[0]), apiKey = arguments[0])", KEY)
    return chromium


@in_chromium
class TestSeen:
    def test_status_and_live_numbers(self, page, server):
        names = [tile.text for tile in page.all("#tiles dt")]
        assert "Tokens a second" in names
        assert "minilm" in page.one("#facts").text
        assert "384" in page.one("#facts").text
        for _ in range(3):
            page.run("embed", "\n".join(TEXTS))
        page.until("/[1-9]/.test(document.querySelector('#tiles > div dd').textContent)")
        page.until("document.querySelector('#chart-latency .trace').getAttribute('d').includes('L')")
        page.until("document.querySelectorAll('#chart-batches .bar').length > 0")
        assert "p99" in page.one("#chart-latency").get_attribute("aria-label")
        assert page.complaints() == []
        assert all(a.startswith((server.url("/"), "data:")) for a in page.addresses()), page.addresses()

    def test_embed_shows_the_vectors(self, page, minilm):
        page.run("embed", "\n".join(TEXTS))
        vectors = Embedder.from_pretrained(minilm, "float32").encode(TEXTS, normalize_embeddings=True)
        assert [head.text for head in page.all(".vector h3")] == TEXTS
        for line, vector in zip(page.all(".vector p"), vectors, strict=True):
            assert line.text.startswith("384 dimensions, length 1.000")
            shown = [float(number) for number in re.findall(r"-?\d\.\d{4}", line.text)]
            np.testing.assert_allclose(shown, vector[:6], atol=6e-5)
        assert "round trip" in page.one(".timing").text
        assert "compute" in page.one(".timing").text

    def test_compare_is_a_heat_map(self, page, minilm):
        page.run("compare", "\n".join(TEXTS))
        vectors = Embedder.from_pretrained(minilm, "float32").encode(TEXTS, normalize_embeddings=True)
        cells = np.array([float(cell.text) for cell in page.all("table.heat td:not(.corner)")]).reshape(3, 3)
        np.testing.assert_allclose(cells, vectors @ vectors.T, atol=0.0051)
        colours = page.js(
            "[...document.querySelectorAll('table.heat tbody td')].map(c => getComputedStyle(c).backgroundColor)"
        )
        assert colours[0] == colours[4] == colours[8]
        assert colours[0] not in (colours[1], colours[2])

    def test_rerank_puts_the_best_first(self, page, minilm):
        page.run("rerank", "What does the recipe need?", "\n".join(TEXTS))
        embedder = Embedder.from_pretrained(minilm, "float32")
        scores = embedder.similarity(embedder.encode(["What does the recipe need?"]), embedder.encode(TEXTS))[0]
        assert [line.text for line in page.all(".ranked span")] == [TEXTS[i] for i in scores.argsort(descending=True)]
        assert float(page.one(".ranked b").text) == pytest.approx(float(scores.max()), abs=6e-5)

    def test_another_model_has_its_own_facts_and_tabs(self, chromium, minilm, tmp_path):
        reranker = str(tiny_model("reranker", tmp_path / "reranker", minilm))
        names = (*QUICK, "--served-model-name", "ranks")
        with servers.start("fastbert", str(minilm), reranker, *names, served_name="embeds") as server:
            chromium.open(server.url("/"))
            chromium.until("document.getElementById('facts').textContent.includes('384 dimensions')")
            chromium.one("#model option:nth-child(2)").click()
            assert "reranker" in chromium.one("#facts").text
            assert [tab.text for tab in chromium.all("#tabs button")] == ["Rerank"]
            chromium.run("rerank", "a query", "\n".join(TEXTS))
            assert sorted(line.text for line in chromium.all(".ranked span")) == sorted(TEXTS)

    def test_texts_are_texts(self, page):
        evil = '<img src=x onerror="document.title=\'taken\'"><script>document.title="taken"</script>'
        for tab, fields in (("embed", (evil,)), ("compare", (evil,)), ("rerank", (evil, evil))):
            page.run(tab, *fields)
            assert evil in page.one("#task .result").text or evil in page.one("#task .result th").get_attribute("title")
            assert page.all("#task img, #task script") == []
        assert page.driver.title == "fastbert"
        assert page.complaints() == []

    def test_errors_are_the_servers_words(self, page):
        page.run("embed", "")
        assert "cannot be empty" in page.one("#task [role=alert]").text

    def test_the_key_is_asked_for_and_checked(self, chromium, server):
        chromium.open(server.url("/"))
        chromium.until("document.getElementById('status').textContent === 'ready'")
        chromium.run("embed", TEXTS[0])
        assert "asks for an API key" in chromium.one("#task [role=alert]").text
        chromium.use_key("wrong")
        chromium.run("embed", TEXTS[0])
        assert "does not know" in chromium.one("#task [role=alert]").text
        chromium.use_key(KEY)
        chromium.run("embed", TEXTS[0])
        assert chromium.all(".vector")

    def test_keys_move_between_tabs_and_send(self, page):
        from selenium.webdriver.common.keys import Keys

        page.one("#tab-embed").click()
        page.one("#tab-embed").send_keys(Keys.ARROW_RIGHT)
        assert page.driver.switch_to.active_element.get_attribute("id") == "tab-compare"
        assert page.one("#tab-compare").get_attribute("aria-selected") == "true"
        page.one("#task textarea").send_keys(Keys.CONTROL, Keys.ENTER)
        page.until("document.querySelector('table.heat') !== null")

    @pytest.mark.parametrize("width", [320, 390, 768, 1280])
    def test_nothing_is_wider_than_the_window(self, page, width):
        page.resize(width, 800)
        page.run("compare", "\n".join(TEXTS * 6))
        assert page.js("document.documentElement.scrollWidth") <= width

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_everything_can_be_read(self, page, scheme):
        page.scheme(scheme)
        page.run("compare", "\n".join(TEXTS))
        worst = page.js(CONTRAST)
        assert worst["ratio"] >= 4.5, worst

    def test_a_server_that_is_gone_is_shown_and_found_again(self, page):
        page.offline(True)
        page.until("document.getElementById('status').textContent === 'unreachable'")
        page.run("embed", TEXTS[0])
        assert "did not answer" in page.one("#task [role=alert]").text
        page.offline(False)
        page.until("document.getElementById('status').textContent === 'ready'")


# The least contrast (WCAG 2) of any text with what lies behind it, colours read back from a canvas.
CONTRAST = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = rgb => {
    const [r, g, b] = rgb.map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = node => {
    const [r, g, b, a] = rgba(getComputedStyle(node).backgroundColor);
    if (a === 255 || !node.parentElement) return [r, g, b];
    return behind(node.parentElement).map((v, i) => [r, g, b][i] * a / 255 + v * (1 - a / 255));
  };
  let worst = { ratio: 99 };
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some(c => c.nodeType === 3 && c.textContent.trim());
    if (!own || !node.checkVisibility() || ["SCRIPT", "NOSCRIPT"].includes(node.tagName)) continue;
    const style = getComputedStyle(node), ink = node.namespaceURI.endsWith("svg") ? style.fill : style.color;
    const [a, b] = [light(rgba(ink).slice(0, 3)), light(behind(node))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < worst.ratio) worst = { ratio, text: node.textContent.slice(0, 40), ink };
  }
  return worst;
})()"""
