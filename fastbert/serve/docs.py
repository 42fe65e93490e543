"""The page at /docs: every route of the OpenAPI document in one file without a script, that needs no network.

FastAPI's own page loads Swagger UI from a CDN: an empty page where a server stands that cannot reach it.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from html import escape
from typing import Any

HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}

_STYLE = """
:root { color-scheme: light dark; --soft: light-dark(#566273, #9aa7b7); --line: light-dark(#dfe3e9, #2b3542);
  --panel: light-dark(#fff, #161c24); --accent: light-dark(#2560c9, #78aaff); }
body { margin: 0 auto; max-width: 980px; padding: 24px; font: 15px/1.5 system-ui, sans-serif;
  background: light-dark(#f6f7f9, #0e1217); color: light-dark(#17202c, #e7ecf2); }
h1 { font-size: 22px; margin: 0; } h2 { font-size: 17px; margin: 32px 0 10px; }
a { color: var(--accent); } p { margin: 6px 0; } p, td, summary { overflow-wrap: anywhere; }
code { font: 13px ui-monospace, Menlo, Consolas, monospace; } .soft { color: var(--soft); }
details { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; margin: 8px 0;
  padding: 10px 14px; }
summary { cursor: pointer; } summary b { display: inline-block; min-width: 46px; color: var(--accent); }
table { border-collapse: collapse; width: 100%; margin: 10px 0 4px; font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: 5px 14px 5px 0; border-top: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; border: 0; } td:first-child { white-space: nowrap; }
"""


def page(document: dict[str, Any]) -> str:
    """HTML of an OpenAPI document: operations by their tag, with the fields of bodies and the statuses of answers."""
    info, tags = document["info"], dict[str, list[str]]()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            tags.setdefault(operation["tags"][0], []).append(_operation(document, method, path, operation))
    sections = "".join(f"<h2>{escape(tag)}</h2>{''.join(found)}" for tag, found in tags.items())
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(info['title'])}: routes</title><style>{_STYLE}</style></head><body>"
        f'<h1>{escape(info["title"])} <span class="soft">{escape(info["version"])}</span></h1>'
        f"<p>{_prose(info.get('description', ''))}</p>"
        '<p><a href="./">Status and try-it</a> · <a href="openapi.json">OpenAPI document</a></p>'
        f"{sections}</body></html>"
    )


def _operation(document: dict[str, Any], method: str, path: str, operation: dict[str, Any]) -> str:
    text = inspect.cleandoc(operation.get("description", ""))
    first, _, rest = text.partition("\n\n")
    fields = [("field", "type", "")]
    content = operation.get("requestBody", {}).get("content", {})
    for body in content.values():
        fields += _fields(document, body["schema"])
    answers = [("status", "answer", "")] + [
        (status, ", ".join(answer.get("content", {})), answer.get("description", ""))
        for status, answer in operation.get("responses", {}).items()
    ]
    more = f"<p>{_prose(rest)}</p>" if rest else ""
    return (
        f"<details><summary><b>{method.upper()}</b> <code>{escape(path)}</code> "
        f'<span class="soft">{_prose(first)}</span></summary>{more}'
        f"{_table(fields) if content else ''}{_table(answers)}</details>"
    )


def _fields(document: dict[str, Any], schema: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(name, type, meaning) of the fields of a body; of each form where it may have several."""
    schema = _resolved(document, schema)
    for form in schema.get("anyOf", schema.get("oneOf", [])):
        yield from _fields(document, form)
    required = schema.get("required", [])
    for name, field in schema.get("properties", {}).items():
        default = "required" if name in required else ""
        if field.get("default") is not None:
            default = f"default `{json.dumps(field['default'])}`"
        meaning = "; ".join(part for part in (field.get("description", "").rstrip("."), default) if part)
        yield name, _type(document, field), meaning


def _type(document: dict[str, Any], schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " | ".join(map(json.dumps, schema["enum"]))
    forms = schema.get("anyOf", schema.get("oneOf", []))
    if forms:
        return " | ".join(dict.fromkeys(_type(document, form) for form in forms))
    if "$ref" in schema:
        return str(schema["$ref"]).rsplit("/", 1)[1]
    kind = str(schema.get("type", "any"))
    return f"{_type(document, schema.get('items', {}))}[]" if kind == "array" else kind


def _resolved(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in schema:
        found: dict[str, Any] = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
        return found
    return schema


def _table(rows: list[tuple[str, str, str]]) -> str:
    head, *body = rows
    lines = "".join(
        f"<tr><td><code>{escape(a)}</code></td><td><code>{escape(b)}</code></td><td>{_prose(c)}</td></tr>"
        for a, b, c in body
    )
    return f"<table><tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>{lines}</table>"


def _prose(text: str) -> str:
    """Text as HTML, what stands between backticks as code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))
