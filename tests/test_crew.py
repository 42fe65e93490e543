"""Passes side by side: which thread begins what, how work is divided, and that nothing of it is lost or repeated; with
a model whose passes the tests hold and release one by one."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.serve.batcher import Batcher
from fastbert.serve.crew import Crew, UnderWay
from fastbert.serve.lanes import Lanes, Request
from fastbert.serve.latency import LatencyModel
from fastbert.serve.pace import Pace
from fastbert.serve.passes import BatchReport, Passes
from fastbert.serve.work import NonFinite, Work

NAN = 998


class Model:
    """Computes sums of ids in up to two passes at once, each held while `held`, and released by its first id."""

    outputs = frozenset({"vectors"})
    position_offset = 0
    batch_tokens = 512
    max_length = 64
    passes_at_once = 2

    def __init__(self):
        self.held = threading.Event()
        self.passes: list[tuple[int, list[list[int]]]] = []  # (share, ids), as they begin
        self.begun = threading.Semaphore(0)
        self.gates: dict[int, threading.Event] = {}
        self.before_answer = lambda: None

    def compute(self, batch, outputs, prompt_lengths=None, share=1):
        rows = [row.tolist() for row in batch.split(batch.input_ids)]
        gate = self.gates.setdefault(rows[0][0], threading.Event())
        self.passes.append((share, rows))
        self.begun.release()
        if self.held.is_set():
            assert gate.wait(30)
        self.before_answer()
        return [np.array([sum(row), len(row)], dtype=np.float32) * (np.nan if NAN in row else 1) for row in rows]

    async def inside(self):
        """Until one more pass has begun."""
        assert await asyncio.to_thread(self.begun.acquire, timeout=30)

    def release(self, rows):
        """Let the pass that begins with these rows end."""
        self.gates[rows[0][0]].set()

    def release_all(self):
        self.held.clear()
        for gate in list(self.gates.values()):
            gate.set()


@pytest.fixture
def model():
    made = Model()
    made.held.set()
    return made


async def submitted(batcher, rows):
    """Tasks of one request for each of the rows that have run up to their first wait."""
    tasks = [asyncio.ensure_future(batcher.submit(Work(ids))) for ids in rows]
    await asyncio.sleep(0)
    return tasks


async def halved(model, rows):
    """A batcher in two passes over requests that came while one before them was computed; the tasks of all."""
    batcher = Batcher(model)
    tasks = await submitted(batcher, requests(1))
    await model.inside()
    tasks += await submitted(batcher, rows)
    model.release(model.passes[0][1])
    await model.inside()
    await model.inside()
    return batcher, tasks


def requests(count, first=2, tokens=20):
    return [[[first + i] * tokens] for i in range(count)]


def crew_of(size, *waiting):
    """A crew with requests of so many tokens waiting, each of which takes a millisecond."""
    latency, lanes = LatencyModel(), Lanes()
    latency.coefficients = (0.0, 1e-3, 0.0)
    for tokens in waiting:
        lanes.add(Request(Work([[1] * tokens]), asyncio.Future(loop=LOOP), 0.0), latency)
    return Crew(size, lanes, latency, lambda: 512, None)


LOOP = asyncio.new_event_loop()


def test_who_begins_what():
    little, much = crew_of(2, 4, 4), crew_of(2, 20, 20)
    assert [crew._share(thread) for crew in (little, much) for thread in (0, 1)] == [1, 0, 2, 0]
    much.under_way[0] = UnderWay(1, 10, 0.0)
    assert much._share(1) == 0, "the device is another's"
    for crew in (little, much):
        crew.under_way[0] = UnderWay(2, 10, 0.0)
        assert crew._share(1) == 2
    del little.under_way[0]
    little.under_way[1] = UnderWay(2, 10, 0.0)
    assert little._share(0) == 2
    assert crew_of(1, 4, 4)._share(0) == crew_of(1, 20, 20)._share(0) == 1
    assert crew_of(2, 40)._share(0) == 1, "a request alone has the whole device, however long it is"


def test_little_is_computed_by_all_cores_and_nobody_begins_beside_it(model):
    async def main():
        batcher = Batcher(model)
        tasks = await submitted(batcher, requests(1))
        await model.inside()
        tasks += await submitted(batcher, requests(20, first=50))
        await asyncio.sleep(0.05)
        assert [share for share, _ in model.passes] == [1]
        model.release_all()
        assert [(await task).values[0][0] for task in tasks] == [40, *(20 * i for i in range(50, 70))]
        batcher.close()

    asyncio.run(main())


def test_much_is_computed_by_two_passes_with_a_half_each(model):
    async def main():
        batcher, tasks = await halved(model, requests(16, first=50))  # 320 tokens
        halves = model.passes[1:]
        assert [(share, len(rows)) for share, rows in halves] == [(2, 8), (2, 8)]
        late = await submitted(batcher, requests(2, first=90))
        model.release(halves[1][1])  # whoever is done first goes on, though little waits
        await model.inside()
        share, rows = model.passes[3]
        assert (share, [row[0] for row in rows]) == (2, [90, 91])
        model.release_all()
        assert [(await task).values[0][0] for task in tasks + late] == [20 * i for i in (2, *range(50, 66), 90, 91)]
        batcher.close()

    asyncio.run(main())


def test_a_request_over_what_is_left_goes_into_the_pass(model):
    """A ninth request beside two passes of four would be a pass of its own."""

    async def main():
        batcher, tasks = await halved(model, requests(9, first=50))
        assert sorted(len(rows) for _, rows in model.passes[1:]) == [4, 5]
        model.release_all()
        await asyncio.gather(*tasks)
        batcher.close()

    asyncio.run(main())


@pytest.mark.parametrize("first", [0, 1], ids=["the first half ends first", "the second half ends first"])
def test_a_request_in_two_passes_is_answered_once_and_never_with_nan(model, first):
    async def main():
        rows = [[[50 + i] * 19 + [NAN if i == 0 else 1] for i in range(16)], [[3] * 20]]
        batcher, (before, bad, good) = await halved(model, rows)
        halves = [rows for _, rows in model.passes[1:]]
        assert all(any(row[0] >= 50 for row in rows) for rows in halves), "the request is in both"
        model.release(halves[first])
        await asyncio.sleep(0.05)
        model.release_all()
        with pytest.raises(NonFinite) as error:
            await bad
        assert error.value.rows == [0]
        assert (await good).values[0][0] == 60
        assert (await before).values[0][0] == 40
        assert (batcher.counters.nonfinite, batcher.queue_tokens) == (1, 0)
        batcher.close()

    asyncio.run(main())


def test_what_failed_is_not_done_when_its_last_pass_is():
    """Whichever outcome reaches the event loop first."""
    model = Model()
    request = Request(Work([[NAN], [1]]), asyncio.Future(loop=LOOP), 0.0)
    passes = Passes(model, LatencyModel())
    (first,) = passes.run([(request, 0)], 2).settled
    assert first[0] is request
    assert isinstance(first[1], NonFinite)
    request.failed = False  # as when the other pass had begun before
    model.before_answer = lambda: setattr(request, "failed", True)
    assert passes.run([(request, 1)], 2).settled == []


def test_draining_waits_for_both_passes(model):
    async def main():
        batcher, _ = await halved(model, requests(16, first=50))
        assert not await batcher.drain(0.1), "they are held"
        draining = asyncio.ensure_future(batcher.drain(30))
        for _, rows in model.passes[1:]:
            await asyncio.sleep(0.05)
            assert not draining.done()
            model.release(rows)
        await draining
        assert not any(thread.is_alive() for thread in batcher._threads)

    asyncio.run(main())


ids_lists = st.lists(st.lists(st.integers(1, 900), min_size=1, max_size=60), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(st.lists(ids_lists, min_size=1, max_size=20), st.integers(20, 300))
def test_each_gets_its_own_values_within_the_budget(rows, budget):
    async def main():
        model = Model()
        batcher = Batcher(model, max_batch_tokens=budget, max_queue_tokens=10**6)
        for ids, task in zip(rows, await submitted(batcher, rows), strict=True):
            assert [tuple(value) for value in (await task).values] == [(sum(i), len(i)) for i in ids]
        assert sorted(row for _, passed in model.passes for row in passed) == sorted(i for ids in rows for i in ids)
        for share, passed in model.passes:
            assert sum(map(len, passed)) <= budget // share or len(passed) == 1
        assert batcher.queue_tokens == batcher.queue_requests == 0
        assert await batcher.drain(30)

    asyncio.run(main())


def test_passes_that_share_are_learned_from_as_the_part_that_they_are():
    batcher = Batcher(Model())
    latency = batcher.latency
    for share in (1, 2):
        passes = Passes(Model(), latency)
        for tokens in (100, 300, 200, 400, 100, 300) * 60:
            passes.learn([BatchReport(1, tokens, 0, tokens, share * (1e-3 + 1e-4 * tokens), 0.0, share)])
    assert latency.predict(200, 0) == pytest.approx(21e-3, rel=0.05)
    before = latency.num_observed
    passes.learn([BatchReport(1, 100, 0, 100, 1e-2, 0.0, 1)] * 16)
    assert latency.num_observed == before + 4, "what is settled learns from each fourth"
    batcher.close()


@pytest.mark.parametrize(("shares_cores", "waits"), [(False, False), (True, True)])
def test_on_shared_cores_clients_that_come_back_are_waited_for_longer(shares_cores, waits):
    launch, latency, pace = 1e-3, LatencyModel(), Pace(shares_cores)
    latency.coefficients, latency.num_observed = (launch, 1e-4, 0.0), 100
    for cycle in range(-100, 0):  # two passes end in turn; seven of each are back within 2.8 ms, in a burst
        for shift in (0.0, 0.05):
            now = cycle * 0.1 + shift
            pace.answered(7, 28, latency, now)
            for place in range(7):
                pace.arrived(now + (place + 1) * 4e-4)
    pace.answered(7, 28, latency, 0.0)
    lanes = Lanes()
    lanes.add(Request(Work([[1] * 4]), asyncio.Future(loop=LOOP), 0.0), latency)
    assert (pace.pause_s(lanes, 14, latency, 0.0) > 0) is waits
    assert pace.pause_s(lanes, 4, latency, 0.0) == 0, "it has its part"
    assert pace.returning_tokens == 28
    pace.arrived(4e-4)
    assert pace.returning_tokens == 24
    pace.answered(3, 12, latency, 8e-4)  # of the other pass, before the six of the first are back
    for place in range(6):
        pace.arrived(1e-3 + place * 4e-4)
        assert pace.expects_more
    for place in range(3):
        assert pace.expects_more
        pace.arrived(3.4e-3 + place * 4e-4)
    assert not pace.expects_more
