"""Providers take turns: whoever has none is stopped, and nobody outlives the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks import __main__ as suite
from benchmarks import harness, turns


def test_variants_take_turns():
    calls = []
    times = harness.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, warmup=1)
    assert "".join(calls) == "ab" + "ab" + "ba"
    assert [len(t) for t in times.values()] == [2, 2]


def slow_lengths(ms: float):
    """A provider for tests: the vector of a text is its length."""
    if ms < 0:
        raise ValueError("there is no such time")

    def encode(texts):
        if texts == ["fail"]:
            raise KeyError("fail")
        time.sleep(ms / 1e3)
        return np.array([[len(text)] for text in texts], np.float32)

    return encode


def state(pid: int) -> str:
    """R running, S asleep, T stopped, Z dead; nothing where there is no such process."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def wait_for(condition, seconds: float = 60.0) -> bool:
    """Whether it comes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_who_has_no_turn_is_stopped():
    with turns.Provider("quick", slow_lengths, 1.0) as quick, turns.Provider("slow", slow_lengths, 20.0) as slow:
        pids = [quick.process.pid, slow.process.pid]
        assert wait_for(lambda: [state(pid) for pid in pids] == ["T", "T"])
        assert quick.call(["abc", "d"]).tolist() == [[3], [1]]
        assert wait_for(lambda: state(pids[0]) == "T")
        cells = [turns.Cell(["abc"], [quick, slow], ["a"]), turns.Cell(["d", "e"], [quick], ["d"])]
        both, one = turns.take_turns(cells, seconds=0.0)
        assert [len(ms) for ms in both.values()] == [2, 2]
        assert [len(ms) for ms in one.values()] == [2]
        assert min(both["slow"]) >= 20 > min(both["quick"]) >= 1
        with pytest.raises(turns.Failed, match="KeyError: 'fail'"):
            quick.call(["fail"])
        assert quick.call(["ab"]).tolist() == [[2]], "one failure is not the end"
        times = turns.take_turns(cells[:1], seconds=0.0, parts=2)
        assert [len(ms) for ms in times[0].values()] == [4, 4]
        assert [state(pid) for pid in pids] == ["", ""], "each part has processes of its own"
        pids = [quick.process.pid, slow.process.pid]
        assert wait_for(lambda: [state(pid) for pid in pids] == ["T", "T"])
    assert [state(pid) for pid in pids] == ["", ""]
    with pytest.raises(turns.Failed, match="ValueError: there is no such time"):
        turns.Provider("broken", slow_lengths, -1.0)


@linux
def test_suites_take_turns_by_their_shares_of_the_time(monkeypatch):
    """On a clock that providers alone move: a call takes the seconds that its text says."""
    now, order, finished = [0.0], [], {}

    def call(self, cell):
        now[0] += float(cell.given)
        order.append(cell.given)
        return float(cell.given)

    monkeypatch.setattr(turns.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(turns.Provider, "time", call)

    def prepare(options, stack):
        (name, share, *givens) = options
        provider = stack.enter_context(turns.Provider(name, slow_lengths, 1.0, compiles=False))
        cells = [turns.Cell(given, [provider], "", share=float(share)) for given in givens]
        return turns.Suite(cells, 50.0, 2, lambda found: finished.update({name: found}))

    def measured(total):
        now[0], order[:] = 0.0, []
        turns.measure([(prepare, ["short", "1", "1", "2"]), (prepare, ["long", "4", "8", "30"])], total)
        halves = order[: len(order) // 2], order[len(order) // 2 :]
        assert halves[0] == halves[1], "the second part repeats the first"
        return halves[0]

    assert measured(0.0) == ["1", "2", "8", "30"] * 2, "two rounds of each in any case"
    part = measured(1000.0)  # the suites ask for 100 in two parts, and two rounds take more
    assert part == ["1", "2", "8", "30"] * 2
    monkeypatch.setattr(turns, "LEAST", 1)
    part = measured(1000.0)
    assert [part.count(given) for given in ("1", "2", "8", "30")] == [3, 2, 2, 1]
    assert now[0] >= 100
    assert 50 <= sum(map(float, part)) < 60
    assert part[:5] == ["1", "2", "8", "30", "1"], "who is furthest behind comes next"
    assert len(measured(60.0)) == 4, "less where the whole run may not take so long"
    assert finished["short"][0]["short"] == [1.0] * 2, "a sample of each round of both parts"


HOLDS_A_PROVIDER = """
import time
from benchmarks.turns import Provider
from tests.test_bench_turns import slow_lengths

if __name__ == "__main__":
    with Provider("held", slow_lengths, 1.0) as held:
        print(held.process.pid, flush=True)
        time.sleep(600)
"""


@linux
@pytest.mark.parametrize("how", ["ended", "killed"])
def test_stopped_providers_do_not_outlive_the_run(tmp_path, how):
    script = tmp_path / "holds.py"
    script.write_text(HOLDS_A_PROVIDER)
    root = str(suite.SOURCE)
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    held = int(process.stdout.readline())
    assert wait_for(lambda: state(held) == "T")
    if how == "ended":
        suite.end(process)
    else:
        process.kill()
    assert process.wait(60) < 0
    assert wait_for(lambda: state(held) in ("", "Z"))


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_bench_leaves_nothing_behind(tmp_path, number):
    mark = f"FASTBERT_BENCH_OUT={tmp_path}".encode()

    def marked():
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/environ", "rb") as file:
                    found += [pid] if mark in file.read().split(b"\0") else []
            except OSError:
                continue  # gone, or not ours
        return found

    command = [sys.executable, "-m", "fastbert", "bench", "ops", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert wait_for(marked), "the suite has begun"
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode not in (0, 1)
    assert wait_for(lambda: not marked())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_while_a_process_starts_is_raised_after_it(number):
    started = []

    def start():
        with suite.signals_wait():
            signal.raise_signal(number)
            started.append(number)

    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    try:
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            start()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert started == [number]


def test_short_calls_fill_the_clock():
    calls = []
    harness.interleave({"a": lambda: calls.append(0)}, rounds=1, warmup=1, least_ms=0.05)
    assert len(calls) > 3
