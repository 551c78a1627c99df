"""Requests that end at their boundary, and such that begin there: what the scheduler makes of them."""

import pytest

from heliostat.engine.request import State
from heliostat.errors import Refused
from tests.unit.engine.test_scheduler import EOS, S, request, scheduler, step


def handing(s, name, prompt, sharing="prefillshare", *, answer=(), **sampling):
    r = request(name, prompt, sharing, **sampling)
    r.hands_over = True
    r.answer.extend(answer)
    s.add(r)
    return r


def fetching(s, name, prompt, sharing="prefillshare", *, replays=False, **sampling):
    r = request(name, prompt, sharing, **sampling)
    r.fetches, r.replays = True, replays
    s.add(r)
    return r


@pytest.mark.parametrize(("sharing", "said"), [("prefillshare", []), ("icarus", []), ("sun", [1])])
def test_it_ends_at_its_boundary_and_keeps_its_pages(sharing, said):
    s = scheduler()
    r = handing(s, "a", 6, sharing)
    step(s)
    assert (r.state, r.answer, r.computed) == (State.HANDED, said, r.boundary)
    assert s.unfinished == 0 and s.handed == {"a": r} and len(r.pages) == 2
    assert s.table.available() == s.table.pages - 2
    assert s.finish("a") and s.table.available() == s.table.pages and not s.handed


def test_a_first_token_that_ends_the_answer_hands_nothing_over():
    s = scheduler()
    r = handing(s, "a", 6, "sun")
    step(s, EOS)
    assert (r.state, r.finish_reason) == (State.FINISHED, "stop") and not s.handed


@pytest.mark.parametrize("sharing", ["sun", "prefillshare", "independent"])
def test_a_prefill_that_is_asked_again_says_nothing_and_takes_no_page_of_the_answer(sharing):
    s = scheduler()
    first = request("a", 2 * S, sharing)
    s.add(first)
    while s.unfinished:
        step(s)
    assert first.state is State.FINISHED
    again = handing(s, "a", 2 * S, sharing, answer=[1] * S)
    for _ in range(3):
        step(s)
    assert again.state is State.HANDED and again.answer == [1] * S
    assert len(again.pages) == s.table.pages_for(again.boundary)


def test_a_prompt_that_is_all_there_is_handed_over_without_a_chunk():
    s = scheduler()
    handing(s, "a", 2 * S + 1)
    step(s)
    again = request("b", [ord("a") * 1000 + i for i in range(2 * S + 1)], "prefillshare")
    again.hands_over = True
    s.add(again)
    planned = s.schedule()
    assert (planned.chunks, planned.handed) == ((), (again,))
    s.commit(planned, {})
    assert again.cached_tokens == 2 * S and again.pages == s.handed["a"].pages


def test_pages_come_in_one_by_one_and_are_shared_like_any_others():
    s = scheduler()
    r = fetching(s, "a", 2 * S + 3)
    assert step(s) == [] and s.arriving == [r] and len(r.pages) == 3, (
        "it has its pages before they are filled"
    )
    s.arrived(r, 1)
    other = fetching(s, "b", [*r.prompt[: 2 * S], 5, 5])
    assert step(s) == [] and other.state is State.WAITING, "its second page is just coming in for another"
    s.arrived(r, 1)
    assert step(s) == [] and other.pages[:2] == r.pages[:2] and other.computed == 2 * S
    s.arrived(r, 1)
    s.arrived(other, 1)
    assert [c[:3] for c in step(s)] == [("a", r.boundary, r.boundary + 1), ("b", 2 * S + 1, 2 * S + 2)]


def test_what_another_fetched_need_not_come_again():
    s = scheduler()
    first = fetching(s, "a", 2 * S + 1)
    step(s)
    s.arrived(first, 2)
    s.finish("a")
    second = request("b", list(first.prompt), "prefillshare")
    second.fetches, second.replays = True, False
    s.add(second)
    assert [c[:3] for c in step(s)] == [("b", 2 * S, 2 * S + 1)] and not s.arriving


@pytest.mark.parametrize("replays", [False, True])
def test_who_loses_fetched_pages_runs_its_prompt_only_where_its_writer_is(replays):
    s = scheduler(pages=6)
    earlier = fetching(s, "a", 2 * S + 1, max_tokens=4 * S)
    later = fetching(s, "b", 2 * S + 1, replays=replays, max_tokens=4 * S)
    step(s)
    for r in (earlier, later):
        s.arrived(r, 2)
    while not later.preemptions:
        step(s)
    if replays:
        assert later.state is State.WAITING and not later.fetches and s.lost == []
    else:
        assert later.finish_reason == "lost" and s.lost == [later] and "b" not in {r.id for r in s.requests}
    assert not later.pages


def test_handed_pages_in_the_way_stop_a_step_until_they_are_released():
    s = scheduler(pages=3)
    handing(s, "a", 2 * S + 1, max_tokens=1)
    step(s)
    r = handing(s, "b", 2 * S + 2, max_tokens=1)
    assert step(s) == [] and s.unfinished == 1
    s.finish("a")
    assert [c[0] for c in step(s)] == ["b"] and r.state is State.HANDED


def test_one_id_is_one_request_also_while_it_is_handed_over():
    s = scheduler()
    handing(s, "a", 5)
    step(s)
    with pytest.raises(Refused, match="already an unfinished"):
        handing(s, "a", 5)


def test_a_prompt_alone_must_fit_where_it_is_handed_over():
    s = scheduler(pages=2, max_length=64)
    handing(s, "a", 2 * S, max_tokens=30)
    with pytest.raises(Refused, match="pages"):
        handing(s, "b", 2 * S + 2, max_tokens=1)


def test_a_page_that_is_given_out_again_has_another_generation():
    s = scheduler(pages=2)
    r = handing(s, "a", 2 * S)
    step(s)
    page, before = r.pages[0], list(s.table.generations)
    s.finish("a")
    assert list(s.table.generations) == before, "what it holds is still there for who was promised it"
    handing(s, "b", 2 * S)
    step(s)
    assert s.table.generations[page] == before[page] + 1


def test_who_finds_the_rest_of_its_prompt_in_the_cache_while_it_runs_goes_no_further():
    s = scheduler(budget=S, running=4)
    prompt = [7] * (3 * S + 1)
    r = handing(s, "a", prompt)
    step(s)
    other = request("b", prompt, "prefillshare")  # whoever wrote them meanwhile
    other.pages += s.table.allocate(3)
    for index in range(3):
        s.table.publish(other, index)
    s.table.release(other.pages)
    assert step(s) == [] and r.state is State.HANDED, "it took the others' pages and was at its boundary"
    assert (r.computed, len(r.pages)) == (3 * S, 3)
