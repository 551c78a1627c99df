"""Faults by a seed: each kind does what it is called, as often as its odds say, and the same story comes again."""

import asyncio
import secrets
from collections import Counter

import pytest

from heliostat.clock import run_virtual
from heliostat.engine.store import Fetch, Form, Gone, Promise, Store
from heliostat.serve.faults import ON_FRAMES, ON_PAGES, Chance, FaultyLine, Odds, faulty_shelves
from heliostat.serve.link import Ends

COUNT = 400


def story(odds: Odds, seed: int = 1) -> tuple[list[tuple[float, bytes]], Counter[str]]:
    """When which frames arrive of those sent one every tenth of a second."""

    async def play() -> tuple[list[tuple[float, bytes]], Counter[str]]:
        loop, arrived = asyncio.get_running_loop(), []
        there, here = Ends.pair()
        here.receive = lambda frame: arrived.append((round(loop.time(), 6), frame))
        line = FaultyLine(there, chance := Chance(seed, odds))
        for number in range(COUNT):
            line.send(number.to_bytes(4, "big"))
            await asyncio.sleep(0.1)
        await asyncio.sleep(10)
        return arrived, chance.met

    return run_virtual(play())


def test_without_odds_nothing_happens_and_a_seed_tells_one_story() -> None:
    arrived, met = story(Odds())
    assert [frame for _, frame in arrived] == [n.to_bytes(4, "big") for n in range(COUNT)] and not met
    odds = Odds(drop=0.1, delay=0.1, duplicate=0.1, truncate=0.1, flip=0.1, silence=0.02)
    assert story(odds) == story(odds) != story(odds, seed=2)


@pytest.mark.parametrize("fault", sorted(ON_FRAMES))
def test_each_fault_of_frames(fault: str) -> None:
    arrived, met = story(Odds(**{fault: 0.2}))
    frames = [frame for _, frame in arrived]
    sent = [n.to_bytes(4, "big") for n in range(COUNT)]
    many = met[fault]
    assert set(met) == {fault} and COUNT * 0.1 < many < COUNT * 0.3
    changed = [frame for frame in frames if frame not in sent]
    if fault == "drop":
        assert len(frames) == COUNT - many and not changed
    elif fault == "delay":
        assert sorted(frames) == sent and frames != sent
    elif fault == "duplicate":
        assert len(frames) == COUNT + many and not changed
    elif fault == "truncate":
        assert all(len(frame) < 4 for frame in changed) and len(changed) == many
    elif fault == "flip":
        assert len(frames) == COUNT and 0 < len(changed) <= many
        assert sum((int.from_bytes(f, "big") ^ n).bit_count() for n, f in enumerate(frames)) == many
    else:
        assert len(frames) < COUNT - many and not changed


@pytest.mark.parametrize("fault", sorted(ON_PAGES))
def test_each_fault_of_pages_is_refused_and_the_same_page_may_come_next_time(fault: str) -> None:
    name, form = f"heliostat-test-{secrets.token_hex(4)}", Form(4, 6, 64)
    source, own = (Store.make(f"{name}-{n}", "life", form) for n in (0, 1))
    try:
        for number, piece in enumerate(source.slices(2)):
            piece[:] = bytes([number + 1] * 64)
        promise = Promise(source.name, "life", [2], [source.generations[2]], [source.digest(2)])
        chance = Chance(3, Odds(**{fault: 0.5}))
        fetch = Fetch(faulty_shelves(chance).look(source.name), own, promise)
        refused = 0
        for _ in range(200):
            for piece in own.slices(1):
                piece[:] = bytes(64)
            try:
                fetch.bring(0, 1)
            except Gone:
                refused += 1
            else:
                assert own.digest(1) == promise.digests[0]
        assert refused == chance.met[fault] and 60 < refused < 140
        assert source.digest(2) == promise.digests[0], "who lends still has its page as it is"
    finally:
        for store in (source, own):
            store.close(remove=True)
