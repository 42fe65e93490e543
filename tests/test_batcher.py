"""The queue in front of a model: order, budgets, refusals, failures; with a model that the tests hold and release."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.serve.batcher import Batcher
from fastbert.serve.cache import Cache, CachedBatcher
from fastbert.serve.lanes import Lanes, Request
from fastbert.serve.latency import LatencyModel
from fastbert.serve.pace import Pace
from fastbert.serve.passes import is_finite
from fastbert.serve.work import (
    ComputeFailed,
    DeadlineExceeded,
    Draining,
    NonFinite,
    Overloaded,
    Work,
)

NAN, BROKEN = 998, 999  # token ids that make the model below answer NaN, and raise


def value_of(ids):
    """What the model below computes of a sequence."""
    return np.array([sum(ids), len(ids), ids[0], ids[-1]], dtype=np.float32)


class Model:
    """Computes sums of ids. While `gate` is clear it stands still inside a forward pass; `entered` counts passes."""

    outputs = frozenset({"vectors"})
    position_offset = 0
    batch_tokens = 32
    max_length = 64
    passes_at_once = 1

    def __init__(self, memory_tokens=10**9):
        self.memory_tokens = memory_tokens
        self.gate, self.entered = threading.Event(), threading.Semaphore(0)
        self.gate.set()
        self.batches: list[list[list[int]]] = []

    def compute(self, batch, outputs, prompt_lengths=None, share=1):
        self.entered.release()
        assert self.gate.wait(30)
        rows = [row.tolist() for row in batch.split(batch.input_ids)]
        assert len(rows) == len(outputs) == len(prompt_lengths)
        if batch.num_tokens > self.memory_tokens:
            raise MemoryError(f"{batch.num_tokens} tokens")
        self.batches.append(rows)
        if any(BROKEN in row for row in rows):
            raise ZeroDivisionError("broken")
        return [value_of(row) * (np.nan if NAN in row else 1) for row in rows]

    @property
    def computed(self):
        return [row for rows in self.batches for row in rows]

    async def inside(self):
        """Until a forward pass has begun."""
        assert await asyncio.to_thread(self.entered.acquire, timeout=30)


async def settled(tasks):
    return await asyncio.gather(*tasks, return_exceptions=True)


async def started(*coroutines):
    """Tasks that have run up to their first wait."""
    tasks = [asyncio.ensure_future(c) for c in coroutines]
    await asyncio.sleep(0)
    return tasks


class Held:
    """A batcher whose model stands still in a forward pass of the work [[1]]; what is submitted inside waits."""

    def __init__(self, **options):
        self.model = Model(options.pop("memory_tokens", 10**9))
        self.options = options

    async def __aenter__(self):
        self.batcher = Batcher(self.model, **self.options)
        self.model.gate.clear()
        (self.first,) = await started(self.batcher.submit(Work([[1]])))
        await self.model.inside()
        return self.batcher, self.model

    async def __aexit__(self, *error):
        self.model.gate.set()
        await settled([self.first])
        self.batcher.close()


ids_lists = st.lists(st.lists(st.integers(1, 900), min_size=1, max_size=40), min_size=1, max_size=6)
works = st.lists(st.tuples(ids_lists, st.sampled_from(["interactive", "bulk"])), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(works, st.integers(1, 50), st.sampled_from([None, 1, 3]))
def test_each_gets_its_own_values_in_order_within_the_budget(rows, budget, max_sequences):
    async def main():
        async with Held(max_batch_tokens=budget, max_batch_sequences=max_sequences, max_queue_tokens=10**6) as held:
            batcher, model = held
            tasks = await started(*(batcher.submit(Work(ids, lane=lane)) for ids, lane in rows))
            model.gate.set()
            for (ids, _), task in zip(rows, tasks, strict=True):
                done = await task
                assert all(np.array_equal(v, value_of(i)) for v, i in zip(done.values, ids, strict=True))
                assert done.tokens == sum(map(len, ids))
                assert len(done.queue_s) == len(done.compute_s) == len(ids)
                assert min(done.queue_s) >= 0
                assert min(done.compute_s) > 0
            assert batcher.queue_tokens == batcher.queue_requests == 0
            for batch in model.batches:
                assert sum(map(len, batch)) <= budget or len(batch) == 1
                assert max_sequences is None or len(batch) <= max_sequences
            assert sorted(model.computed) == sorted([[1], *(i for ids, _ in rows for i in ids)])

    asyncio.run(main())


def test_what_comes_while_one_computes_goes_together():
    async def main():
        async with Held() as (batcher, model):
            tasks = await started(*(batcher.submit(Work([[i]])) for i in range(2, 12)))
            model.gate.set()
            await settled(tasks)
            assert model.batches == [[[1]], [[i] for i in range(2, 12)]]
            assert (batcher.counters.batches, batcher.counters.sequences, batcher.counters.tokens) == (2, 11, 11)

    asyncio.run(main())


def test_padding_saved_is_reported():
    async def main():
        reports = []
        async with Held(on_batch=reports.append) as (batcher, model):
            tasks = await started(batcher.submit(Work([[2] * 3, [3] * 9])))
            model.gate.set()
            await settled(tasks)
            await asyncio.sleep(0)
        assert [(r.sequences, r.tokens, r.padded_tokens) for r in reports] == [(1, 1, 1), (2, 12, 18)]
        assert batcher.counters.padded_tokens == 19

    asyncio.run(main())


def test_overload_is_atomic_under_a_thousand_submits():
    async def main():
        rng = random.Random(0)
        async with Held(max_queue_tokens=300) as (batcher, model):
            rows = [[[2 + i] * rng.randint(1, 9) for _ in range(rng.randint(1, 4))] for i in range(900)]
            tasks = await started(*(batcher.submit(Work(ids)) for ids in rows))
            assert batcher.queue_tokens <= 300
            model.gate.set()
            results = await settled(tasks)
        accepted = [ids for ids, r in zip(rows, results, strict=True) if not isinstance(r, Exception)]
        refused = [r for r in results if isinstance(r, Exception)]
        assert all(isinstance(r, Overloaded) and 0 < r.retry_after_s < 3600 for r in refused)
        assert 300 - 36 < sum(len(i) for ids in accepted for i in ids) <= 300
        assert sorted(model.computed) == sorted([[1], *(i for ids in accepted for i in ids)])
        assert batcher.counters.overloaded == len(refused) > 0

    asyncio.run(main())


def test_work_larger_than_the_queue_is_taken_when_nothing_waits():
    async def main():
        model = Model()
        batcher = Batcher(model, max_queue_tokens=10)
        done = await batcher.submit(Work([[2] * 30, [3] * 30]))
        assert [v[0] for v in done.values] == [60, 90]
        batcher.close()

    asyncio.run(main())


def test_a_client_that_left_costs_nothing():
    async def main():
        async with Held() as (batcher, model):
            gone, stays = await started(batcher.submit(Work([[2], [3]])), batcher.submit(Work([[4]])))
            assert batcher.queue_tokens == 3
            gone.cancel()
            await settled([gone])
            assert (batcher.queue_tokens, batcher.queue_requests, batcher.counters.cancelled) == (1, 1, 1)
            model.gate.set()
            await stays
            assert model.computed == [[1], [4]]

    asyncio.run(main())


def test_a_client_that_leaves_in_mid_pass_harms_nobody():
    async def main():
        async with Held() as (batcher, model):
            gone, stays = await started(batcher.submit(Work([[2]] * 40)), batcher.submit(Work([[4]])))
            model.gate.set()
            await model.inside()
            gone.cancel()
            await settled([gone])
            assert (await stays).values[0][0] == 4
            assert batcher.queue_tokens == 0

    asyncio.run(main())


def test_deadline_answers_at_once_and_is_not_computed():
    async def main():
        async with Held() as (batcher, model):
            with pytest.raises(DeadlineExceeded):
                await batcher.submit(Work([[2]], deadline=time.monotonic() + 0.01))
            with pytest.raises(DeadlineExceeded):
                await batcher.submit(Work([[3]], deadline=time.monotonic() - 1))
            assert batcher.queue_tokens == 0
            assert batcher.counters.deadline_exceeded == 2
            done = asyncio.ensure_future(batcher.submit(Work([[4]], deadline=time.monotonic() + 60)))
            await asyncio.sleep(0)
            model.gate.set()
            assert (await done).values[0][0] == 4
            assert model.computed == [[1], [4]]

    asyncio.run(main())


def test_expired_work_is_dropped_before_dispatch_though_no_timer_fired():
    async def main():
        async with Held() as (batcher, model):
            late, stays = await started(
                batcher.submit(Work([[2]], deadline=time.monotonic() + 0.01)), batcher.submit(Work([[4]]))
            )
            time.sleep(0.05)  # the event loop is busy: its timer cannot fire
            model.gate.set()
            assert await asyncio.to_thread(model.entered.acquire, timeout=30)  # both run before the loop's timers do
            results = await settled([late, stays])
            assert isinstance(results[0], DeadlineExceeded)
            assert model.computed == [[1], [4]]

    asyncio.run(main())


def test_out_of_memory_splits_and_only_what_never_fits_fails():
    async def main():
        async with Held(memory_tokens=8) as (batcher, model):
            rows = [[[2] * 3, [3] * 5], [[4] * 9], [[5] * 8], [[6]]]
            tasks = await started(*(batcher.submit(Work(ids)) for ids in rows))
            model.gate.set()
            results = await settled(tasks)
            assert isinstance(results[1], ComputeFailed)
            assert isinstance(results[1].__cause__, MemoryError)
            for i in (0, 2, 3):
                assert all(np.array_equal(v, value_of(r)) for v, r in zip(results[i].values, rows[i], strict=True))
            assert batcher.counters.oom_splits >= 2
            assert batcher.batch_tokens < batcher.max_batch_tokens, "the next passes are made smaller"

    asyncio.run(main())


def test_a_non_finite_row_fails_alone():
    async def main():
        async with Held() as (batcher, model):
            bad, good = await started(batcher.submit(Work([[2], [NAN], [3]])), batcher.submit(Work([[4]])))
            model.gate.set()
            with pytest.raises(NonFinite) as error:
                await bad
            assert error.value.rows == [1]
            assert (await good).values[0][0] == 4
            assert len(model.batches[1]) == 4, "they were in one pass"
            assert batcher.counters.nonfinite == 1

    asyncio.run(main())


def test_an_exception_fails_its_batch_and_the_thread_lives_on():
    async def main():
        async with Held() as (batcher, model):
            bad = await started(batcher.submit(Work([[BROKEN]])), batcher.submit(Work([[2]] * 31 + [[3]] * 40)))
            model.gate.set()
            results = await settled(bad)
            assert all(isinstance(r, ComputeFailed) and isinstance(r.__cause__, ZeroDivisionError) for r in results)
            assert batcher.queue_tokens == 0, "the rest of a failed request is not computed"
            assert [3] not in model.computed
            assert (await batcher.submit(Work([[5]]))).values[0][0] == 5
            assert batcher.counters.failed == 2

    asyncio.run(main())


def test_drain_finishes_what_was_accepted():
    async def main():
        async with Held() as (batcher, model):
            tasks = await started(*(batcher.submit(Work([[i] * 20])) for i in range(2, 9)))
            (draining,) = await started(batcher.drain(30))
            with pytest.raises(Draining):
                await batcher.submit(Work([[50]]))
            assert not draining.done()
            model.gate.set()
            assert await draining
            assert [(await t).values[0][2] for t in tasks] == list(range(2, 9))

    asyncio.run(main())


def test_deadlines_of_many_are_kept_by_one_timer():
    """The later ones are not forgotten when the earliest is over, nor the earlier ones that come afterwards."""
    model = Model()
    batcher = Batcher(model)

    async def waited(seconds):
        start = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await batcher.submit(Work([[2]], deadline=start + seconds))
        return time.monotonic() - start

    async def run():
        model.gate.clear()
        first = asyncio.ensure_future(batcher.submit(Work([[1]], deadline=time.monotonic() + 60)))
        await model.inside()
        found = await asyncio.gather(*(waited(seconds) for seconds in (0.6, 0.2, 0.4, 0.05)))
        model.gate.set()
        assert (await first).tokens == 1
        assert await batcher.drain(30)
        return found

    for seconds, took in zip((0.6, 0.2, 0.4, 0.05), asyncio.run(run()), strict=True):
        assert seconds - 0.01 <= took < seconds + 20
    assert batcher.counters.deadline_exceeded == 4


@pytest.mark.parametrize(("number", "finite"), [(1e30, True), (3.4e38, True), (np.nan, False), (-np.inf, False)])
def test_what_is_not_finite_is_seen_and_what_is_huge_is_not_meant(number, finite):
    array = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    assert is_finite(array)
    array[1, 2] = number
    assert is_finite(array) is finite


def test_drain_gives_up_at_its_deadline():
    async def main():
        async with Held() as (batcher, model):
            (waiting,) = await started(batcher.submit(Work([[2]])))
            assert not await batcher.drain(0.01)
            assert isinstance((await settled([waiting]))[0], Draining)
            model.gate.set()
        assert [2] not in model.computed

    asyncio.run(main())


def test_bad_work_is_refused_with_reasons():
    with pytest.raises(ValueError, match="output 'poems' is not one of"):
        Work([[1]], output="poems")
    with pytest.raises(ValueError, match="lane 'fast' is not one of"):
        Work([[1]], lane="fast")
    with pytest.raises(ValueError, match="ids is empty"):
        Work([])
    with pytest.raises(ValueError, match=r"ids\[1\] is empty"):
        Work([[1], []])
    with pytest.raises(ValueError, match="same lengths"):
        Work([[1, 2]], [[0]])

    async def main():
        batcher = Batcher(Model())
        with pytest.raises(ValueError, match="'logits' is not one of vectors"):
            await batcher.submit(Work([[1]], output="logits"))
        with pytest.raises(ValueError, match="65 tokens, the model takes 64"):
            await batcher.submit(Work([[1] * 65]))
        batcher.close()

    asyncio.run(main())
    for options in ({"max_batch_tokens": 0}, {"target_p99_ms": -1.0}, {"max_queue_tokens": 0}, {"bulk_share": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Batcher(Model(), **options)


def test_one_event_loop_after_another():
    model = Model()
    batcher = Batcher(model)
    for i in (2, 3):
        assert asyncio.run(batcher.submit(Work([[i]]))).values[0][0] == i
    batcher.close()


def test_warm_up_computes_short_long_and_full():
    model, reports = Model(), []
    batcher = Batcher(model, on_batch=reports.append)
    asyncio.run(batcher.warm_up())
    assert (reports, batcher.counters.batches) == ([], 0), "nobody asked for these"
    asyncio.run(batcher.submit(Work([[2]])))
    assert (len(reports), batcher.counters.batches) == (1, 1)
    asyncio.run(batcher.drain())
    model.batches.pop()
    sizes = {(len(batch), len(batch[0])) for batch in model.batches}
    assert {(1, 8), (1, 64)} <= sizes
    assert batcher.latency.num_observed == len(model.batches), "the first pass teaches nothing"


def test_nobody_waits_while_it_learns(monkeypatch):
    order, batcher = [], Batcher(Model())
    monkeypatch.setattr(batcher.latency, "observe", lambda *observed: order.append("learned"))

    async def main():
        for i in (2, 3):  # the first pass teaches nothing
            await batcher.submit(Work([[i]]))
            order.append("answered")
        await asyncio.sleep(0)

    asyncio.run(main())
    batcher.close()
    assert order == ["answered", "answered", "learned"]


# One client, one request at a time.


class Watched(Model):
    """Notes on which thread each pass was."""

    def __init__(self):
        super().__init__()
        self.here: list[bool] = []

    def compute(self, batch, outputs, prompt_lengths=None, share=1):
        self.here.append(threading.current_thread() is threading.main_thread())
        return super().compute(batch, outputs, prompt_lengths)


class Connection(asyncio.BaseTransport):
    def __init__(self):
        super().__init__()
        self.closed = False

    def is_closing(self):
        return self.closed


async def client(batcher, requests, connection=None, **options):
    """Asks again when it has its answer, as somebody behind a socket does."""
    connection = connection or Connection()
    for i in range(requests):
        done = await batcher.submit(Work([[i + 1, 7]], connection=connection, **options))
        assert np.array_equal(done.values[0], value_of([i + 1, 7]))
        await asyncio.sleep(0)


def test_who_asks_alone_is_computed_here():
    model, reports, mine = Watched(), [], Connection()

    async def main():
        await client(batcher, 48, mine)
        assert model.here == [False] * 16 + [True] * 32
        assert len(reports) == batcher.counters.batches == 48
        learned = batcher.latency.num_observed
        assert learned == 15 + 2, "the first one teaches nothing; of those that were computed here each 16th"
        usual, batcher.latency.coefficients = batcher.latency.coefficients, (30.0, 0.0, 0.0)
        await client(batcher, 1, mine, deadline=time.monotonic() + 20)
        assert not model.here[-1], "its time seems too short: the queue's timer watches over it"
        batcher.latency.coefficients = usual  # nobody waits for company that a launch of 30 s would pay for
        for ids in ([[1]] * 40, [[1]] * 3):  # more than a pass holds: of tokens, of sequences
            assert len((await batcher.submit(Work(ids, connection=mine))).values) == len(ids)
            assert not model.here[-1]
        with pytest.raises(NonFinite):
            await batcher.submit(Work([[NAN]], connection=mine))
        with pytest.raises(ComputeFailed, match="broken"):
            await batcher.submit(Work([[BROKEN]], connection=mine))
        assert model.here[-2:] == [True, True]
        await client(batcher, 1, mine)
        assert model.here[-1], "who failed is followed as anybody is"
        assert (batcher.counters.nonfinite, batcher.counters.failed) == (1, 1)
        batcher.lone_s = 1e-9
        await client(batcher, 1, mine)
        assert not model.here[-1], "longer than others may have to wait"
        await batcher.drain()
        with pytest.raises(Draining):
            await batcher.submit(Work([[1]], connection=mine))

    batcher = Batcher(model, lone_s=60.0, max_batch_sequences=2, on_batch=reports.append)
    asyncio.run(main())


def test_who_connects_anew_for_each_request_is_alone_too():
    model = Watched()

    async def main():
        for _ in range(20):
            connection = Connection()
            await client(batcher, 1, connection)
            connection.closed = True
        assert model.here == [False] * 16 + [True] * 4

    batcher = Batcher(model, lone_s=60.0)
    asyncio.run(main())
    batcher.close()


def test_who_takes_turns_with_others_is_not_alone():
    """Two who wait for each other's pass are never seen at once where a pass holds up the event loop."""
    model, mine, other = Watched(), Connection(), Connection()

    async def main():
        for _ in range(20):
            await client(batcher, 1, mine)
            await client(batcher, 1, other)
        for _ in range(20):
            await batcher.submit(Work([[1]]))  # nobody knows by what it came
        assert not any(model.here)
        await client(batcher, 20, mine)
        assert model.here[-1]
        await client(batcher, 1, other)
        await client(batcher, 16, mine)
        assert not any(model.here[-17:]), "somebody else was there"
        await client(batcher, 1, mine)
        assert model.here[-1]

    batcher = Batcher(model, lone_s=60.0)
    asyncio.run(main())
    batcher.close()


def test_two_who_ask_at_once_share_passes():
    model = Watched()

    async def main():
        await asyncio.gather(client(batcher, 40), client(batcher, 40))
        assert not any(model.here), "from the beginning"
        await client(batcher, 40)
        assert any(model.here)
        await asyncio.gather(client(batcher, 40), client(batcher, 40))
        assert not any(model.here[-20:]), "and where one was alone before"

    batcher = Batcher(model, lone_s=60.0)
    asyncio.run(main())
    batcher.close()


def test_nothing_is_computed_here_while_the_thread_computes():
    model, mine = Watched(), Connection()

    async def main():
        await client(batcher, 40, mine)
        assert model.here[-1]
        model.entered = threading.Semaphore(0)  # of the passes that begin from now on
        model.gate.clear()
        batcher.lone_s = 0.0
        (left,) = await started(batcher.submit(Work([[1]], connection=mine)))
        batcher.lone_s = 60.0
        await model.inside()
        left.cancel()
        await settled([left])
        tasks = await started(batcher.submit(Work([[2]], connection=mine)))
        model.gate.set()
        assert (await tasks[0]).values[0][0] == 2
        assert not model.here[-1]

    batcher = Batcher(model, lone_s=60.0)
    asyncio.run(main())
    batcher.close()


# The order, without threads.


def request(tokens, lane="interactive", arrived=0.0, deadline=None, sequences=1):
    work = Work([[1] * tokens] * sequences, lane=lane, deadline=deadline)
    return Request(work, asyncio.Future(loop=LOOP), arrived)


LOOP = asyncio.new_event_loop()


def latency(a=1e-3, b=1e-4, c=0.0):
    model = LatencyModel()
    model.coefficients, model.num_observed = (a, b, c), 100
    return model


def test_a_long_one_does_not_delay_short_ones_that_come_soon_after_and_is_not_passed_for_ever():
    lanes, model = Lanes(), latency()
    long = request(64, arrived=0.0)  # 6.4 ms: overtaken by what comes within four times as long
    soon, later = request(1, arrived=0.020), request(1, arrived=0.030)
    for r in (long, soon, later):
        lanes.add(r, model)
    order = [part[0] for _ in range(3) for part in lanes.take(1, 1, model).parts]
    assert order == [soon, long, later]


def test_an_urgent_deadline_goes_first():
    lanes, model = Lanes(), latency()
    calm, urgent = request(4, arrived=0.0), request(4, arrived=0.0001, deadline=0.0005)
    lanes.add(calm, model)
    lanes.add(urgent, model)
    assert lanes.take(4, None, model).parts == [(urgent, 0)]


def test_a_gap_in_the_budget_is_filled_from_behind():
    lanes, model = Lanes(), latency()
    rows = [request(n, arrived=i) for i, n in enumerate([10, 30, 10, 10])]
    for r in rows:
        lanes.add(r, model)
    assert [p[0] for p in lanes.take(32, None, model).parts] == [rows[0], rows[2], rows[3]]
    assert [p[0] for p in lanes.take(32, None, model).parts] == [rows[1]]


def share_of_bulk(bulk_share, tokens=32, bulk_tokens=16):
    """Share of the time that bulk gets while interactive work never ends."""
    lanes, model = Lanes(bulk_share), latency()
    spent = {"interactive": 0.0, "bulk": 0.0}
    for i in range(400):
        while sum(1 for r in lanes if r.work.lane == "interactive") < 8:
            lanes.add(request(tokens, arrived=i), model)
        if not any(r.work.lane == "bulk" for r in lanes):
            lanes.add(request(bulk_tokens, "bulk", arrived=i, sequences=20), model)
        for r, place in lanes.take(128, None, model).parts:
            spent[r.work.lane] += model.marginal(r.lengths[place], 0)
    return spent["bulk"] / sum(spent.values())


@pytest.mark.parametrize("bulk_tokens", [4, 16, 60, 200])  # 200: more than the budget, goes alone
def test_bulk_gets_its_share_and_no_more_while_interactive_work_waits(bulk_tokens):
    assert share_of_bulk(0.2, bulk_tokens=bulk_tokens) == pytest.approx(0.2, abs=0.06)
    assert share_of_bulk(0.5, bulk_tokens=bulk_tokens) > 0.35, "mutant: a fixed share"


def test_interactive_goes_before_bulk_that_came_first():
    lanes, model = Lanes(), latency()
    bulk = request(8, "bulk", arrived=0.0, sequences=50)
    lanes.add(bulk, model)
    assert lanes.take(32, None, model).parts == [(bulk, i) for i in range(4)], "alone it has the whole budget"
    interactive = request(8, arrived=9.0)
    lanes.add(interactive, model)
    assert lanes.take(32, None, model).parts == [(interactive, 0)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 5), st.sampled_from(["interactive", "bulk"]), st.booleans())),
    st.integers(1, 64),
)
def test_lanes_lose_and_repeat_nothing(rows, budget):
    lanes, model = Lanes(), latency()
    added, taken = [], []
    for i, (tokens, sequences, lane, leaves) in enumerate(rows):
        r = request(tokens, lane, arrived=i / 1000, sequences=sequences)
        lanes.add(r, model)
        if leaves:
            lanes.remove(r)
            lanes.remove(r)
        else:
            added += [(r, place) for place in range(sequences)]
    while lanes.tokens:
        batch = lanes.take(budget, None, model)
        assert batch.parts, "something always goes"
        assert batch.tokens <= budget or len(batch.parts) == 1
        taken += batch.parts
    assert len(lanes) == lanes.squares == 0
    assert sorted(taken, key=lambda p: (id(p[0]), p[1])) == sorted(added, key=lambda p: (id(p[0]), p[1]))


# What passes take.


def observed(truth, seed=0, noise=0.05, n=300):
    rng = np.random.default_rng(seed)
    model = LatencyModel()
    for _ in range(n):
        lengths = rng.integers(4, 300, rng.integers(1, 30))
        tokens, squares = int(lengths.sum()), int((lengths**2).sum())
        seconds = truth[0] + truth[1] * tokens + truth[2] * squares
        model.observe(tokens, squares, seconds * rng.lognormal(0, noise))
    return model


def worst_error(model, truth):
    shapes = [(8, 64), (64, 64**2), (2000, 2000 * 20), (2000, 2000 * 200)]
    exact = [truth[0] + truth[1] * t + truth[2] * s for t, s in shapes]
    return max(abs(model.predict(t, s) / e - 1) for (t, s), e in zip(shapes, exact, strict=True))


def test_latency_model_finds_the_three_terms():
    for seed, truth in enumerate([(2e-3, 5e-5, 1e-7), (5e-3, 1e-3, 0.0), (1e-2, 1e-6, 1e-8)]):
        model = observed(truth, seed, noise=0.02)
        assert min(model.coefficients) >= 0
        assert worst_error(model, truth) < 0.15
        mutant = observed(truth, seed, noise=0.02)
        mutant.coefficients = (0.0, *mutant.coefficients[1:])
        assert worst_error(mutant, truth) > 0.15, "without a launch term"


def test_latency_model_follows_a_machine_that_slows_down():
    model = observed((1e-3, 1e-4, 0.0))
    for _ in range(150):
        model.observe(100, 100 * 50, 3 * (1e-3 + 1e-2))
    assert model.predict(100, 5000) == pytest.approx(3.3e-2, rel=0.1)


def test_one_hiccup_does_not_count():
    model = observed((1e-3, 1e-4, 0.0))
    before = model.predict(2000, 400_000)
    model.observe(2000, 400_000, 10.0)
    assert model.predict(2000, 400_000) == pytest.approx(before, rel=0.1)


def test_budget_from_a_target():
    truth = (2e-3, 5e-5, 1e-7)
    model = observed(truth, noise=0.1)
    assert 1.1 < model.spread < 1.5, "99 in 100 of a tenth's noise"
    tokens = model.tokens_within(0.025)
    length = 200  # squares a token in `observed`, roughly
    seconds = truth[0] + (truth[1] + truth[2] * length) * tokens
    assert 0.6 * 0.025 < seconds * model.spread < 1.2 * 0.025
    batcher = Batcher(Model(), max_batch_tokens=10**6, target_p99_ms=50.0)
    assert batcher.batch_tokens == 10**6, "nothing is known yet"
    batcher.latency = model
    assert batcher.batch_tokens == tokens
    batcher.close()


@pytest.mark.parametrize(
    ("launch", "gap", "deadline", "waits"),
    [(10e-3, 1e-3, None, True), (1e-3, 1e-3, None, False), (10e-3, 20e-3, None, False), (10e-3, 1e-3, 0.011, False)],
    ids=["pays", "cheap launch", "nobody comes", "too late"],
)
def test_waits_for_company_only_where_it_pays(launch, gap, deadline, waits):
    lanes, pace, model = Lanes(), Pace(), latency(a=launch)
    for i in range(200):
        pace.arrived((i - 199) * gap)
    lanes.add(request(4, arrived=0.0, deadline=deadline), model)
    assert (pace.pause_s(lanes, 32, model, 0.0) > 0) is waits
    assert pace.pause_s(lanes, 4, model, 0.0) == 0, "a full batch does not wait"
    assert pace.pause_s(lanes, 32, model, 2 * launch) == 0, "nobody waits for longer than the launch"
    assert pace.pause_s(lanes, 32, LatencyModel(), 0.0) == 0, "nothing is known yet"


@pytest.mark.parametrize(
    ("back", "each", "deadline", "waits"),
    [(7, 1e-4, None, True), (3, 1e-4, None, False), (7, 4e-4, None, False), (7, 1e-4, 1e-3, False)],
    ids=["they come back", "most stay away", "they take too long", "too late"],
)
def test_waits_for_clients_that_came_back_so_far(back, each, deadline, waits):
    launch, model, pace = 1e-3, latency(a=1e-3), Pace()
    for cycle in range(-100, 0):  # seven are answered, and ask again in a burst
        now = cycle * 0.1
        pace.answered(7, 28, model, now)
        for place in range(back):
            pace.arrived(now + (place + 1) * each)
    lanes = Lanes()
    lanes.add(request(4, arrived=0.0, deadline=deadline), model)
    pace.answered(7, 28, model, 0.0)
    assert (pace.pause_s(lanes, 32, model, 0.0) > 0) is waits
    assert pace.pause_s(lanes, 4, model, 0.0) == 0, "a full batch does not wait"
    assert pace.pause_s(lanes, 32, model, 1.01 * launch) == 0, "nobody waits for longer than a launch"
    for place in range(7):
        pace.arrived((place + 1) * each)
    assert pace.pause_s(lanes, 32, model, 7 * each) == 0, "all are back"


# Repeats.


class Counting:
    """A batcher that computes at once and keeps what it was asked."""

    def __init__(self):
        self.asked = []

    async def submit(self, work):
        batcher = Batcher(Model())
        self.asked += map(list, work.ids)
        done = await batcher.submit(work)
        batcher.close()
        return done


def test_cache_answers_exact_repeats():
    async def main():
        inner, cache = Counting(), Cache(10**6)
        cached = CachedBatcher(inner, b"model", cache)
        rows = [[2, 3], [4], [2, 3], [5]]
        first = await cached.submit(Work(rows))
        assert inner.asked == [[2, 3], [4], [5]], "equal inputs are computed once"
        again = await cached.submit(Work([[5], [6], [4]]))
        assert inner.asked == [[2, 3], [4], [5], [6]]
        for done, asked in ((first, rows), (again, [[5], [6], [4]])):
            assert all(np.array_equal(v, value_of(i)) for v, i in zip(done.values, asked, strict=True))
        assert (cache.hits, cache.misses) == (2, 4)
        assert again.compute_s[0] == 0 < again.compute_s[1]
        with pytest.raises(ValueError, match="read-only"):
            again.values[0][0] = 7

    asyncio.run(main())


def test_draining_waits_for_a_pass_that_nobody_waits_for():
    """A thread that returns from native code when the interpreter is gone aborts the process."""

    async def main():
        model = Model()
        batcher = Batcher(model)
        model.gate.clear()
        (task,) = await started(batcher.submit(Work([[1, 2]])))
        await model.inside()
        task.cancel()
        await settled([task])
        asyncio.get_running_loop().call_later(0.2, model.gate.set)
        assert await batcher.drain(30)
        assert model.batches == [[[1, 2]]]

    asyncio.run(main())


def test_cache_tells_apart_what_differs():
    cached, other = CachedBatcher(Counting(), b"a", Cache(1)), CachedBatcher(Counting(), b"b", Cache(1))
    work = Work([[1, 2, 3, 4]])
    works = [
        work, replace(work, output="tokens"), replace(work, prompt_length=1), replace(work, type_ids=[[0, 0, 1, 1]]),
        Work([[1, 2, 3, 5]]), Work([[1, 2, 3]]), Work([[1, 2]], [[3, 4]]),
    ]  # fmt: skip
    keys = [cached.key(w, 0) for w in works] + [other.key(work, 0)]
    assert len(set(keys)) == len(keys)
    assert cached.key(replace(work, type_ids=[[0] * 4]), 0) == cached.key(work, 0), "all 0 is what None means"
    assert cached.key(replace(work, lane="bulk", deadline=1.0), 0) == cached.key(work, 0)


def test_cache_keeps_within_its_bytes_and_forgets_the_oldest():
    cache = Cache(10 * (300 + 400))
    for i in range(10):
        cache.put(b"%d" % i, np.full(100, i, np.float32))
    assert len(cache) == 10
    assert cache.get(b"0") is not None
    cache.put(b"new", np.zeros(100, np.float32))
    assert cache.get(b"0") is not None
    assert cache.get(b"1") is None
    cache.put(b"huge", np.zeros(10**5, np.float32))
    assert cache.get(b"huge") is None
    assert len(cache) == 10
    assert cache.nbytes == 10 * 700
    with pytest.raises(ValueError, match="max_bytes must be at least 1"):
        Cache(0)
