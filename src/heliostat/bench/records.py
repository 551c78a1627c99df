"""What a client saw of a request, as one line of jsonl, and what it wanted of it. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from heliostat.errors import Refused

ANSWERED = "answered"
PHASES = ("queue", "prefill", "transfer", "decode")
"""What a server may tell apart of a request's seconds."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request must keep to count as goodput. MLPerf-style limits; the values are ours."""

    ttft: float = 2.0
    """Most seconds from the scheduled send time to the first text."""
    tpot: float = 0.2
    """Most seconds a token after the first, on average."""
    timeout: float = 120.0
    """Seconds after which a request is given up; that is a miss, too."""

    def __post_init__(self) -> None:
        if min(self.ttft, self.tpot, self.timeout) <= 0:
            raise Refused(
                f"limits are {self.ttft:g}, {self.tpot:g}, {self.timeout:g} s; each must be above 0"
            )


@dataclass(slots=True, kw_only=True)
class Record:
    """One request. Times are seconds of the client's own clock since the run began."""

    run: int
    session: int
    call: int
    member: str
    task: str
    time: float
    """When it came in, on everybody's clock: seconds since 1970."""
    scheduled: float
    """When it was due: an open loop's time, or the end of the calls before it and its pause."""
    pause: float = 0.0
    """Seconds that the workflow waited for a tool before it was due."""
    sent: float | None = None
    """When it was sent, for the last time if it was refused for now before."""
    first: float | None = None
    """When the first text, or token id, was there."""
    last: float | None = None
    """When the last text was there."""
    end: float = 0.0
    outcome: str = "unfinished"
    """``answered``, or why not: status 500, timeout, disconnected, malformed, error, cut, unreachable, skipped."""
    told: str = ""
    """The server's words, or the error's."""
    tries: int = 0
    too_many: int = 0
    """Answers with status 429, each of which was waited out."""
    asked_tokens: int = 0
    prompt_tokens: int | None = None
    """As the server counts; ``cached_tokens`` and ``answer_tokens`` alike. None where it does not tell."""
    cached_tokens: int | None = None
    answer_tokens: int | None = None
    phases: dict[str, float] | None = None
    """Seconds of queue, prefill, transfer and decode, as a server tells that can tell them apart."""
    chunks: int = 0
    """Chunks that held text, or token ids."""
    moments: int = 0
    """Times at which such chunks came; several that came together are one."""
    bad_chunks: int = 0
    stand_ins: int = 0
    """Answers of earlier calls that its prompt holds stand-ins for."""
    prompt: list[int] | None = None
    """Kept where that was asked for: ``messages`` and ``answer``, too."""
    messages: list[dict[str, str]] | None = None
    answer: list[int] | str | None = None
    seconds: float = 0.0
    """From when it was due to its end."""

    @property
    def answered(self) -> bool:
        return self.outcome == ANSWERED

    @property
    def ttft(self) -> float | None:
        """Seconds from the scheduled send time to the first text."""
        return None if self.first is None else self.first - self.scheduled

    @property
    def tokens(self) -> int:
        """Tokens of the answer as the server counts them; where it does not, chunks that held text."""
        return self.chunks if self.answer_tokens is None else self.answer_tokens

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first; None of an answer of one token."""
        if self.first is None or self.last is None or self.tokens < 2:
            return None
        return (self.last - self.first) / (self.tokens - 1)

    @property
    def bundled(self) -> bool:
        """Whether most tokens came together with others: when each was there, nobody can tell then."""
        return 2 * self.moments < self.tokens

    @property
    def lag(self) -> float:
        """Seconds by which the client sent later than it was due, where nothing was refused before."""
        return 0.0 if self.sent is None or self.too_many else max(0.0, self.sent - self.scheduled)

    def meets(self, limits: Limits) -> bool:
        """Whether it was answered within its limits."""
        if not self.answered or self.ttft is None or self.ttft > limits.ttft:
            return False
        return self.tpot is None or self.tpot <= limits.tpot

    def line(self) -> str:
        """As a line of jsonl; what is not there is left out."""
        facts = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps(facts, ensure_ascii=False, separators=(",", ":")) + "\n"


@dataclass(slots=True)
class Lateness:
    """How late the client itself was, apart from any server: a clock that should have rung every so often."""

    rings: int = 0
    late: list[float] = field(default_factory=list)
    """Seconds of each ring."""
    cpu: float = 0.0
    """Seconds of processor time that the client took; ``wall`` went by."""
    wall: float = 0.0


@dataclass(slots=True)
class Run:
    """All that was seen at one load."""

    number: int
    rate: float | None
    """Sessions a second that were wished for; None for a replay."""
    records: list[Record] = field(default_factory=list)
    spans: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Session -> (scheduled start, end), of those that ended."""
    conversations: dict[int, int] = field(default_factory=dict)
    """Session -> the conversation that it is a part of."""
    lateness: Lateness = field(default_factory=Lateness)
    stopped: bool = False
    """Ctrl-C came; what was under way is unfinished and counts neither for nor against."""
