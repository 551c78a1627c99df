"""Which worker decodes a request and which prefills it: filters, scorers, a picker, over what is known of workers.

It reads rows and digests, and no names of anything else. No torch, no clock, no waiting: who asks says what time it
is. Filters are sets of bits, so that a choice among a thousand workers takes microseconds (``router_sets``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from heliostat.serve.protocol import Described, Order, Role, Spent
from heliostat.serve.roster import family_name
from heliostat.serve.router_breaker import Breaker
from heliostat.serve.router_costs import Costs, measured
from heliostat.serve.router_places import Places, pages_of, prefix_keys
from heliostat.serve.router_sets import Levels, Turn

ROLES: tuple[Role, ...] = ("prefill", "decode")
PREFILL, DECODE = ROLES
Hosted = tuple[str, str]
"""A module's name and its digest, both the engine's."""


@dataclass(frozen=True)
class Wish:
    """What an order needs of the workers that play its row's parts."""

    order: Order
    page_size: int

    @cached_property
    def boundary(self) -> int:
        """Positions that the prompt's writer must write; 0: none, so that nobody need host it."""
        return self.order.row.boundary(len(self.order.prompt))

    @cached_property
    def writer(self) -> Hosted:
        """Who must write the prompt."""
        return self._hosted(self.order.row.prompt_writer)

    @cached_property
    def answerers(self) -> frozenset[Hosted]:
        """Who must write and speak the answer."""
        return frozenset(map(self._hosted, (self.order.row.answer_writer, self.order.row.speaker)))

    def _hosted(self, module: str) -> Hosted:
        return module, self.order.digests[module]

    @cached_property
    def keys(self) -> tuple[int, ...]:
        """Keys of the prompt's beginnings."""
        return self.keys_of(self.order.prompt[: self.boundary])

    def keys_of(self, written: Sequence[int]) -> tuple[int, ...]:
        """Keys of what the prompt's writer wrote."""
        return prefix_keys(written, writer=self.writer[1], salt=self.order.salt, page_size=self.page_size)


@dataclass(frozen=True, slots=True)
class Route:
    """Who does it. Without ``prefill`` the one that decodes does all."""

    decode: str
    prefill: str | None
    tail: int
    """Prompt tokens that will have to run, as far as is known."""
    short: bool = False
    """Whether it is prefilled where its pages are although there are workers for that."""

    @property
    def names(self) -> tuple[str, ...]:
        """Everybody who takes part."""
        return (self.decode,) if self.prefill is None else (self.prefill, self.decode)


@dataclass(frozen=True, slots=True)
class Nowhere:
    """Nobody can do it now."""

    why: str
    busy: bool = False
    """Whether somebody could who has no hand free."""


@dataclass(slots=True, eq=False)
class _Seat:
    """A worker, by the number of its bit."""

    place: int
    offer: Described
    breaker: Breaker
    costs: Costs = field(default_factory=Costs)
    decoding: int = 0
    coming: int = 0
    """Of these, requests that others prefill and whose first token here has not come."""
    ahead: int = 0
    """Prompt tokens that it was sent and has not run yet."""
    trial: str = ""
    """The order that tries whether it is well again; nothing else comes here meanwhile."""


@dataclass(slots=True)
class _Sent:
    """An order that is on its way."""

    wish: Wish
    decode: _Seat
    prefill: _Seat
    """Who runs the prompt: maybe the same."""
    ahead: int
    """Tokens before its own, when it was sent."""
    tail: int
    """0 when the prompt has been run."""
    coming: bool


class Router:
    """Knows workers by name; every order that is ``sent`` must be ``ended``."""

    def __init__(self) -> None:
        self._seats: dict[str, _Seat] = {}
        self._by_place: dict[int, _Seat] = {}
        self._hosts: dict[Hosted, int] = {}
        self._roles = dict.fromkeys((*ROLES, "apart"), 0)
        self._up = self._half = 0
        """Those that may be asked (a worker whose breaker is open may not), and of them those with one order only."""
        self._room = 0
        """Those that can take in one more that another prefills."""
        self._broken: set[str] = set()
        self._decoding, self._ahead = Levels(), Levels()
        self._places = Places()
        self._turns = {role: Turn() for role in ROLES}
        self._orders: dict[str, _Sent] = {}
        self._everybody = Costs()

    # ---- workers

    def join(self, offer: Described) -> None:
        """A worker is ready, or says anew what it hosts. One that was away comes back with an empty pool."""
        seat = self._seats.get(offer.worker)
        if seat is None:
            place = next(n for n in range(len(self._by_place) + 1) if n not in self._by_place)
            seat = self._seats[offer.worker] = self._by_place[place] = _Seat(place, offer, Breaker())
        self._set_bits(seat, on=False)
        seat.offer = offer
        self._set_bits(seat, on=True)
        self._up |= 1 << seat.place
        self._weigh(seat)

    def leave(self, name: str) -> None:
        """A worker is gone, or takes nothing more; what it was sent must still be ended."""
        if (seat := self._seats.pop(name, None)) is None:
            return
        self._set_bits(seat, on=False)
        bit = ~(1 << seat.place)
        self._up, self._room, self._half = self._up & bit, self._room & bit, self._half & bit
        self._broken.discard(name)
        self._decoding.drop(seat.place)
        self._ahead.drop(seat.place)
        self._places.forget(seat.place)
        del self._by_place[seat.place]

    def _set_bits(self, seat: _Seat, *, on: bool) -> None:
        bit = 1 << seat.place
        for hosted in seat.offer.modules.items():
            who = self._hosts.get(hosted, 0) & ~bit | (bit if on else 0)
            if who:
                self._hosts[hosted] = who
            else:
                self._hosts.pop(hosted, None)
        for role in seat.offer.abilities:
            self._roles[role] = self._roles[role] & ~bit | (bit if on else 0)

    def _weigh(self, seat: _Seat) -> None:
        """Its work has changed."""
        if self._by_place.get(seat.place) is not seat:
            return
        self._decoding.put(seat.place, seat.decoding)
        self._ahead.put(seat.place, -(-seat.ahead // seat.offer.page_size))
        bit = 1 << seat.place
        self._room = self._room | bit if seat.coming < seat.offer.credit else self._room & ~bit

    def well(self, name: str) -> None:
        """A worker did what it was asked."""
        if (seat := self._seats.get(name)) is not None:
            seat.breaker.close()
            self._broken.discard(name)
            self._let(seat, up=True)

    def failed(self, name: str, now: float) -> None:
        """A worker did not do what it was asked, and should have."""
        if (seat := self._seats.get(name)) is not None and seat.breaker.fail(now):
            self._broken.add(name)
            self._let(seat, up=False)

    def _let(self, seat: _Seat, *, up: bool, half: bool = False, trial: str = "") -> None:
        """Whether it may be asked, ``half``: with one order; ``trial``: the one of which it is waited what comes."""
        bit, seat.trial = 1 << seat.place, trial
        self._up = self._up | bit if up else self._up & ~bit
        self._half = self._half | bit if half else self._half & ~bit

    def _probe(self, now: float) -> None:
        """Those whose time is up may be tried with one order."""
        for name in [name for name in self._broken if self._seats[name].breaker.due(now)]:
            self._broken.discard(name)
            self._let(self._seats[name], up=True, half=True)

    def next_probe(self) -> float | None:
        """When a worker that may not be asked may be asked again; None where there is none such."""
        return min((self._seats[name].breaker.until for name in self._broken), default=None)

    # ---- choosing

    def route(self, wish: Wish, now: float, *, rather_not: Iterable[str] = ()) -> Route | Nowhere:
        """Who decodes and who prefills; those named are taken only where nobody else can."""
        if self._broken:
            self._probe(now)
        shunned = 0
        for name in rather_not:
            shunned |= 1 << seat.place if (seat := self._seats.get(name)) is not None else 0
        able = self._able(wish) & self._up
        writers = (self._hosts.get(wish.writer, 0) if wish.boundary else able) & self._up
        helpers = writers & self._roles[PREFILL] if wish.boundary else 0
        # Who decodes must have room for what others prefill, or prefill itself.
        ready = able & (self._room | (helpers & able)) if helpers else able & writers
        if not ready:
            return self._nowhere(wish, able)
        found = self._places.along(wish.keys)
        seat = self._decoder(ready & ~shunned or ready, found)
        return self._with_writer(wish, seat, helpers & ~shunned or helpers, writers, found)

    def _able(self, wish: Wish) -> int:
        """Who could decode it, up or not."""
        row = wish.order.row
        able = self._roles[DECODE if row.prompt_writer == row.answer_writer else "apart"]
        for hosted in wish.answerers:
            able &= self._hosts.get(hosted, 0)
        return able

    def _decoder(self, ready: int, found: Sequence[int]) -> _Seat:
        """The least to do; among those alike, who has most of the prompt already."""
        least = next(self._decoding.ascending(ready))
        knowing = next((least & who for who in reversed(found) if least & who), least)
        return self._by_place[self._turns[DECODE].one(knowing)]

    def _with_writer(
        self, wish: Wish, seat: _Seat, helpers: int, writers: int, found: Sequence[int]
    ) -> Route:
        bit = 1 << seat.place
        here = self._tail(wish, sum(1 for who in found if who & bit))
        others = helpers & ~bit if seat.coming < seat.offer.credit else 0
        if not others:
            return Route(seat.offer.worker, None, here)
        helper, there = self._helper(wish, others, found)
        # Who only decodes prefills no more than the end of what it has.
        if writers & bit and (helpers & bit or here < len(wish.order.prompt)):
            own, away = self._cost_here(seat, here), self._cost_there(wish, seat, helper, here, there)
            if own is None or away is None:
                cheaper = bool(helpers & bit)
            else:
                cheaper = own <= away
            if cheaper:
                return Route(seat.offer.worker, None, here, short=not helpers & bit)
            seat.costs.prefill.forget()
        return Route(seat.offer.worker, helper.offer.worker, there)

    def _helper(self, wish: Wish, among: int, found: Sequence[int]) -> tuple[_Seat, int]:
        """Who prefills, and how much of the prompt: the longest beginning it has, against what is ahead of it.

        Only those can be best who have a longer beginning than everybody with less to do: a short staircase.
        """
        depth, best, least = -1, None, 0.0
        for here in self._ahead.ascending(among):
            if depth >= 0 and (depth == len(found) or not here & found[depth]):
                continue
            depth = max(depth, 0)
            while depth < len(found) and here & found[depth]:
                depth += 1
            alike = here & found[depth - 1] if depth else here
            seat = self._by_place[self._turns[PREFILL].one(alike)]
            tail = self._tail(wish, depth)
            cost = self._seconds(seat, tail)
            if best is None or cost < least:
                best, least = (seat, tail), cost
        assert best is not None, "somebody can"
        return best

    def _tail(self, wish: Wish, depth: int) -> int:
        """Tokens that must run; the last one always does."""
        return max(1, len(wish.order.prompt) - pages_of(depth) * wish.page_size)

    # ---- what it costs

    def _seconds(self, seat: _Seat, tail: int) -> float:
        """Until a prompt has been run there; where nothing was measured yet, one for each token."""
        wait = measured(seat.costs.wait, self._everybody.wait, seat.ahead)
        run = measured(seat.costs.prefill, self._everybody.prefill, tail)
        return float(seat.ahead + tail) if run is None else run + (wait or 0.0)

    def _cost_here(self, seat: _Seat, tail: int) -> float | None:
        """Seconds if it prefills itself; all that it decodes waits as long. None: nobody has measured."""
        run = measured(seat.costs.prefill, self._everybody.prefill, seat.ahead + tail)
        return None if run is None else run * (1 + seat.decoding)

    def _cost_there(self, wish: Wish, seat: _Seat, helper: _Seat, here: int, there: int) -> float | None:
        """Seconds if another worker prefills and the pages that are missing come over."""
        size = -(-here // wish.page_size) * seat.offer.page_bytes
        moved = measured(seat.costs.transfer, self._everybody.transfer, size)
        if moved is None or not self._everybody.prefill.weight:
            return None
        return self._seconds(helper, there) + moved

    # ---- orders

    def send(self, wish: Wish, route: Route) -> None:
        """The order goes out."""
        decode = self._seats[route.decode]
        prefill = self._seats[route.prefill or route.decode]
        coming = prefill is not decode
        self._orders[wish.order.id] = _Sent(wish, decode, prefill, prefill.ahead, route.tail, coming)
        decode.decoding += 1
        decode.coming += coming
        prefill.ahead += route.tail
        for seat in {decode.place: decode, prefill.place: prefill}.values():
            self._places.note(seat.place, wish.keys, room=seat.offer.pages)
            self._weigh(seat)
            if self._half >> seat.place & 1:
                self._let(seat, up=False, trial=wish.order.id)

    def prefilled(self, id: str, spent: Spent) -> None:
        """The prompt has been run."""
        sent = self._orders[id]
        for costs in (sent.prefill.costs, self._everybody):
            costs.wait.learn(sent.ahead, spent.waited)
            if spent.computed:
                costs.prefill.learn(spent.computed, spent.ran)
        self._run(sent)

    def arrived(self, id: str, spent: Spent | None) -> None:
        """The first token came from who decodes it; ``spent``: what that took."""
        sent = self._orders[id]
        if sent.tail and spent is not None:
            self.prefilled(id, spent)
        elif sent.coming and spent is not None and spent.bytes:
            for costs in (sent.decode.costs, self._everybody):
                costs.transfer.learn(spent.bytes, spent.moving)
        if sent.decode.trial == id:  # that is enough for others to come; one more failure still opens it
            self._let(sent.decode, up=True)
        self._come(sent)

    def _run(self, sent: _Sent) -> None:
        """Its prompt is no more ahead of others."""
        sent.prefill.ahead -= sent.tail
        sent.tail = 0
        self._weigh(sent.prefill)

    def _come(self, sent: _Sent) -> None:
        sent.decode.coming -= sent.coming
        sent.coming = False
        self._weigh(sent.decode)

    def ended(self, id: str, answer: Sequence[int] = ()) -> None:
        """An order is over, well or not; what it said may be asked again as part of a prompt."""
        sent = self._orders.pop(id)
        self._run(sent)
        sent.decode.decoding -= 1
        self._come(sent)
        for tried in (sent.decode, sent.prefill):
            if tried.trial == id and self._by_place.get(tried.place) is tried:
                self._let(tried, up=True, half=True)  # it says nothing for or against the worker
        wish, seat = sent.wish, sent.decode
        if answer and wish.order.row.answers_become_prompts and self._by_place.get(seat.place) is seat:
            # The last token is said and not read, so it stands in no page.
            keys = wish.keys_of([*wish.order.prompt, *answer[:-1]])
            self._places.note(seat.place, keys, room=seat.offer.pages)

    # ---- telling

    def _nowhere(self, wish: Wish, able: int) -> Nowhere:
        writer, speakers = wish.writer[0], sorted({family_name(name) for name, _ in wish.answerers})
        reader = f"no worker is there that reads prompts with {family_name(writer)!r}"
        if not able:
            return Nowhere(f"no worker is there that answers with {' and '.join(map(repr, speakers))}")
        if not self._hosts.get(wish.writer, 0) & self._up:
            return Nowhere(reader)
        if not self._hosts.get(wish.writer, 0) & self._up & self._roles[PREFILL]:
            return Nowhere(f"{reader} for others, and none of those that answer has it")
        return Nowhere("every worker that could answer has its hands full", busy=True)

    def outstanding(self, name: str) -> tuple[int, int]:
        """(requests that a worker decodes, prompt tokens ahead of it)."""
        seat = self._seats.get(name)
        return (seat.decoding, seat.ahead) if seat is not None else (0, 0)

    def state(self, name: str) -> str:
        """``up``, ``resting`` (it failed, and is left alone for a while) or ``gone``."""
        up = name in self._seats and self._up >> self._seats[name].place & 1
        return "up" if up else "resting" if name in self._seats else "gone"
