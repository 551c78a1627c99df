"""The scheduler: what it decides in plain cases. What must hold in every case is in test_simulated_memory."""

import pytest

from heliostat.engine.page_table import PageTable
from heliostat.engine.request import Request, Sampling, State
from heliostat.engine.scheduler import OVERTAKEN, Scheduler
from heliostat.errors import Refused
from heliostat.family import SHARINGS

S, EOS = 4, 99


def scheduler(*, pages=16, budget=64, running=8, max_length=64):
    return Scheduler(
        PageTable(pages, page_size=S),
        max_length=max_length,
        max_tokens_per_step=budget,
        max_running=running,
        eos_ids=(EOS,),
    )


def request(name, prompt, sharing="independent", *, member="math", **sampling):
    """A request whose prompt is a number of tokens of its own, or a given list."""
    row = SHARINGS[sharing].instantiate(f"{member}.own")
    tokens = [ord(name) * 1000 + i for i in range(prompt)] if isinstance(prompt, int) else prompt
    digests = {module: module for module in row.modules}
    asked = Sampling(**{"max_tokens": 8, **sampling})
    return Request(name, row=row, digests=digests, prompt=tuple(tokens), sampling=asked, member=member)


def added(s, *args, **kwargs):
    r = request(*args, **kwargs)
    s.add(r)
    return r


def step(s, token=1):
    """A step in which speakers say ``token``; returns (id, start, stop, writer, speaker) of each chunk."""
    planned = s.schedule()
    s.commit(planned, {c.request.id: token for c in planned.chunks if c.speaker is not None})
    return [(c.request.id, c.start, c.stop, c.writer, c.speaker) for c in planned.chunks]


@pytest.mark.parametrize(
    ("sharing", "expected"),
    [
        ("independent", [(0, 6, "own", "own"), (6, 7, "own", "own"), (7, 8, "own", "own")]),
        ("sun", [(0, 6, "own", "own"), (6, 7, "base", "base"), (7, 8, "base", "base")]),
        ("prefillshare", [(0, 5, "base", None), (5, 6, "own", "own"), (6, 7, "own", "own")]),
        ("icarus", [(0, 5, "base", None), (5, 6, "base", "own"), (6, 7, "base", "own")]),
    ],
)
def test_chunks_of_each_sharing(sharing, expected):
    s = scheduler()
    added(s, "a", 6, sharing)
    names = {"own": "math.own", "base": "base", None: None}
    assert [step(s) for _ in range(3)] == [
        [("a", start, stop, names[writer], names[speaker])] for start, stop, writer, speaker in expected
    ]


def test_a_prompt_of_one_token_has_nothing_before_the_boundary():
    s = scheduler()
    added(s, "a", 1, "icarus")
    assert step(s) == [("a", 0, 1, "base", "math.own")]


def test_prefill_comes_in_chunks_beside_decoding_under_the_budget():
    s = scheduler(budget=8, running=4)
    added(s, "a", 5)
    assert step(s) == [("a", 0, 5, "math.own", "math.own")]
    added(s, "b", 17)
    assert [[c[:3] for c in step(s)] for _ in range(3)] == [
        [("a", 5, 6), ("b", 0, 7)],
        [("a", 6, 7), ("b", 7, 14)],
        [("a", 7, 8), ("b", 14, 17)],
    ]


def test_admission_is_by_arrival_and_bounded_by_running_and_pages():
    s = scheduler(pages=4, running=2)
    for name, prompt in (("a", 5), ("b", 12), ("c", 2), ("d", 2)):
        added(s, name, prompt, max_tokens=2)
    assert [c[0] for c in step(s)] == ["a"], "b does not fit, and c does not overtake it"
    assert [c[0] for c in step(s)] == ["a"]
    assert [c[0] for c in step(s)] == ["b", "c"], "d is one too many"


def conversation(s, name, tokens, **sampling):
    """A turn of a conversation: its tokens are a prompt's beginning, then the next turn's."""
    return added(s, name, tokens, **{"max_tokens": 1, **sampling})


def test_who_finds_its_pages_goes_before_those_that_would_write_over_them():
    s = scheduler(pages=6, running=1)
    tokens = list(range(1000, 1017))
    conversation(s, "a", tokens)
    step(s)
    for name in "bcd":
        added(s, name, 20, max_tokens=1)
    goes_on = conversation(s, "e", [*tokens, 1, 2, 3])
    order = [step(s)[0][0] for _ in range(4)]
    assert order == ["e", "b", "c", "d"]
    assert goes_on.cached_tokens == 16


def test_nobody_is_overtaken_more_often_than_allowed():
    s = scheduler(pages=6, running=1)
    tokens = list(range(1000, 1017))
    conversation(s, "a", tokens)
    step(s)
    waits = added(s, "b", 20, max_tokens=1)
    order: list[str] = []
    while not waits.answer:
        conversation(s, chr(200 + len(order)), [*tokens, len(order)])
        order += [chunk[0] for chunk in step(s)]
        assert len(order) < 100
    assert len(order) == OVERTAKEN + 1 and order[-1] == "b" and waits.overtaken == OVERTAKEN


def test_who_goes_first_but_does_not_fit_keeps_nobody_waiting():
    s = scheduler(pages=8, running=3)
    tokens = list(range(1000, 1017))
    conversation(s, "a", tokens)
    step(s)
    added(s, "b", 9, max_tokens=8)
    assert step(s)[0][0] == "b"
    small, large = added(s, "c", 5, max_tokens=1), conversation(s, "d", [*tokens, *range(2000, 2012)])
    assert [chunk[0] for chunk in step(s)] == ["b", "c"], "d finds four pages and has no room for four more"
    assert small.answer and large.state is State.WAITING and large.overtaken == 0


def test_who_was_preempted_goes_on_before_those_whose_pages_are_there():
    s = scheduler(pages=6, running=2)
    tokens = list(range(1000, 1009))
    conversation(s, "a", tokens)
    step(s)
    for name in "bc":
        added(s, name, 8, max_tokens=9)
    while not (lost := [r for r in s.waiting if r.preemptions]):
        step(s)
    conversation(s, "d", [*tokens, 1])
    order = []
    while lost[0].state is State.WAITING:
        order += [chunk[0] for chunk in step(s)]
    assert "d" not in order


def test_an_answer_ends_at_an_end_token():
    s = scheduler()
    r = added(s, "a", 5)
    step(s, 1)
    step(s, EOS)
    assert (r.state, r.finish_reason, r.answer) == (State.FINISHED, "stop", [1, EOS])
    assert s.unfinished == 0 and s.schedule().chunks == ()


@pytest.mark.parametrize(
    ("sampling", "answered", "reason"),
    [
        ({"max_tokens": 3, "ignore_eos": True}, 3, "length"),
        ({"max_tokens": 6, "min_tokens": 2}, 3, "stop"),
        ({"max_tokens": 1}, 1, "stop"),
    ],
)
def test_end_tokens_may_be_ignored_for_a_while(sampling, answered, reason):
    s = scheduler()
    r = added(s, "a", 5, **sampling)
    while s.unfinished:
        step(s, EOS)
    assert (len(r.answer), r.finish_reason) == (answered, reason)


def test_an_answer_ends_at_the_length_of_the_model():
    s = scheduler(max_length=9)
    r = added(s, "a", 6, max_tokens=100)
    while s.unfinished:
        step(s)
    assert (r.length, r.finish_reason) == (9, "length")


def test_commit_returns_what_it_finished():
    s = scheduler()
    first, second = added(s, "a", 5, max_tokens=1), added(s, "b", 5, max_tokens=2)
    planned = s.schedule()
    assert s.commit(planned, {"a": 1, "b": 1}) == [first]
    planned = s.schedule()
    assert s.commit(planned, {"b": 1}) == [second]


def test_too_long_is_refused_with_the_numbers():
    s = scheduler(pages=3, max_length=14)
    with pytest.raises(Refused, match="prompt has 14 tokens and the longest request here has 14.*at most 13"):
        s.add(request("a", 14))
    with pytest.raises(
        Refused, match="6 prompt tokens and an answer of up to 8 need 4 pages of 4; the pool has 3"
    ):
        s.add(request("b", 6, max_tokens=8))
    s.add(request("c", 6, max_tokens=7))
    assert s.unfinished == 1, "a refused request leaves nothing behind"


def test_what_just_fits_the_pool_finishes_in_it():
    s = scheduler(pages=3)
    r = added(s, "c", 6, max_tokens=7)
    while s.unfinished:
        step(s)
    assert len(r.answer) == 7 and s.table.available() == 3


def test_an_id_in_use_is_refused_and_free_again_afterwards():
    s = scheduler()
    added(s, "a", 5)
    with pytest.raises(Refused, match="already an unfinished request 'a'"):
        added(s, "a", 3)
    s.finish("a")
    added(s, "a", 3)


@pytest.mark.parametrize(("running", "budget"), [(0, 8), (9, 8)])
def test_a_budget_that_could_starve_somebody_is_refused(running, budget):
    with pytest.raises(Refused, match=f"max_running {running} with max_tokens_per_step {budget}"):
        scheduler(running=running, budget=budget)


def test_abort_releases_the_pages_in_every_state():
    s = scheduler(pages=8, running=2, budget=8)
    for name in "abc":
        added(s, name, 6)
    first = s.schedule()
    assert s.finish("a") and s.finish("c"), "while its step runs; while it waits"
    s.commit(first, {"a": 1, "b": 1})
    assert s.unfinished == 1
    step(s)
    assert s.finish("b", "stop") and not s.finish("b") and not s.finish("unknown")
    assert s.unfinished == 0 and s.table.available() == 8


def test_what_a_step_says_for_an_aborted_request_is_dropped_even_if_its_id_is_back():
    s = scheduler()
    old = added(s, "a", 5)
    planned = s.schedule()
    s.finish("a")
    new = added(s, "a", 5)
    s.commit(planned, {"a": 7})
    assert old.answer == [] and new.answer == [] and new.computed == 0
    assert step(s)[0][:3] == ("a", 0, 5), "nor is what it wrote offered to others"


def test_the_latest_arrival_gives_up_its_pages_and_replays_through_its_own_writers():
    s = scheduler(pages=4, budget=16)
    added(s, "a", 7, "sun", max_tokens=9)
    b = added(s, "b", 6, "sun", max_tokens=4)
    step(s)
    step(s)
    planned = s.schedule()  # position 8 of a needs a page, and there is none
    assert [c.request.id for c in planned.chunks] == ["a"] and planned.preempted == (b,)
    assert (b.state, b.pages, b.computed, b.preemptions, b.answer) == (State.WAITING, [], 0, 1, [1, 1])
    s.commit(planned, {"a": EOS})
    found = b.cached_tokens, s.table.counters.hit_tokens
    assert step(s) == [("b", 4, 6, "math.own", None)], (
        "the first page is still there; no token is sampled again"
    )
    assert step(s) == [("b", 6, 8, "base", "base")]
    assert (b.cached_tokens, s.table.counters.hit_tokens) == found == (0, 0)


def test_several_prompts_of_one_context_compute_it_once():
    s = scheduler(pages=32, budget=64)
    context = list(range(12))
    for number, member in enumerate(("math", "code", "plan")):
        added(s, member, [*context, 50 + number, 60], "icarus", member=member)
    assert [c[:3] for c in step(s)] == [("math", 0, 13)]
    assert [c[:3] for c in step(s)] == [("math", 13, 14), ("code", 12, 13), ("plan", 12, 13)]
    counters = s.table.counters
    assert (counters.queries, counters.hit_tokens) == (42, 24)
    assert counters.shared_hits == {("base", "code"): 12, ("base", "plan"): 12}
    assert [r.cached_tokens for r in s.running] == [0, 12, 12]


def test_who_waits_for_a_page_does_not_hold_up_the_others_nor_outlast_the_one_it_waits_for():
    s = scheduler(pages=32, budget=8)
    context = list(range(12))
    added(s, "a", [*context, 50])
    assert [c[:3] for c in step(s)] == [("a", 0, 8)]
    added(s, "b", [*context, 60])
    added(s, "c", 2)
    assert [c[:3] for c in step(s)] == [("a", 8, 13), ("c", 0, 2)]
    assert ("b", 12, 13) in [c[:3] for c in step(s)]


def test_a_cached_page_is_taken_when_the_request_comes_to_it_and_never_before():
    s, context = scheduler(pages=8, budget=4, running=2), list(range(8))
    table, one, two = s.table, request("x", [*context, 50]), request("y", [*context, 50])
    one.pages, two.pages = table.allocate(3), table.allocate(3)
    table.publish(one, 0)
    table.publish(two, 1)
    table.release(one.pages)
    table.release(table.allocate(table.available()))  # evicts page 0, so that page 1 is cached without it
    added(s, "a", [*context, 60])
    planned = s.schedule()
    s.abandon(planned)
    assert [c[:3] for c in step(s)] == [("a", 0, 4)], "its page 0 was given but never written"
    assert [c[:3] for c in step(s)] == [("a", 8, 9)]
    assert s.running[0].pages[1] == two.pages[1]


def test_an_abandoned_step_runs_again():
    s = scheduler()
    added(s, "a", 8)
    planned = s.schedule()
    with pytest.raises(AssertionError, match="neither committed nor abandoned"):
        s.schedule()
    s.abandon(planned)
    with pytest.raises(AssertionError, match="can be committed"):
        s.commit(planned, {"a": 1})
    assert step(s)[0][:3] == ("a", 0, 8)
