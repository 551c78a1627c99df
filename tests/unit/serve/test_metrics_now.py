"""Workers put together: no total falls, whoever is silent, dies or comes back."""

from heliostat.serve.metrics_now import Lives, Snapshot, together
from heliostat.serve.protocol import Parting, Stats


def counting(count: int) -> Stats:
    met = Parting("a", "b", count, count, count, count, {"alike": count})
    return Stats(
        running={"a": 1},
        pages=8,
        available=4,
        shared_hits=(("base", "a", count),),
        evictions=count,
        rows={"base": count},
        passes={"base": count},
        prefixes=(met,),
    )


def totals(now: Snapshot) -> set[int]:
    met = now.prefixes["a", "b"]
    return {
        now.evictions,
        now.rows["base"],
        now.passes["base"],
        now.shared_hits["base", "a"],
        met.common,
        met.outcomes["alike"],
    }


def test_totals_never_fall() -> None:
    lives = Lives()

    def look(told: dict[str, int], **there: str) -> tuple[set[int], int, int]:
        found = together(lives.note({name: counting(count) for name, count in told.items()}, there))
        return totals(found), found.running.get("a", 0), found.pages

    assert look({"v": 5, "w": 7}, v="1", w="1") == ({12}, 2, 16)
    assert look({"v": 6}, v="1", w="1") == ({13}, 2, 16), "w is silent"
    assert look({"v": 6}, v="1") == ({13}, 1, 8), "w is gone: nothing runs there"
    assert look({"v": 6, "w": 7}, v="1", w="1") == ({13}, 2, 16), "it was only away"
    assert look({"v": 6, "w": 1}, v="1", w="2") == ({14}, 2, 16), "another life"
    assert look({"w": 2}, w="2") == ({15}, 1, 8)
    assert look({}) == ({15}, 0, 1)
