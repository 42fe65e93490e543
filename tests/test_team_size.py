"""How many threads share a pass where other processes keep the cores busy; times are given, none is measured."""

import pytest

from fastbert import native

MS = 1_000_000
FASTEST = 1 * MS


@pytest.fixture
def size():
    team = native.require().TeamSize()
    passes(team, 50, FASTEST)
    return team


def passes(team, count: int, *nanoseconds: int, asked: int = 2, tokens: int = 12) -> list[int]:
    """The sizes of so many passes, which take these times in turns."""
    sizes = []
    for i in range(count):
        sizes.append(team.of(asked))
        if sizes[-1] > 1:  # one thread has nobody to wait for, and its time says nothing
            team.took(tokens, nanoseconds[i % len(nanoseconds)])
    return sizes


def test_a_team_whose_passes_take_long_is_halved_for_a_while(size):
    late = passes(size, 10, 7 * FASTEST)
    assert late == [2] * 4 + [1] * 6  # four passes lose 5 fastest ones each
    assert passes(size, 122, FASTEST) == [1] * 122
    assert passes(size, 20, FASTEST) == [2] * 20


def test_passes_that_are_late_again_halve_it_again(size):
    found = passes(size, 1000, 7 * FASTEST)
    assert found.count(2) / len(found) < 0.05


def test_larger_teams_go_down_step_by_step(size):
    """A half team is late where it takes four times what the whole one did."""
    assert passes(size, 5, 7 * FASTEST, asked=8)[-1] == 4
    assert passes(size, 100, 3 * FASTEST, asked=8) == [4] * 100
    assert passes(size, 5, 20 * FASTEST, asked=8)[-1] == 2


@pytest.mark.parametrize(
    "times",
    [
        (FASTEST,),
        (2 * FASTEST,),  # half a team might take as long
        (FASTEST,) * 9 + (7 * FASTEST,),  # what now and then comes late costs less than to do without
        (FASTEST,) * 99 + (10_000 * FASTEST,),  # a machine that stood still
    ],
)
def test_it_stays_whole(size, times):
    assert passes(size, 1000, *times) == [2] * 1000


def test_passes_of_other_lengths_have_fastest_ones_of_their_own(size):
    assert passes(size, 100, 7 * FASTEST, tokens=100) == [2] * 100


def test_long_passes_are_not_compared(size):
    passes(size, 10, FASTEST, tokens=10_000)
    assert passes(size, 100, 7 * FASTEST, tokens=10_000) == [2] * 100


def test_the_first_pass_is_no_measure(size):
    """It loads weights and starts threads: what follows is faster, and becomes the measure."""
    team = native.require().TeamSize()
    passes(team, 1, 100 * FASTEST)
    passes(team, 10, FASTEST)
    assert passes(team, 10, 7 * FASTEST)[-1] == 1
