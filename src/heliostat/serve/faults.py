"""A line and memories of pages that go wrong, by chance and by a seed: what the house must survive, on purpose.

Everything is drawn in the order in which it happens. On an event loop of counted time a seed is a whole story, the
same every time.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from heliostat.engine.page_table import Generations
from heliostat.engine.store import Shelves, Store
from heliostat.serve.link import Line


@dataclass(frozen=True, slots=True, kw_only=True)
class Odds:
    """Chances (0 to 1) that a frame, or a page on its way, meets each fault. At most one each time."""

    drop: float = 0.0
    delay: float = 0.0
    """Late by up to ``latest`` seconds: those sent after it may come first."""
    duplicate: float = 0.0
    """Comes twice, the second time late."""
    truncate: float = 0.0
    flip: float = 0.0
    """A bit is another."""
    rewrite: float = 0.0
    """Pages only: given to somebody else, who writes it, while it is copied."""
    silence: float = 0.0
    """Frames only: nothing passes for up to ``longest`` seconds."""
    latest: float = 1.0
    longest: float = 3.0

    @property
    def faults(self) -> dict[str, float]:
        """Chance by name."""
        names = ("drop", "delay", "duplicate", "truncate", "flip", "rewrite", "silence")
        return {name: getattr(self, name) for name in names if getattr(self, name)}


@dataclass(slots=True, eq=False)
class Chance:
    """Draws faults and counts them."""

    seed: int
    odds: Odds
    met: Counter[str] = field(default_factory=Counter)
    dice: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)

    def draw(self, among: frozenset[str]) -> str:
        """The fault that comes now; empty: none."""
        point = self.dice.random()
        for name, chance in self.odds.faults.items():
            if name not in among:
                continue
            point -= chance
            if point < 0:
                self.met[name] += 1
                return name
        return ""

    def flipped(self, content: bytes) -> bytes:
        """The same bytes but for one bit."""
        place = self.dice.randrange(8 * len(content)) if content else 0
        changed = bytearray(content)
        if changed:
            changed[place // 8] ^= 1 << place % 8
        return bytes(changed)


ON_FRAMES = frozenset({"drop", "delay", "duplicate", "truncate", "flip", "silence"})
ON_PAGES = frozenset({"truncate", "flip", "rewrite"})


class FaultyLine:
    """A line whose frames meet faults on their way out."""

    def __init__(self, line: Line, chance: Chance) -> None:
        self._line, self._chance = line, chance
        self._silent_until = 0.0

    @property
    def receive(self) -> Callable[[bytes], None]:
        """Where frames that come in go."""
        return self._line.receive

    @receive.setter
    def receive(self, receive: Callable[[bytes], None]) -> None:
        self._line.receive = receive

    def send(self, frame: bytes) -> None:
        """Let a frame go, as it may."""
        loop, chance = asyncio.get_running_loop(), self._chance
        fault = chance.draw(ON_FRAMES)
        late = chance.dice.uniform(0, chance.odds.latest)
        if fault == "silence":
            self._silent_until = loop.time() + chance.dice.uniform(0, chance.odds.longest)
        if fault == "drop" or loop.time() < self._silent_until:
            return
        if fault in ("delay", "duplicate"):
            loop.call_later(late, self._line.send, frame)
        if fault == "truncate":
            frame = frame[: chance.dice.randrange(len(frame) or 1)]
        if fault == "flip":
            frame = chance.flipped(frame)
        if fault != "delay":
            self._line.send(frame)

    def close(self) -> None:
        """Of the line below."""
        self._line.close()


class FaultyStore(Store):
    """Another worker's memory whose pages meet faults while they are copied."""

    def meet(self, chance: Chance) -> FaultyStore:
        """From now on."""
        self._chance, self._late = chance, _Generations(self.generations)
        self.generations = self._late
        return self

    def copy(self, page: int, own: Store, target: int) -> None:
        """As it may. A page that is given to somebody else meanwhile holds his bytes from there on."""
        fault, dice = self._chance.draw(ON_PAGES), self._chance.dice
        pieces = list(zip(self.slices(page), own.slices(target), strict=True))
        turn = dice.randrange(len(pieces))
        for number, (source, place) in enumerate(pieces):
            if number >= turn and fault == "truncate":
                return
            place[:] = source
            if number == turn and fault == "flip":
                place[:] = self._chance.flipped(bytes(place))
            if number >= turn and fault == "rewrite":
                place[:] = dice.randbytes(len(place))
                self._late.given_out.add(page)


class _Generations:
    """Generations as they are; a page that was given out to somebody else shows it once."""

    def __init__(self, generations: Generations) -> None:
        self._generations = generations
        self.given_out: set[int] = set()

    def __getitem__(self, page: int) -> int:
        late = page in self.given_out
        self.given_out.discard(page)
        return self._generations[page] + late

    def __setitem__(self, page: int, generation: int) -> None:
        self._generations[page] = generation


def faulty_shelves(chance: Chance) -> Shelves:
    """Other workers' memories, with faults."""

    def look(name: str) -> Store:
        found = FaultyStore.look(name)
        assert isinstance(found, FaultyStore)
        return found.meet(chance)

    return Shelves(open=look)
