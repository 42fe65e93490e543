"""Every golden case against live servers of every kind of model; the patterns against answers that must not pass."""

from __future__ import annotations

import pytest

from tests.conformance.patterns import misfit
from tests.conformance.runner import Target, cases
from tests.serving import HEADS, live, tiny_model

KINDS = ("embedding", *HEADS, "splade")


@pytest.fixture(scope="module")
def servers(minilm, tmp_path_factory):
    folders = {kind: tiny_model(kind, tmp_path_factory.mktemp(kind), minilm) for kind in KINDS[1:]}
    folders = {"sentence-transformers/all-MiniLM-L6-v2": minilm, **folders}
    names = KINDS
    limits = {"max_client_batch_size": 8, "warmup": False}
    with (
        live(folders, "secret", served_model_name=names, **limits) as several,
        live(dict(list(folders.items())[:1]), compat="tei", **limits) as alone,
    ):
        yield {"openai": several.address, "tei": alone.address}


@pytest.mark.parametrize(("kind", "compat"), [*((kind, "openai") for kind in KINDS), ("embedding", "tei")])
def test_conformance(servers, kind, compat):
    alone = compat == "tei"
    target = Target(servers[compat], None if alone else "secret", None if alone else kind, compat)
    assert target.learn() == kind
    found = list(target.run(kind))
    wrong = [f"{case.name}: {message}" for case, message in found if message]
    assert not wrong, "\n".join(wrong)
    assert len(found) > 25


def test_every_case_is_run():
    assert {case.kind for case in cases()} == {None, *KINDS}
    assert {case.compat for case in cases()} == {None, "openai", "tei"}


@pytest.mark.parametrize(
    ("found", "pattern"),
    [
        ({"a": 1}, {"a": 1, "b": 2}),
        ({"a": 1, "b": 2}, {"a": 1}),
        ([1, 2], [1]),
        (1, 2),
        (True, 1),
        (1.0, {"$": "integer"}),
        (True, {"$": "number"}),
        ("abc", {"$": "regex", "value": "b"}),
        ([0.6, 0.7], {"$": "vector", "unit": True}),
        ([0.6, 0.8], {"$": "vector", "unit": True, "length": 3}),
        ([float("nan")], {"$": "vector"}),
        ("AAAAAA==", {"$": "base64", "length": 2}),
        ([0.1, 0.2], {"$": "close", "value": [0.1, 0.3]}),
        ([{"s": 1}, {"s": 2}], {"$": "list", "descending": "s"}),
        ([1], {"$": "list", "of": {"$": "string"}}),
        ({}, {"$": "object", "with": {"a": {"$": "any"}}}),
    ],
)
def test_patterns_refuse(found, pattern):
    assert misfit(found, pattern) is not None
