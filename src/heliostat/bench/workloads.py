"""What several members are asked over one growing context: seeded sessions of calls, as ids or as text. No torch.

A session is a closed loop: a call is sent when those before it have answered and its pause is over. Sessions begin
as an open loop, at the times of a Poisson process, however slow the answers are. The same seed gives the same sessions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, product
from typing import Literal, TypeVar

from heliostat.errors import Refused

T = TypeVar("T")
RolePlace = Literal["first", "last", "kept"]
Assignment = Literal["cast", "rotate", "draw"]

MARKS = range(32, 96)
"""Token ids that begin a role or a branch, and stand nowhere else: two of them part at their first token."""
CONTENT = range(96, 256)
"""Token ids of everything else; every byte-level vocabulary has them."""
WORDS = tuple("".join(letters) for letters in product("bdfgklmnprstvz", "aeiou", "lnrs"))[: CONTENT.stop]
"""Where a prompt goes out as text, a token id is the word at its place."""

POOLS: Mapping[str, float] = {"tight": 0.5, "even": 1.0, "roomy": 4.0}
"""Sizes of a cache to measure with, in multiples of what all sessions in flight have to keep."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How long the parts of a session are, in tokens; a length is drawn from its mean -/+ ``spread``."""

    context: int = 512
    """What a session begins with: the task, the documents."""
    role: int = 32
    """Instructions of a member; the same in every call."""
    answer: int = 64
    """Of a planner, actor, worker or joiner; evaluators say a quarter of it, observers and reflectors half."""
    observation: int = 96
    """What a tool adds to the context, or the task of a branch."""
    spread: float = 0.5
    """0: every length is its mean. Roles do not vary."""

    def __post_init__(self) -> None:
        _check("context", self.context, least=1)
        _check("role", self.role, least=0)
        _check("answer", self.answer, least=1)
        _check("observation", self.observation, least=1)
        _check("spread", self.spread, least=0, most=0.95)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Who is asked how often, and in which order of things. Raises Refused for what cannot be."""

    members: tuple[str, ...]
    workflow: str = "react"
    """``react``: planner, actor, observer; ``reflexion``: actor, evaluator, reflector; ``fanout``: planner, workers at
    the same time, joiner."""
    rate: float = 1.0
    """Sessions a second, on average."""
    sessions: int = 200
    """How many; 95th percentiles want 200, 99th 1,000."""
    seed: int = 0
    """The same seed makes the same sessions."""
    lengths: Lengths = field(default_factory=Lengths)
    turns: int = 3
    """Rounds of a workflow."""
    width: int = 3
    """Branches of a fan-out."""
    role_place: RolePlace = "last"
    """``first``: in front, as most agents have it; ``last``: behind the common context, and not there in the next
    call; ``kept``: behind it, and a part of it from then on, so that answers come back where they were said."""
    popularity: float = 0.0
    """Exponent of Zipf's law over the members in their order; 0: all alike."""
    assignment: Assignment = "cast"
    """``cast``: a session draws one member for each of its roles; ``rotate``: each call goes to the next member;
    ``draw``: each call draws its member."""
    switch: float = 1.0
    """How often a call may go to another member than the one before; 0: a session has one member."""
    pause: float = 0.5
    """Mean seconds that a tool takes; drawn from an exponential distribution."""

    def __post_init__(self) -> None:
        if not self.members or len(set(self.members)) < len(self.members):
            raise Refused(f"members are {', '.join(self.members) or 'none'}: give each once, at least one")
        if self.workflow not in WORKFLOWS:
            raise Refused(f"no workflow {self.workflow!r}; there is: {', '.join(WORKFLOWS)}")
        _choice("role_place", self.role_place, ("first", "last", "kept"))
        _choice("assignment", self.assignment, ("cast", "rotate", "draw"))
        _check("rate", self.rate, least=1e-9)
        _check("sessions", self.sessions, least=1)
        _check("turns", self.turns, least=1)
        _check("width", self.width, least=1, most=len(MARKS))
        _check("popularity", self.popularity, least=0)
        _check("switch", self.switch, least=0, most=1)
        _check("pause", self.pause, least=0)


@dataclass(frozen=True, slots=True)
class Part:
    """One turn of a prompt: ids that are known beforehand, or what an earlier call of the session answered."""

    role: Literal["system", "user", "assistant"]
    ids: tuple[int, ...] = ()
    answer_of: int | None = None
    """Number of the call; ``ids`` then stand for its answer where nobody knows it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request of a session."""

    number: int
    member: str
    task: str
    """What it is for: planner, actor, ..."""
    prompt: tuple[Part, ...]
    answer_tokens: int
    stand_in: tuple[int, ...] = ()
    """As many ids as the answer has, for prompts that go on from it where its own ids are not known."""
    after: tuple[int, ...] = ()
    """Calls that must have been answered before."""
    pause: float = 0.0
    """Seconds from then on until it is sent."""


@dataclass(frozen=True, slots=True)
class Session:
    """Calls over one context. ``start`` is in seconds from the beginning of the run."""

    number: int
    start: float
    calls: tuple[Call, ...]
    conversation: int | None = None
    """Sessions of one conversation are no independent samples; None: a conversation of its own."""


def prompt_ids(call: Call, answers: Mapping[int, Sequence[int]]) -> list[int]:
    """Token ids of a call's prompt; an answer that is not among ``answers`` is stood in for."""
    return [token for part in call.prompt for token in _ids(part, answers)]


def _ids(part: Part, answers: Mapping[int, Sequence[int]]) -> Sequence[int]:
    return part.ids if part.answer_of is None else answers.get(part.answer_of, part.ids)


def messages(call: Call, answers: Mapping[int, str]) -> list[dict[str, str]]:
    """A call's prompt as a conversation of words."""
    return [
        {
            "role": part.role,
            "content": text_of(part.ids)
            if part.answer_of is None
            else answers.get(part.answer_of, text_of(part.ids)),
        }
        for part in call.prompt
    ]


def text_of(ids: Iterable[int]) -> str:
    """Words for ids."""
    return " ".join(WORDS[token % len(WORDS)] for token in ids)


def declared_common(one: Call, other: Call) -> int:
    """Tokens that the prompts of two calls of one session begin with alike, as the workflow has it."""
    common = 0
    for mine, theirs in zip(one.prompt, other.prompt, strict=False):
        if mine != theirs:
            break
        common += len(mine.ids)
    return common


# ---- sessions


def sessions(load: Load) -> list[Session]:
    """All sessions of a load, in the order of their starts."""
    dice = random.Random(f"{load.seed}/arrivals")
    starts = accumulate(dice.expovariate(load.rate) for _ in range(load.sessions))
    return [_session(load, number, start) for number, start in enumerate(starts)]


def _session(load: Load, number: int, start: float) -> Session:
    draft = Draft(load, random.Random(f"{load.seed}/session/{number}"))
    WORKFLOWS[load.workflow](draft)
    return Session(number, start, tuple(draft.calls))


def respelled(made: Iterable[Session], nonce: str) -> list[Session]:
    """The same sessions in other ids, one for one: a cache that has met them finds nothing of them again."""
    dice = random.Random(f"nonce/{nonce}")
    table = dict(zip(MARKS, dice.sample(MARKS, len(MARKS)), strict=True))
    table |= zip(CONTENT, dice.sample(CONTENT, len(CONTENT)), strict=True)

    def ids(before: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(table[token] for token in before)

    def call(before: Call) -> Call:
        prompt = tuple(replace(part, ids=ids(part.ids)) for part in before.prompt)
        return replace(before, prompt=prompt, stand_in=ids(before.stand_in))

    return [replace(session, calls=tuple(map(call, session.calls))) for session in made]


class Draft:
    """A session while it is written: the context so far, and the calls that read it."""

    def __init__(self, load: Load, dice: random.Random) -> None:
        self.load = load
        self.dice = dice
        self.calls: list[Call] = []
        self.context = [Part("user", self._content(load.lengths.context))]
        self._cast: dict[str, str] = {}
        self._offset = dice.randrange(len(load.members))

    def say(self, task: str, *, share: float = 1.0, pause: bool = False) -> None:
        """The next call, behind all that were made; its answer becomes a part of the context."""
        call = self.ask(task, share=share, pause=pause)
        if self.load.role_place == "kept" and self.load.lengths.role:
            self.context.append(call.prompt[-1])
        self.hear(call)

    def ask(self, task: str, *, share: float = 1.0, pause: bool = False, branch: int | None = None) -> Call:
        """A call over the context as it is; its answer is ``share`` of the usual length."""
        lengths, own = self.load.lengths, self.context[:]
        if branch is not None:
            own.append(Part("user", (MARKS[branch], *self._content(lengths.observation)[1:])))
        member = self._member(task)
        said = self._content(max(1, round(lengths.answer * share)))
        call = Call(
            number=len(self.calls),
            member=member,
            task=task,
            prompt=tuple(self._with_role(own, member)),
            answer_tokens=len(said),
            stand_in=said,
            after=tuple(part.answer_of for part in own if part.answer_of is not None),
            pause=self.dice.expovariate(1 / self.load.pause) if pause and self.load.pause else 0.0,
        )
        self.calls.append(call)
        return call

    def hear(self, *calls: Call) -> None:
        """What these answered is read by everybody from now on."""
        self.context += [Part("assistant", call.stand_in, call.number) for call in calls]

    def observe(self) -> None:
        """A tool adds to the context."""
        self.context.append(Part("user", self._content(self.load.lengths.observation)))

    def _content(self, mean: int) -> tuple[int, ...]:
        spread = self.load.lengths.spread
        count = max(1, round(mean * self.dice.uniform(1 - spread, 1 + spread)))
        return tuple(self.dice.choices(CONTENT, k=count))

    def _with_role(self, own: list[Part], member: str) -> list[Part]:
        if not self.load.lengths.role:
            return own
        if self.load.role_place == "first":
            return [Part("system", role_ids(self.load, member)), *own]
        return [*own, Part("user", role_ids(self.load, member))]

    def _member(self, task: str) -> str:
        load = self.load
        if self.calls and self.dice.random() >= load.switch:
            return self.calls[-1].member
        if load.assignment == "rotate":
            last = load.members.index(self.calls[-1].member) if self.calls else self._offset
            return load.members[(last + 1) % len(load.members)]
        if load.assignment == "draw":
            return drawn(self.dice, load.members, load.popularity)
        if task not in self._cast:
            free = [name for name in load.members if name not in self._cast.values()]
            self._cast[task] = drawn(self.dice, free or load.members, load.popularity)
        return self._cast[task]


def role_ids(load: Load, member: str) -> tuple[int, ...]:
    """A member's instructions: two members' part at their first token, up to 64 members."""
    place, count = load.members.index(member), load.lengths.role
    dice = random.Random(f"{load.seed}/role/{member}")
    return (MARKS[place % len(MARKS)], *dice.choices(CONTENT, k=count - 1))


def drawn(dice: random.Random, choices: Sequence[T], popularity: float) -> T:
    """One of ``choices``, the k-th of them with a weight of 1 / k ** popularity."""
    weights = [(place + 1) ** -popularity for place in range(len(choices))]
    return dice.choices(choices, weights)[0]


def react(draft: Draft) -> None:
    """A planner says what to do, an actor calls a tool, an observer reads what came of it; again and again."""
    for _ in range(draft.load.turns):
        draft.say("planner")
        draft.say("actor")
        draft.observe()
        draft.say("observer", share=0.5, pause=True)


def reflexion(draft: Draft) -> None:
    """An actor tries, an evaluator judges when the try has run, a reflector says what to do better."""
    for _ in range(draft.load.turns):
        draft.say("actor")
        draft.say("evaluator", share=0.25, pause=True)
        draft.say("reflector", share=0.5)


def fanout(draft: Draft) -> None:
    """A planner hands out tasks, workers do them at the same time, a joiner reads what all of them said."""
    for _ in range(draft.load.turns):
        draft.say("planner")
        draft.hear(*[draft.ask(f"worker {n + 1}", branch=n) for n in range(draft.load.width)])
        draft.say("joiner")


WORKFLOWS: Mapping[str, Callable[[Draft], None]] = {"react": react, "reflexion": reflexion, "fanout": fanout}


def popularity_named(name: str) -> float:
    """The exponent behind ``uniform`` or ``zipf:1.2``."""
    kind, _, exponent = name.partition(":")
    if kind == "uniform" and not exponent:
        return 0.0
    try:
        if kind == "zipf" and 0 <= (found := float(exponent)) <= 10:
            return found
    except ValueError:
        pass
    raise Refused(f"popularity is {name!r}; allowed is uniform, or zipf:S with S from 0 to 10")


def _check(name: str, value: float, *, least: float, most: float = 1e9) -> None:
    if not least <= value <= most:
        raise Refused(f"{name} is {value!r}; allowed is {least:g} to {most:g}")


def _choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise Refused(f"{name} is {value!r}; allowed is {', '.join(allowed)}")
