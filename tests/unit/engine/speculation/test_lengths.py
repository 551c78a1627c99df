"""How much is drafted: what pays is drafted, what does not is not, one slow step changes nothing, and it comes back."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.engine.speculation.lengths import DRAFTING, PLAIN, RARELY, TRIAL, Lengths, Rate, Took, Wish


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8)).filter(lambda pair: pair[1] <= pair[0])))
def test_a_rate_is_a_share(seen: list[tuple[int, int]]) -> None:
    rate = Rate()
    for drafted, taken in seen:
        rate.learn(drafted, taken)
        assert 0 <= rate.share <= 1


def test_a_rate_follows_what_is_taken() -> None:
    rate = Rate()
    for _ in range(40):
        rate.learn(4, 0)
    assert rate.share < 0.05
    for _ in range(40):
        rate.learn(4, 4)
    assert rate.share > 0.95


class Machine:
    """Takes so long for a pass of so many rows and for a pass of the draft, and takes each token with one chance.

    ``second``: seconds more for a pass with drafted tokens, however few: products of several rows are made otherwise.
    """

    def __init__(
        self,
        *,
        fixed: float,
        row: float,
        draft: float = 0.0,
        taken: float = 1.0,
        requests: int = 1,
        second: float = 0.0,
    ) -> None:
        self.fixed, self.row, self.draft, self.taken, self.second = fixed, row, draft, taken, second
        self.lengths, self.dice, self.behind = Lengths(8), random.Random(0), 0
        self.requests = [f"r{n}" for n in range(requests)]
        self.drafted: list[int] = []

    def run(self, steps: int, *, slow: float = 0.0) -> float:
        """Tokens a second over so many steps; ``slow``: seconds by which one in fifty takes longer."""
        tokens = seconds = 0.0
        for _ in range(steps):
            late = slow * (self.dice.random() < 0.02)
            wishes = [Wish(name, 8) for name in self.requests]
            counts = self.lengths.decide(wishes) if self.lengths.begin(len(wishes)) else {}
            rows, said, took = len(wishes) + sum(counts.values()), len(wishes), 0.0
            for _ in range(max(counts.values(), default=0)):
                self.lengths.passed(self.draft)
                took += self.draft
            for name, count in counts.items():
                taken = next((n for n in range(count) if self.dice.random() >= self.taken), count)
                self.lengths.taken(name, count, taken)
                said += taken
            took += (
                0.01 * self.behind if counts else 0.0
            )  # what was said without it the draft has still to read
            self.behind = 0 if counts else self.behind + 1
            speaking = self.fixed + self.row * rows + self.second * bool(counts)
            self.lengths.learn(Took(took + speaking + late, speaking + late, rows, said))
            tokens, seconds = tokens + said, seconds + took + speaking
            self.drafted.append(sum(counts.values()))
        return tokens / seconds


def plain(machine: Machine) -> float:
    rows = len(machine.requests)
    return rows / (machine.fixed + machine.row * rows)


def test_cheap_rows_and_tokens_that_are_taken_make_long_drafts() -> None:
    machine = Machine(fixed=1.0, row=0.01)
    assert machine.run(200) > 4 * plain(machine)
    assert sum(machine.drafted[-20:]) > 20 * 7


def test_nothing_is_drafted_where_it_would_slow_the_batch_down() -> None:
    dear = Machine(fixed=0.01, row=1.0, taken=0.5, requests=4)
    dear.run(2000)
    trials = 1 + 5  # at first, and after 64, 128, 256 ... steps
    assert 2 * DRAFTING <= sum(map(bool, dear.drafted)) <= (1 + DRAFTING) * trials
    wrong = Machine(fixed=1.0, row=0.05, taken=0.0)
    assert wrong.run(400) > 0.95 * plain(wrong)
    slow = Machine(fixed=1.0, row=0.01, draft=2.0)
    assert slow.run(400) > 0.9 * plain(slow)


@pytest.mark.parametrize("requests", [1, 4, 9])
@pytest.mark.parametrize("taken", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("draft", [0.05, 0.2, 0.6])
@pytest.mark.parametrize("second", [0.0, 0.5])
def test_it_is_nearly_as_fast_as_the_best_fixed_length(
    requests: int, taken: float, draft: float, second: float
) -> None:
    """Also where one step in fifty takes twenty times as long, for a reason of its own."""
    machine = Machine(fixed=1.0, row=0.04, draft=draft, taken=taken, requests=requests, second=second)

    def at(length: int) -> float:
        said = requests * sum(taken**n for n in range(length + 1))
        return said / (1.0 + 0.04 * requests * (1 + length) + (draft * length + second) * bool(length))

    assert machine.run(1500, slow=20.0) > 0.9 * max(map(at, range(9)))


def test_it_comes_back_when_drafts_are_good_again() -> None:
    machine = Machine(fixed=1.0, row=0.02, taken=0.0)
    machine.run(200)
    machine.taken = 1.0
    machine.run(600)
    assert sum(machine.drafted[-40:]) > 40 * 4


def test_an_unlucky_beginning_is_found_out() -> None:
    machine = Machine(fixed=1.0, row=0.02, draft=5.0, taken=0.8)
    machine.run(PLAIN + DRAFTING + 3)
    assert not any(machine.drafted[-2:])
    machine.draft = 0.1
    machine.run(2 * TRIAL + 40)
    assert sum(map(bool, machine.drafted[-15:])) >= 15 - PLAIN


def test_it_is_tried_ever_more_rarely_and_never_forgotten() -> None:
    machine = Machine(fixed=0.01, row=1.0, taken=0.0)
    machine.run(5 * RARELY)
    tried = [n for n, drafted in enumerate(machine.drafted) if drafted and not machine.drafted[n - 1]]
    gaps = [later - earlier for earlier, later in pairwise(tried)]
    assert gaps[0] <= 2 * TRIAL + DRAFTING + 1 and gaps[-1] >= RARELY and gaps == sorted(gaps)


def test_batches_of_other_sizes_are_measured_for_themselves() -> None:
    machine = Machine(fixed=1.0, row=0.01, draft=0.1, taken=0.9)
    machine.run(100)
    assert sum(map(bool, machine.drafted[-20:])) >= 20 - PLAIN
    machine.requests, machine.row = [f"r{n}" for n in range(16)], 1.0
    machine.run(100)
    assert sum(map(bool, machine.drafted[-20:])) <= 1 + DRAFTING
    machine.requests, machine.row = ["r0"], 0.01
    assert machine.run(20) > 2 * plain(machine) and sum(map(bool, machine.drafted[-20:])) >= 20 - PLAIN


def test_who_is_not_adaptive_drafts_what_it_may() -> None:
    lengths = Lengths(3, adaptive=False)
    assert lengths.begin(3)
    assert lengths.decide([Wish("a", 8), Wish("b", 2), Wish("c", 0)]) == {"a": 3, "b": 2}
    assert not lengths.begin(0)


def test_each_request_has_its_own_length() -> None:
    machine = Machine(fixed=1.0, row=0.1, draft=0.1, taken=0.8, requests=2)
    machine.run(100)
    for _ in range(30):
        machine.lengths.taken("sure", 8, 8)
        machine.lengths.taken("wild", 8, 0)
    while not machine.lengths.begin(2):  # steps without drafts are being tried
        machine.run(1)
    counts = machine.lengths.decide([Wish("sure", 8), Wish("wild", 8), Wish("short", 0)])
    assert counts == {"sure": 8, "wild": 1}


def test_a_request_that_ended_is_forgotten() -> None:
    lengths = Lengths(4)
    lengths.taken("r", 4, 4)
    lengths.forget("r")
    assert not lengths._rates
