"""Runs the golden cases of `cases/*.json` against a server."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.conformance.patterns import misfit

CASES = Path(__file__).parent / "cases"


@dataclass(frozen=True)
class Case:
    """A request and what must come back.

    Attributes:
        name: of the file and of the case.
        kind: of the model that it needs; None = any.
        compat: the dialect of the server's /v1 errors that it holds for; None = both.
        model: end of the `model_id` whose very numbers stand in the answer; None = any model.
        request: method, path, and json or body (text), headers.
        response: status, and json (a pattern), body (text), or headers (patterns).
    """

    name: str
    kind: str | None
    compat: str | None
    model: str | None
    request: dict[str, Any]
    response: dict[str, Any]


def cases() -> list[Case]:
    """All cases, file by file."""
    found = []
    for path in sorted(CASES.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        for row in content["cases"]:
            kind, compat = row.get("kind", content.get("kind")), row.get("compat")
            name = f"{path.stem}: {row['name']}"
            found.append(Case(name, kind, compat, row.get("model"), row["request"], row["response"]))
    return found


@dataclass
class Target:
    """A server.

    Attributes:
        url: of its root.
        api_key: sent as a bearer token.
        model: sent as `x-model`, where the server has several.
        compat: dialect of its /v1 errors.
    """

    url: str
    api_key: str | None = None
    model: str | None = None
    compat: str = "openai"
    info: dict[str, Any] = field(default_factory=dict)

    def learn(self) -> str:
        """Read `/info`; the kind of the model."""
        status, _, body = self.send({"method": "GET", "path": "/info"})
        if status != 200:
            raise RuntimeError(f"GET {self.url}/info answered {status}: {body[:200]!r}")
        self.info = json.loads(body)
        ((kind, details),) = self.info["model_type"].items()
        return "splade" if isinstance(details, dict) and details.get("pooling") == "splade" else kind

    def send(self, request: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of an answer."""
        headers = {"accept": "*/*"}
        if self.api_key is not None:
            headers["authorization"] = f"Bearer {self.api_key}"
        if self.model is not None:
            headers["x-model"] = self.model
        data = None
        if "json" in request:
            data = json.dumps(filled(request["json"], self.info)).encode()
            headers["content-type"] = "application/json"
        elif "body" in request:
            data = request["body"].encode()
        headers.update(request.get("headers", {}))
        parts = urlsplit(self.url)
        host, port = parts.hostname or "", parts.port
        if parts.scheme == "https":
            connection: Any = http.client.HTTPSConnection(host, port, timeout=60, context=ssl.create_default_context())
        else:
            connection = http.client.HTTPConnection(host, port, timeout=60)
        try:
            connection.request(request["method"], parts.path.rstrip("/") + request["path"], data, headers)
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def check(self, case: Case) -> str | None:
        """What is wrong with the answer to a case; None = nothing."""
        status, headers, body = self.send(case.request)
        wanted = case.response
        if status != wanted["status"]:
            return f"status is {status}, expected {wanted['status']}: {body[:200]!r}"
        for name, pattern in wanted.get("headers", {}).items():
            if wrong := misfit(headers.get(name), pattern, f"header {name}"):
                return wrong
        if "body" in wanted and body.decode() != wanted["body"]:
            return f"body is {body[:200]!r}, expected {wanted['body']!r}"
        if "bytes" in wanted and len(body) != filled(wanted["bytes"], self.info):
            return f"body has {len(body)} bytes, expected {wanted['bytes']}"
        if "json" in wanted:
            if not headers.get("content-type", "").startswith("application/json"):
                return f"content-type is {headers.get('content-type')!r}, expected application/json"
            return misfit(json.loads(body), filled(wanted["json"], self.info))
        return None

    def run(self, kind: str) -> Iterator[tuple[Case, str | None]]:
        """Every case that this model and dialect are to pass, with what is wrong."""
        for case in cases():
            served = case.model is None or self.info["model_id"].endswith(case.model)
            if served and case.kind in (None, kind) and case.compat in (None, self.compat):
                yield case, self.check(case)


def filled(value: Any, info: dict[str, Any]) -> Any:
    """A case's JSON with what depends on the server.

    `{"$info": name, "plus": n}` is a value of `/info`, `{"$list": value, "times": n}` a list of one value, and
    `{"$text": text, "times": n}` a text over and over.
    """
    if isinstance(value, dict):
        if "$info" in value:
            found = info[value["$info"]]
            return found + value["plus"] if "plus" in value else found
        if "$list" in value:
            return [value["$list"]] * filled(value["times"], info)
        if "$text" in value:
            return value["$text"] * filled(value["times"], info)
        return {key: filled(element, info) for key, element in value.items()}
    return [filled(element, info) for element in value] if isinstance(value, list) else value
