"""Who decodes and who prefills: by rows and digests, by work, by what is where, and by what was measured."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from heliostat.engine.request import Sampling
from heliostat.family import Row
from heliostat.serve.protocol import Described, Order, Role, Spent
from heliostat.serve.router import Nowhere, Route, Router, Wish
from heliostat.serve.router_breaker import FAILURES, FIRST_REST

PAGE = 4
OWN_READS = Row("own", "base", "base", "own")
BASE_READS = Row("base", "own", "own", "own")
SHARED = Row("base", "base", "own", "own")
ROWS = (OWN_READS, BASE_READS, SHARED, Row("own", "own", "own", "own"))
BOTH: tuple[Role, ...] = ("prefill", "decode")


def offer(name: str, *modules: str, roles: Sequence[Role] = BOTH, credit: int = 4) -> Described:
    digests = {module: f"digest of {module}" for module in modules}
    return Described(
        worker=name,
        incarnation="1",
        modules=digests,
        roles=tuple(roles),
        fit="fit",
        page_size=PAGE,
        dtype="float32",
        pages=64,
        page_bytes=1000,
        max_length=1000,
        max_running=8,
        credit=credit,
        hands=True,
    )


_numbers = iter(range(10**9))


def wish(row: Row, prompt: Sequence[int] = (1,) * 9, *, salt: str = "", **digests: str) -> Wish:
    known = {module: f"digest of {module}" for module in row.modules}
    order = Order(
        id=f"o{next(_numbers)}",
        row=row,
        digests=known | digests,
        prompt=tuple(prompt),
        sampling=Sampling(),
        salt=salt,
    )
    return Wish(order, PAGE)


def routed(router: Router, wanted: Wish, now: float = 0.0, **options: Sequence[str]) -> Route:
    found = router.route(wanted, now, **options)
    assert isinstance(found, Route), found
    return found


def sent(router: Router, wanted: Wish, now: float = 0.0) -> Route:
    route = routed(router, wanted, now)
    router.send(wanted, route)
    return route


def apart(*, readers: int = 2, speakers: int = 2) -> Router:
    """Workers for every row of ``ROWS``, those that prefill apart from those that decode."""
    router = Router()
    for n in range(readers):
        router.join(offer(f"p{n}", "base", "own", roles=["prefill"]))
    for n in range(speakers):
        router.join(offer(f"d{n}", "base", "own", roles=["decode"]))
    return router


def measured(router: Router, *, token: float, move: float) -> None:
    """Teach it what a token of a prompt and a page that comes over take."""
    for tokens in (8, 80):
        one = wish(ROWS[3], range(1000 * tokens, 1000 * tokens + tokens))
        route = sent(router, one)
        assert route.prefill is not None
        router.prefilled(one.order.id, Spent(ran=token * tokens, computed=tokens))
        pages = -(-tokens // PAGE)
        router.arrived(one.order.id, Spent(bytes=1000 * pages, moving=move * pages))
        router.ended(one.order.id)


@given(st.data())
def test_nobody_ever_stands_in_for_a_module(data: st.DataObject) -> None:
    router = Router()
    hosted: dict[str, Described] = {}
    for n in range(data.draw(st.integers(0, 6))):
        modules = data.draw(st.lists(st.sampled_from(["base", "own", "other"]), unique=True))
        roles = data.draw(st.sampled_from([BOTH[:1], BOTH[1:], BOTH]))
        hosted[f"w{n}"] = worker = offer(f"w{n}", *modules, roles=roles)
        if data.draw(st.booleans()) and "own" in modules:
            hosted[f"w{n}"] = replace(worker, modules={**worker.modules, "own": "another digest"})
        router.join(hosted[f"w{n}"])
    wanted = wish(data.draw(st.sampled_from(ROWS)))
    row, digests = wanted.order.row, wanted.order.digests

    def has(worker: Described, *modules: str) -> bool:
        return all(worker.modules.get(module) == digests[module] for module in modules)

    speakers = [w for w in hosted.values() if "decode" in w.roles and has(w, row.answer_writer, row.speaker)]
    readers = [w for w in hosted.values() if "prefill" in w.roles and has(w, row.prompt_writer)]
    route = router.route(wanted, 0.0)
    possible = speakers and (readers or any(has(w, row.prompt_writer) for w in speakers))
    assert isinstance(route, Route) == bool(possible), "who can is found, and only who can"
    if isinstance(route, Route):
        assert hosted[route.decode] in speakers
        assert has(hosted[route.prefill or route.decode], row.prompt_writer)
        assert route.prefill is None or hosted[route.prefill] in readers


def test_a_prompt_of_one_token_needs_no_writer_where_the_speaker_is_first() -> None:
    router = Router()
    router.join(offer("d", "own", roles=["decode"]))
    assert isinstance(router.route(wish(BASE_READS, [1, 2]), 0.0), Nowhere)
    assert routed(router, wish(BASE_READS, [1])) == Route("d", None, 1)


def test_the_least_to_do_decodes_and_those_alike_take_turns() -> None:
    router = apart(speakers=3)
    wishes = [wish(OWN_READS, range(n * 50, n * 50 + 9)) for n in range(6)]
    found = [sent(router, one).decode for one in wishes]
    assert sorted(found) == ["d0", "d0", "d1", "d1", "d2", "d2"]
    router.ended(wishes[1].order.id)
    assert routed(router, wish(OWN_READS)).decode == found[1]
    assert router.outstanding(found[0])[0] == 2 and router.outstanding(found[1])[0] == 1


def test_the_longest_beginning_is_worth_a_queue_but_not_any() -> None:
    router = apart()
    long = tuple(range(40 * PAGE))
    one = wish(OWN_READS, long)
    first = sent(router, one)
    router.prefilled(one.order.id, Spent())
    (other,) = {"p0", "p1"} - {str(first.prefill)}
    again = routed(router, wish(OWN_READS, (*long, 7, 7)))
    assert again.prefill == first.prefill and again.tail <= 2 + 8 * PAGE, (
        "what is ahead is what it needs itself"
    )
    for n in range(4):
        busy = wish(OWN_READS, range(10_000 * n, 10_000 * n + 200))
        router.send(busy, Route("d0", first.prefill, 200))
    assert routed(router, wish(OWN_READS, (*long, 7, 7))).prefill == other, (
        "waiting is longer than running it anew"
    )


def test_beginnings_are_of_one_writer_and_one_tenant() -> None:
    router = apart()
    prompt = tuple(range(32 * PAGE))
    first = wish(OWN_READS, prompt, salt="a")
    there = sent(router, first)
    router.prefilled(first.order.id, Spent())
    assert routed(router, wish(OWN_READS, prompt, salt="a")).tail == 1
    for other in (wish(OWN_READS, prompt, salt="b"), wish(BASE_READS, prompt, salt="a")):
        assert routed(router, other).tail == len(prompt)
    router.leave(str(there.prefill))
    router.join(offer(str(there.prefill), "base", "own", roles=["prefill"]))
    assert routed(router, wish(OWN_READS, prompt, salt="a")).tail == len(prompt), (
        "a new life has an empty pool"
    )


def test_answers_are_beginnings_where_one_module_writes_all() -> None:
    for row, shared in ((SHARED, True), (OWN_READS, False)):
        router = apart(readers=1, speakers=1)
        prompt, answer = tuple(range(8 * PAGE)), tuple(range(500, 500 + 8 * PAGE))
        one = wish(row, prompt)
        sent(router, one)
        router.ended(one.order.id, answer)
        later = wish(row, (*prompt, *answer, 3))
        found = router._places.along(later.keys)
        assert (len(found) > len(one.keys)) == shared


@pytest.mark.parametrize(
    ("move", "decoding", "short"),
    [(0.001, 0, True), (0.05, 2, True), (0.001, 2, False)],
    ids=["nobody waits for it", "pages come slowly", "others would wait longer than pages take"],
)
def test_a_short_tail_is_read_where_its_pages_are_when_that_was_measured_to_be_cheaper(
    move: float, decoding: int, short: bool
) -> None:
    router = apart(speakers=1)
    context = tuple(range(32 * PAGE))
    first = wish(SHARED, context)
    assert not sent(router, first).short
    router.ended(first.order.id)
    tail = wish(SHARED, (*context, 5, 6, 7))
    assert not routed(router, tail).short, "nothing was measured yet"
    measured(router, token=0.001, move=move)
    for n in range(decoding):
        router.send(wish(OWN_READS, [n] * 9), Route("d0", "p0", 9))
    route = routed(router, tail)
    assert (route.short, route.prefill is None) == (short, short)
    assert routed(router, wish(OWN_READS, (*context, 5))).prefill is not None, (
        "nothing of this writer is there"
    )


def test_without_anybody_who_prefills_who_has_the_module_does_it_and_nobody_else() -> None:
    router = Router()
    router.join(offer("p", "base", "own", roles=["prefill"]))
    router.join(offer("d", "base", roles=["decode"]))
    router.join(offer("e", "base", "own", roles=["decode"]))
    assert routed(router, wish(OWN_READS)).prefill == "p"
    router.leave("p")
    assert routed(router, wish(OWN_READS)) == Route("e", None, 9)
    router.leave("e")
    found = router.route(wish(OWN_READS), 0.0)
    assert isinstance(found, Nowhere) and "reads prompts with 'own'" in found.why
    router.leave("d")
    found = router.route(wish(OWN_READS), 0.0)
    assert isinstance(found, Nowhere) and "answers with 'base'" in found.why


def test_credit_holds_prefills_back_until_first_tokens_come() -> None:
    router = apart(speakers=1)
    wishes = [wish(OWN_READS, [n] * 9) for n in range(5)]
    for one in wishes[:4]:
        sent(router, one)
    found = router.route(wishes[4], 0.0)
    assert isinstance(found, Nowhere) and "hands full" in found.why
    router.prefilled(wishes[0].order.id, Spent(computed=9, ran=0.1))
    assert isinstance(router.route(wishes[4], 0.0), Nowhere), "its pages are still to come"
    router.arrived(wishes[0].order.id, Spent(bytes=10, moving=0.1))
    sent(router, wishes[4])
    for one in wishes:
        router.ended(one.order.id)
    assert router.outstanding("d0") == router.outstanding("p0") == router.outstanding("p1") == (0, 0)


def test_a_worker_that_fails_in_a_row_is_left_alone_then_tried_once() -> None:
    router = Router()
    router.join(offer("a", "base"))
    row = Row("base", "base", "base", "base")
    for _ in range(FAILURES - 1):
        router.failed("a", 0.0)
    assert routed(router, wish(row)).decode == "a"
    router.failed("a", 0.0)
    assert isinstance(router.route(wish(row), 0.0), Nowhere) and router.state("a") == "resting"
    assert router.next_probe() == FIRST_REST
    assert routed(router, wish(row), FIRST_REST).decode == "a"
    router.failed("a", 1.0)
    assert isinstance(router.route(wish(row), 1.0), Nowhere) and router.next_probe() == 1.0 + 2 * FIRST_REST
    assert routed(router, wish(row), 9.0).decode == "a"
    router.well("a")
    router.failed("a", 9.0)
    assert router.state("a") == "up", "one failure after it was well is one"


def test_one_order_tries_whether_a_worker_is_well_again() -> None:
    router, row = Router(), Row("base", "base", "base", "base")
    router.join(offer("a", "base"))
    for _ in range(10 * FAILURES):
        router.failed("a", 0.0)
    assert router.next_probe() == FIRST_REST, "one blip, whatever it failed"
    silent, tried = wish(row), wish(row)
    for trial in (silent, tried):
        sent(router, trial, 1.0)
        assert isinstance(router.route(wish(row), 1.0), Nowhere) and router.state("a") == "resting"
        if trial is silent:
            router.ended(trial.order.id)
    router.arrived(tried.order.id, None)
    assert routed(router, wish(row), 1.0).decode == "a"
    router.failed("a", 2.0)
    assert router.next_probe() == 2.0 + 2 * FIRST_REST, "a first token is no answer"


def test_those_that_failed_a_request_are_taken_only_where_nobody_else_can() -> None:
    router = apart()
    for _ in range(4):
        route = routed(router, wish(OWN_READS), rather_not=["d0", "p1"])
        assert (route.decode, route.prefill) == ("d1", "p0")
    router.leave("d1")
    assert routed(router, wish(OWN_READS), rather_not=["d0", "p1"]).decode == "d0"


@pytest.mark.parametrize("seed", range(3))
def test_what_is_counted_is_given_back_whatever_happens(seed: int) -> None:
    dice, router = random.Random(seed), apart(readers=3, speakers=3)
    flying: list[Wish] = []
    for step in range(600):
        name = dice.choice(["p0", "p1", "p2", "d0", "d1", "d2"])
        if dice.random() < 0.05:
            router.leave(name)
        elif dice.random() < 0.1:
            router.join(offer(name, "base", "own", roles=["prefill" if name[0] == "p" else "decode"]))
        elif dice.random() < 0.05:
            router.failed(name, float(step))
        one = wish(dice.choice(ROWS), [dice.randrange(3) for _ in range(dice.randrange(1, 60))])
        if isinstance(route := router.route(one, float(step)), Route):
            router.send(one, route)
            flying.append(one)
        if flying and dice.random() < 0.6:
            over = flying.pop(dice.randrange(len(flying)))
            if dice.random() < 0.5:
                router.prefilled(over.order.id, Spent(computed=3, ran=0.1))
            if dice.random() < 0.5:
                router.arrived(over.order.id, Spent(computed=3, ran=0.1, bytes=5, moving=0.1))
            router.ended(over.order.id, [1] * dice.randrange(20))
    for over in flying:
        router.ended(over.order.id)
    names = [*router._seats]
    assert all(router.outstanding(name) == (0, 0) for name in names)
    assert not router._orders
    for name in names:
        router.leave(name)
    assert not router._hosts and not len(router._places) and not router._up and not router._room
