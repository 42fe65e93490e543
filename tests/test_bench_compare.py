"""One run's report, and what another run is held against."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace

import numpy as np
import pytest
import typer
from rich.console import Console

from benchmarks import __main__ as suite
from benchmarks import compare, encoder, harness, page, plots, providers


def rows_of(slower: float = 1.0, noise: float = 0.02) -> list[harness.Row]:
    """Rows of two providers and their base over twelve rounds; the second provider slowed down."""
    rng = np.random.default_rng(int(1000 * slower))
    rows = []
    minute = 1 + rng.random(12)  # what else the machine does hits all alike
    for name, ms in {
        "sentence-transformers": 30.0,
        "fastbert": 5.0,
        "fastbert-bf16": 3.0 * slower,
        "ctranslate2": 4.0,
    }.items():
        times = (ms * minute * (1 + noise * rng.standard_normal(12))).tolist()
        p50, p20, p80 = harness.percentiles(times)
        rows.append(
            harness.Row(
                "encode", "query-64x900", name, "throughput", providers.dtype_of(name), p50, p20, p80, 1.0, 0.1, 50.0,
                harness.fast_tenth(times), *harness.times_base((minute * 30).tolist(), times), copy_gb_s=20.0,
                peak_tflop_s=0.3, samples=harness.joined(times), device="cpu", isa="avx2", load=0.1, commit="abc",
            )
        )  # fmt: skip
    return rows


def test_a_slower_machine_is_no_regression_a_slower_engine_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    paths = [
        harness.write(rows_of(), "old"),
        harness.write(rows_of(1.0001), "same"),
        harness.write(rows_of(1.3), "new"),
    ]
    old, same, new = (compare.read(path) for path in paths)
    assert not any(change.regressed for change in compare.compare(old, same))
    worst, *others = compare.compare(old, new)
    assert worst.key[2] == "fastbert-bf16"
    assert worst.regressed
    assert worst.relative
    assert worst.times == pytest.approx(1.3, rel=0.05)
    assert not any(change.regressed for change in others)
    assert suite.show_changes(paths[0], paths[1]) == 0
    assert "3 of 3 ratios agree within 10 %" in capsys.readouterr().out
    assert suite.show_changes(paths[0], paths[2]) == 1


def test_tables_fit_a_terminal_of_80_columns():
    rows = [replace(row, case="passage-96x10082") for row in rows_of()]
    rows += [replace(row, backend="sentence-transformers-bf16", times_low=1.0, times_base=13.33) for row in rows]
    told = io.StringIO()
    Console(file=told, width=80).print(encoder.tables(rows))
    lines = told.getvalue().splitlines()
    assert "passage, throughput: 96 texts of 105 tokens" in lines[0]
    assert "sentence-transformers-bf16" in told.getvalue()
    assert "~13.33" in told.getvalue()
    assert "\N{HORIZONTAL ELLIPSIS}" not in told.getvalue()
    assert max(map(len, lines)) <= 80


def test_a_slower_list_is_found_among_hundreds_of_rows():
    rng = np.random.default_rng(0)
    keys = [("encode", f"list-{i}", "fastbert", "throughput", "int8") for i in range(200)]
    old, new = ({key: (5 * (1 + 0.02 * rng.standard_normal(4))).tolist() for key in keys} for _ in range(2))
    assert not any(change.regressed for change in compare.compare(old, new))
    new[keys[7]] = [1.3 * ms for ms in new[keys[7]]]
    assert [change.key for change in compare.compare(old, new) if change.regressed] == [keys[7]]


def test_what_is_no_file_of_rows_is_said(tmp_path):
    with pytest.raises(typer.BadParameter, match=r"there is no file .*absent\.csv"):
        suite.show_changes(tmp_path / "absent.csv", tmp_path / "absent.csv")


def test_a_run_that_was_more_often_slow_is_no_regression():
    key = ("gelu", "here", "native", "training", "float32")
    fast, slow = np.linspace(1.0, 1.02, 20).tolist(), np.linspace(1.3, 1.32, 20).tolist()
    (change,) = compare.compare({key: fast + slow[:10]}, {key: fast[:10] + slow})
    assert change.times < 1.05
    assert not change.regressed
    (change,) = compare.compare({key: fast}, {key: slow})
    assert change.regressed


def test_few_rounds_or_noise_prove_nothing():
    key = ("encode", "query-1x9", "fastbert", "batch1", "float32")
    (change,) = compare.compare({key: [1.0, 1.3, 1.2]}, {key: [1.4, 1.6, 1.3]})
    assert not change.regressed
    (change,) = compare.compare({key: [1.0, 1.0]}, {key: [1.5, 1.5]})
    assert not change.regressed, "two samples know no spread"
    assert compare.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_rows_without_samples_say_what_to_do(tmp_path):
    with next(harness.COMMITTED.glob("ops-*.csv")).open(newline="") as file:
        rows = [{**row, "samples": ""} for row in csv.DictReader(file)]
    old = tmp_path / "old.csv"
    with old.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(ValueError, match="samples"):
        compare.read(old)


def test_slow_minutes_leave_ratios_as_they_are():
    fast, slow = [2.0] * 8, [2.0, 2.0, 2.0, 9.0] * 2  # slow for one of the two alone
    assert harness.times_base(slow * 3, [1.0] * 24) == (2.0, 2.0, 2.0)
    found = harness.times_base([*fast, *fast, *slow], [0.5 if i < 8 else 1.0 for i in range(24)])
    assert found == (round(2.0 * 2 ** (8 / 12), 3), 2.0, 4.0)
    assert np.isnan(harness.times_base(None, [1.0])).all()
    assert np.isnan(harness.times_base([2.0], [1.0])).tolist() == [False, True, True]


def test_a_state_that_few_rounds_saw_does_not_decide_a_ratio():
    """A machine that is fast now and then, by more for one of the two."""
    always = ([1.0] * 24, [0.5] * 24)
    seldom = ([0.9 if i % 12 == 4 else 1.0 for i in range(24)], [0.35 if i % 12 == 4 else 0.5 for i in range(24)])
    (old, *_), (new, *_) = (harness.times_base(*sides) for sides in (always, seldom))
    assert 1.0 < new / old < harness.AGREE
    assert harness.fast_half([3.0]) == pytest.approx(3.0)
    assert harness.fast_half([8.0, 2.0, 50.0, 60.0]) == pytest.approx(4.0)
    assert harness.fast_half([2.0, 50.0, 60.0]) == pytest.approx(2.0)


def test_unsteady_ratios_are_marked_not_hidden():
    assert [harness.mark(2.0, 2.1), harness.mark(2.0, 2.3), harness.mark(np.nan, np.nan)] == ["", "~", ""]
    key = ("encode", "query-1x9", "fastbert", "batch1", "float32")
    base = ("encode", "query-1x9", "sentence-transformers", "batch1", "float32")
    steady = {key: [1.0] * 9, base: [6.0] * 9}
    moving = {key: [1.0] * 5 + [1.3] * 4, base: [7.2] * 9}
    (ratio,) = compare.ratios(steady, moving)
    assert (ratio.old, ratio.new, ratio.steady) == (6.0, 7.2, False)
    told = compare.agreement([ratio])
    assert told.startswith("0 of 1 ratios agree within 10 %\n")
    assert "query-1x9 fastbert batch1 float32: 6.00 then, 7.20 now (~: unsteady within a run)" in told
    assert compare.agreement(compare.ratios(steady, steady)) == "1 of 1 ratios agree within 10 %"


def test_the_page_says_where_a_peer_wins_and_needs_no_other_file(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    harness.write(rows_of(), "encoder-x")
    rows = page.read(tmp_path)
    assert suite.report(tmp_path)
    text = (tmp_path / "index.html").read_text("utf-8")
    assert "float32, throughput, query texts, 64 of 14 tokens: ctranslate2 is 1.2" in text
    assert "bfloat16, throughput" not in text
    slow = {"op": "gelu", "case": "mix", "mode": "forward", "dtype": "float32"}
    pair = [{**slow, "backend": "native", "ms_p50": "3"}, {**slow, "backend": "reference", "ms_p50": "2"}]
    assert page.peer_wins(pair) == ["float32, forward, gelu mix: reference is 1.50 times as fast as native"]
    assert text.count("data:image/svg+xml;base64,") >= 4
    assert not re.search(r"(src|href|srcset)=.?(http|[a-z]+\.)", text)
    assert (tmp_path / "peers.svg").exists()
    assert len(plots.roofline(rows, plots.THEMES["dark"]).axes) == 1, "no empty panel where no op was measured"
    assert not suite.report(tmp_path / "empty")
