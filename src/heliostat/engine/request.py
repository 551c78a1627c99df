"""What the engine is asked for: how to sample, and a request with its row, tokens and progress. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from enum import StrEnum
from typing import Literal, Protocol

from heliostat.engine.speculation.rule import Rule, Speculated
from heliostat.errors import Refused
from heliostat.family import Row

FinishReason = Literal["stop", "length", "abort", "handed", "lost", "gone"]
"""``stop``: end token or stop string; ``length``: max_tokens or the model's length; ``abort``: unwanted.

Where prompt and answer run apart also ``handed``: it stands at its boundary, another engine goes on; ``lost``: it lost
pages that it cannot write itself; ``gone``: pages that it was to fetch are not there."""

_LIMITS: Mapping[str, tuple[float, float]] = {
    "max_tokens": (1, math.inf),
    "min_tokens": (0, math.inf),
    "temperature": (0, math.inf),
    "top_p": (0, 1),
    "top_k": (0, math.inf),
    "min_p": (0, 1),
    "choice": (0, math.inf),
    "logprobs": (0, math.inf),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How answer tokens are chosen. Noise is a function of (seed, choice, position), never of the batch.

    Raises Refused for a value outside its limits.
    """

    max_tokens: int = 256
    """Most answer tokens, the end token included."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability; 1 keeps every token."""
    top_k: int = 0
    """0 keeps every token."""
    min_p: float = 0.0
    """Only tokens at least this times as likely as the likeliest; 0 keeps every token."""
    seed: int = 0
    """The same seed gives the same answer, whatever else runs."""
    choice: int = 0
    """Which of the n answers to one prompt this is; each has its own noise."""
    min_tokens: int = 0
    """Answer tokens before an end token may be chosen."""
    ignore_eos: bool = False
    """Go on past end tokens, up to max_tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are left out of it."""
    logprobs: int | None = None
    """Top log-probabilities to report with each answer token; 0: the chosen token's only."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens that the answer already has."""
    frequency_penalty: float = 0.0
    """Taken off the logits of tokens, once for every time that the answer already has them."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids; -100 forbids a token."""

    def __post_init__(self) -> None:
        for name, (low, high) in _LIMITS.items():
            value = getattr(self, name)
            if value is not None and not (low <= value <= high and value < math.inf):
                allowed = (
                    f"allowed is {low:g} to {high:g}" if high < math.inf else f"it must be at least {low:g}"
                )
                raise Refused(
                    f"{name} is {value!r}; {allowed}{'' if abs(value) < math.inf else ', and finite'}"
                )
        if self.top_p == 0:
            raise Refused("top_p is 0, which keeps no token; allowed is above 0 to 1 (greedy: temperature 0)")
        if self.min_tokens > self.max_tokens:
            raise Refused(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}")
        if "" in self.stop:
            raise Refused("an empty stop string would end every answer before it begins")
        for token, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:
                raise Refused(f"logit_bias of token {token} is {bias!r}; allowed is -100 to 100")


class State(StrEnum):
    """Where a request stands: ``new`` until the scheduler has it; a preempted one is ``waiting`` again.

    ``handed``: nothing of it runs any more, but its pages are held until they are released."""

    NEW = "new"
    WAITING = "waiting"
    RUNNING = "running"
    HANDED = "handed"
    FINISHED = "finished"


class Matcher(Protocol):
    """What one answer may say by its grammar. It belongs to one request, and is asked before every token."""

    def allowed(self, answer: Sequence[int]) -> bytes:
        """One bit a token id, the lowest first: those that may follow ``answer``; end tokens where it is whole.

        Asked next about an answer that goes on from this one, or about a beginning of it.

        Raises Refused where the grammar cannot go on.
        """


@dataclass(slots=True, eq=False)
class Request:
    """One prompt to answer through one row. Raises Refused for an empty prompt, or a grammar without an end.

    One that begins with an ``answer`` goes on from it. The fields below ``answer`` belong to the scheduler: nobody
    else changes them.
    """

    id: str
    _: KW_ONLY
    row: Row
    digests: Mapping[str, str]
    """Digest of each module of the row when the request came in. Page keys are made of these, so a module
    that is loaded again under its name with other weights never meets the old one's pages."""
    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    member: str = ""
    """Whose counters it goes to; nothing is decided by it."""
    salt: str = ""
    """The tenant's: different salts never share a page. Set by the server, never by the user."""
    matcher: Matcher | None = None
    """Holds the answer to a grammar; it then ends where the grammar does, min_tokens or not."""
    hands_over: bool = False
    """It ends at its boundary; its pages are kept for whoever goes on from there."""
    fetches: bool = False
    """What stands below the boundary is brought in from elsewhere, page by page, and not run."""
    replays: bool = True
    """Whether what it fetched could be run here as well, if its pages are lost."""
    speculation: Rule | None = None
    """By which rule drafted tokens are taken; None: none are drafted."""

    answer: list[int] = field(default_factory=list)
    computed: int = 0
    """Positions whose keys and values are in ``pages``: computed <= length."""
    pages: list[int] = field(default_factory=list)
    """Page numbers in the order of positions; page i holds positions [i * S, (i + 1) * S)."""
    page_keys: list[bytes | None] = field(default_factory=list)
    """Keys of its full pages, remembered as PageTable.key_of finds them."""
    state: State = State.NEW
    finish_reason: FinishReason | None = None
    arrival: int = -1
    """Place in the order of arrival; a preempted request keeps its own."""
    overtaken: int = 0
    """How many that came later were admitted before it."""
    claim: tuple[int, int] = (-1, 0)
    """Its pages in the cache while it waits, as of a version of the page table: (version, pages)."""
    preemptions: int = 0
    cached_tokens: int = 0
    """Prompt tokens that never had to run because their pages were there already."""
    ahead: int = 0
    """Most tokens to be drafted for it in the next step in which it decodes."""
    speculated: Speculated = field(default_factory=Speculated)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise Refused(f"request {self.id!r} has an empty prompt; the least is one token")
        if self.matcher is not None and self.sampling.ignore_eos:
            raise Refused(
                f"request {self.id!r} has a grammar, which ends, and ignore_eos: leave one of them out"
            )

    @property
    def length(self) -> int:
        """Known tokens: the prompt and the answer so far."""
        return len(self.prompt) + len(self.answer)

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt + tuple(self.answer)

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Token ids at positions [start, stop), without a copy of the whole."""
        n = len(self.prompt)
        return [*self.prompt[start:stop], *self.answer[max(start - n, 0) : max(stop - n, 0)]]

    @property
    def boundary(self) -> int:
        """First position that the answer_writer writes."""
        return self.row.boundary(len(self.prompt))

    @property
    def goal(self) -> int:
        """Positions that are to be computed, as far as is known now."""
        return min(self.length, self.boundary) if self.hands_over else self.length

    @property
    def cacheable(self) -> int:
        """Positions that may come from the cache: the last that is known must run to give logits."""
        return min(self.length - 1, self.goal)

    @property
    def arriving(self) -> bool:
        """Whether it still waits for pages that it fetches."""
        return self.fetches and self.computed < self.boundary

    @property
    def needs(self) -> tuple[str, ...]:
        """Modules that must be here for it."""
        row = self.row
        if self.hands_over:
            return (row.prompt_writer,)
        if self.boundary and (self.replays or not self.fetches):
            return row.modules
        return tuple(dict.fromkeys((row.answer_writer, row.speaker)))

    def writer_of(self, position: int) -> str:
        """Module whose keys and values stand at ``position``."""
        return self.row.writer_at(position, len(self.prompt))

    def speaker_of(self, position: int) -> str:
        """Module whose logits at ``position`` choose the token after it."""
        return self.row.speaker_at(position, len(self.prompt))
