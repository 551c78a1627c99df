"""Who has the beginning of a prompt: keys of what was sent where, bounded as the workers' pools are. No torch.

It is a guess: a wrong one costs time and never changes a text, since the workers look by keys of their own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import pairwise

FINE = 8
"""Every page up to here has a key; then every second up to twice as many, every fourth up to four times, and so on."""
_LONGEST = 1 << 24


def _places() -> Iterator[int]:
    count, step, limit = 1, 1, FINE
    while count <= _LONGEST:
        yield count
        if count == limit:
            step, limit = step * 2, limit * 2
        count += step


_PLACES = tuple(_places())
"""Numbers of pages that have a key, whatever comes after: dense at the beginning, sparse later."""
_EACH = tuple(stop - start for start, stop in pairwise((0, *_PLACES)))


def pages_of(keys: int) -> int:
    """Full pages that the first so many keys stand for."""
    return _PLACES[keys - 1] if keys else 0


def prefix_keys(tokens: Sequence[int], *, writer: str, salt: str, page_size: int) -> tuple[int, ...]:
    """Keys of the beginnings of ``tokens``, all of which one writer (a digest) wrote.

    A chain like the page table's: equal where writer, tenant's salt and all tokens so far are equal. Python's own
    hashes are many times faster than digests; who makes two prompts collide has only his own routed badly.
    """
    keys, start, running = [], 0, hash((writer, salt))
    for count in _PLACES[: bisect_right(_PLACES, len(tokens) // page_size)]:
        stop = count * page_size
        running = hash((running, tuple(tokens[start:stop])))
        keys.append(running)
        start = stop
    return tuple(keys)


class Places:
    """Key -> workers that should have those pages, as a set of bits; of each worker at most what its pool holds."""

    def __init__(self) -> None:
        self._who: dict[int, int] = {}
        self._known: dict[int, _Known] = {}

    def note(self, place: int, keys: Sequence[int], *, room: int) -> None:
        """Worker number ``place``, with ``room`` pages, has or will have what these keys stand for."""
        known = self._known.setdefault(place, _Known())
        bit, who, old = 1 << place, self._who, known.keys
        for number in range(len(keys) - 1, -1, -1):  # the beginning last: it is lost last
            key = keys[number]
            if key in old:
                old.move_to_end(key)
            else:
                old[key] = _EACH[number]
                known.pages += _EACH[number]
                who[key] = who.get(key, 0) | bit
        while known.pages > room:
            self._lose(place, known.lose())

    def forget(self, place: int) -> None:
        """The worker is new or gone."""
        for key in self._known.pop(place, _Known()).keys:
            self._lose(place, key)

    def along(self, keys: Sequence[int]) -> list[int]:
        """For each key, from the first, who should have the pages of it and of all before; ends where nobody has."""
        found, who = [], -1
        for key in keys:
            who &= self._who.get(key, 0)
            if not who:
                break
            found.append(who)
        return found

    def __len__(self) -> int:
        return len(self._who)

    def _lose(self, place: int, key: int) -> None:
        left = self._who[key] & ~(1 << place)
        if left:
            self._who[key] = left
        else:
            del self._who[key]


class _Known:
    """Keys of one worker with the pages that each adds, the longest unused first."""

    def __init__(self) -> None:
        self.keys: OrderedDict[int, int] = OrderedDict()
        self.pages = 0

    def lose(self) -> int:
        """The key that goes."""
        key, pages = self.keys.popitem(last=False)
        self.pages -= pages
        return key
