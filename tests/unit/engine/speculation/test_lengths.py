"""How much is drafted follows what was taken and what steps were measured to take, on a clock that is counted."""

from hypothesis import given
from hypothesis import strategies as st

from heliostat.engine.speculation.lengths import TRIAL, Lengths, Rate, Seconds, Wish


def test_seconds_lie_on_lines_between_measurements() -> None:
    known = Seconds()
    assert known.at(3) is None and known.at(0) == 0.0
    known.learn(2, 1.0)
    known.learn(6, 3.0)
    known.learn(6, 0.0)  # a clock that stands still
    assert [known.at(rows) for rows in (1, 2, 4, 6, 8)] == [1.0, 1.0, 2.0, 3.0, 4.0]
    known.learn(2, 2.0)
    assert 1.0 < (known.at(2) or 0) < 2.0


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8)), max_size=60))
def test_a_rate_is_a_share(seen: list[tuple[int, int]]) -> None:
    rate = Rate()
    for drafted, taken in seen:
        rate.learn(drafted, min(drafted, taken))
        assert 0 <= rate.share <= 1 + 1e-9


def test_a_rate_follows_what_is_taken() -> None:
    rate = Rate()
    for _ in range(40):
        rate.learn(4, 0)
    assert rate.share < 0.05
    for _ in range(40):
        rate.learn(4, 4)
    assert rate.share > 0.95


class Machine:
    """Takes so long for a pass of so many rows, and accepts a share of what is drafted."""

    def __init__(
        self, *, fixed: float, row: float, draft: float = 0.0, taken: float = 1.0, requests: int = 1
    ) -> None:
        self.fixed, self.row, self.draft, self.taken = fixed, row, draft, taken
        self.lengths = Lengths(8, passes=draft > 0)
        self.requests = [f"r{n}" for n in range(requests)]
        self.drafted: list[int] = []

    def run(self, steps: int) -> float:
        """Tokens a second over so many steps."""
        tokens = seconds = 0.0
        for _ in range(steps):
            wishes = [Wish(name, 8) for name in self.requests]
            counts = self.lengths.decide(wishes, rows=len(wishes))
            rows = len(wishes) + sum(counts.values())
            took = self.fixed + self.row * rows
            self.lengths.speaking.learn(rows, took)
            for depth in range(max(counts.values(), default=0)):
                there = sum(count > depth for count in counts.values())
                self.lengths.drafting.learn(there, self.draft)
                took += self.draft
            for name, count in counts.items():
                taken = round(count * self.taken)
                self.lengths.learn(name, count, taken)
                tokens += taken
            tokens, seconds = tokens + len(wishes), seconds + took
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
    dear.run(400)
    assert sum(map(bool, dear.drafted)) <= 3 + 400 // TRIAL * 2
    wrong = Machine(fixed=1.0, row=0.05, taken=0.0)
    assert wrong.run(400) > 0.9 * plain(wrong)
    slow = Machine(fixed=1.0, row=0.01, draft=2.0)
    assert slow.run(400) > 0.85 * plain(slow)


def test_it_comes_back_when_drafts_are_good_again() -> None:
    machine = Machine(fixed=1.0, row=0.02, taken=0.0)
    machine.run(200)
    machine.taken = 1.0
    machine.run(600)
    assert sum(machine.drafted[-40:]) > 40 * 4


def test_who_is_not_adaptive_drafts_what_it_may() -> None:
    lengths = Lengths(3, adaptive=False)
    lengths.speaking.learn(1, 1.0)
    assert lengths.decide([Wish("a", 8), Wish("b", 2), Wish("c", 0)], rows=3) == {"a": 3, "b": 2}


def test_each_request_has_its_own_length() -> None:
    lengths = Lengths(8, passes=False)
    for rows, seconds in ((2, 1.0), (10, 1.4), (18, 1.8)):
        lengths.speaking.learn(rows, seconds)
    for _ in range(30):
        lengths.learn("good", 6, 6)
        lengths.learn("bad", 6, 0)
    counts = lengths.decide([Wish("good", 8), Wish("bad", 8)], rows=2)
    assert counts.get("good", 0) == 8 and counts.get("bad", 0) == 0
    lengths.forget("good")
    assert "good" not in lengths._rates
