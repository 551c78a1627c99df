"""Workers by what they have to do: the least of any set, as a plain search would find it."""

import random

from heliostat.serve.router_sets import LEVELS, Levels, Turn, level_of, lowest


def test_levels_rise_with_work_and_tell_what_matters_apart() -> None:
    found = [level_of(work) for work in range(30_000)]
    assert found == sorted(found) and found[:17] == list(range(17)) and found[-1] < LEVELS
    for work in range(1, 10_000):
        assert level_of(round(work * 1.2) + 1) > level_of(work), "a fifth more is more"


def test_the_least_of_any_set_is_the_least() -> None:
    dice, levels = random.Random(0), Levels()
    work: dict[int, int] = {}
    for step in range(2000):
        place = dice.randrange(100)
        if dice.random() < 0.1:
            work.pop(place, None)
            levels.drop(place)
        else:
            work[place] = dice.randrange(200)
            levels.put(place, work[place])
        among = dice.getrandbits(100)
        there = {place for place in work if among >> place & 1}
        steps = list(levels.ascending(among))
        assert sum(steps) == sum(1 << place for place in there), step
        if there:
            least = min(level_of(work[place]) for place in there)
            assert {p for p in there if level_of(work[p]) == least} == {
                p for p in range(100) if steps[0] >> p & 1
            }


def test_turns_go_round() -> None:
    turn = Turn()
    assert [turn.one(0b10110) for _ in range(7)] == [1, 2, 4, 1, 2, 4, 1]
    assert turn.one(0b1) == 0 and lowest(0b1000) == 3
