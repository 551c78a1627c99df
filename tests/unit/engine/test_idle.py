"""Eviction: prefixes that are asked for again outlast floods of texts that are not, and nothing stays for ever."""

import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from hypothesis import given
from hypothesis import strategies as st

from heliostat.engine.idle import MOST_HITS, Idle
from heliostat.engine.page_table import PageTable
from heliostat.engine.request import Request
from heliostat.family import Row

S, PAGES = 4, 64


class Oldest(Idle):
    """Plain LRU, to be better than: the longest unused goes first, whatever it was worth."""

    def __init__(self) -> None:
        self.pages: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self.pages)

    def __contains__(self, page: int) -> bool:
        return page in self.pages

    def __iter__(self) -> Iterator[int]:
        return iter(self.pages)

    def add(self, page: int, *, hits: int, after: int | None = None) -> None:
        self.pages[page] = None

    def remove(self, page: int) -> None:
        self.pages.pop(page, None)

    def pop(self) -> int:
        return self.pages.popitem(last=False)[0]


def serve(table: PageTable, tokens: Sequence[int]) -> int:
    """One request from its first to its last page; the tokens it found."""
    request = Request("r", row=Row("w", "w", "w", "w"), digests={"w": "w"}, prompt=tuple(tokens))
    cached = table.match(request)
    table.take(request, cached)
    request.pages += cached
    request.pages += table.allocate(table.pages_for(request.length) - len(cached))
    for index in range(len(cached), request.length // S):
        table.publish(request, index)
    table.release(request.pages)
    return len(cached) * S


def fresh(chance: random.Random, pages: int) -> list[int]:
    return [chance.randrange(10**9) for _ in range(pages * S + 1)]


def trace(seed: int, *, pause: int) -> list[list[int]]:
    """Five agents whose contexts grow, each away for about ``pause`` texts that nobody asks for twice."""
    chance = random.Random(seed)
    contexts, texts = [fresh(chance, 4) for _ in range(5)], []
    for _ in range(30):
        for context in contexts:
            texts.append(list(context))
            context += [chance.randrange(10**9) for _ in range(2)]
            texts += [fresh(chance, chance.randrange(1, 5)) for _ in range(chance.randrange(2 * pause))]
    return texts


def hit_rate(texts: Sequence[Sequence[int]], idle: Idle | None = None) -> float:
    table = PageTable(PAGES, page_size=S)
    if idle is not None:
        table._idle = idle
    return sum(serve(table, text) for text in texts) / sum(map(len, texts))


def test_agents_that_pause_find_their_prefixes_again_where_lru_lost_them() -> None:
    for seed in range(5):
        # While one agent is away the others and the flood fill the pool once, or twice.
        for pause, gain in ((4, 1.5), (8, 3.0)):
            texts = trace(seed, pause=pause)
            ours, lru = hit_rate(texts), hit_rate(texts, Oldest())
            assert ours > gain * lru, (seed, pause, ours, lru)


def test_where_there_is_no_flood_nothing_is_lost() -> None:
    texts = trace(1, pause=1)
    assert hit_rate(texts) >= hit_rate(texts, Oldest()) > 0


def test_what_was_popular_once_goes_in_the_end() -> None:
    table, chance = PageTable(PAGES, page_size=S), random.Random(0)
    hot = fresh(chance, 4)
    for _ in range(100):
        serve(table, hot)
    turnover = PAGES // 4
    for _ in range(turnover * MOST_HITS // 2):
        serve(table, fresh(chance, 4))
    assert serve(table, hot) == 4 * S, "it is still worth something"
    for _ in range(turnover * (MOST_HITS + 3)):
        serve(table, fresh(chance, 4))
    assert serve(table, hot) == 0


def test_what_is_asked_for_again_after_it_was_lost_is_kept_longer() -> None:
    def found(idle: Idle | None) -> list[int]:
        table, chance = PageTable(PAGES, page_size=S), random.Random(0)
        table._idle = table._idle if idle is None else idle
        context = fresh(chance, 4)
        rounds = []
        for _ in range(4):
            rounds.append(serve(table, context))
            for _ in range(PAGES // 4):  # one turnover: before it returns it is just lost
                serve(table, fresh(chance, 4))
        return rounds

    assert found(None) == [0, 0, 4 * S, 4 * S]
    assert found(Oldest()) == [0, 0, 0, 0]


def test_keys_that_were_lost_are_remembered_for_no_more_than_a_pool() -> None:
    table, chance = PageTable(8, page_size=S), random.Random(0)
    for _ in range(50):
        serve(table, fresh(chance, 2))
    assert len(table._lost) == 8


@given(st.lists(st.tuples(st.sampled_from(["add", "remove", "pop"]), st.integers(0, 9), st.integers(0, 20))))
def test_the_order_told_is_the_order_of_going(events: list[tuple[str, int, int]]) -> None:
    idle = Idle()
    for what, page, hits in events:
        if what == "add" and page not in idle:
            behind = next(iter(idle), None) if hits % 2 else None
            idle.add(page, hits=hits, after=behind)
            order = list(idle)
            assert behind is None or order.index(behind) < order.index(page)
        elif what == "remove":
            idle.remove(page)
            assert page not in idle
        elif what == "pop" and len(idle):
            order = list(idle)
            assert idle.pop() == order[0] and list(idle) == order[1:]
        assert len(list(idle)) == len(idle) and len(idle._by_due) <= MOST_HITS + 2
    order = list(idle)
    assert [idle.pop() for _ in order] == order and not idle._by_due
