"""A step of the engine: which positions of which requests run together. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from heliostat.engine.request import Request


@dataclass(frozen=True, slots=True)
class Chunk:
    """Positions [start, stop) of a request, all written by ``writer``. Decoding is a chunk of one position.

    ``speaker`` is the module whose logits at stop - 1 choose the next token; None where that token is known.
    ``pages`` are the request's pages up to stop, as they were when this was scheduled. The last ``ahead`` positions
    are of tokens that are drafted and not known yet: the speaker says at each of them, and at the one before.
    """

    request: Request
    start: int
    stop: int
    writer: str
    speaker: str | None
    pages: tuple[int, ...]
    ahead: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """What runs together: at most one chunk a request, in the order of arrival."""

    chunks: tuple[Chunk, ...]
    preempted: tuple[Request, ...] = ()
    handed: tuple[Request, ...] = ()
    """Those that found all they were to run in the cache."""
