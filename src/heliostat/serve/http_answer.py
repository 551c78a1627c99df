"""An answer that an engine streams over HTTP: tokens as they come, made into text here, and what its refusals mean."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field

import msgspec

from heliostat.engine.answer import Spoken
from heliostat.engine.request import Sampling
from heliostat.serve.http_line import Refusal, words_of
from heliostat.serve.http_orders import Choice, decoded, sampled_of
from heliostat.serve.protocol import Code, Failed, Finish, Order, Said, Sampled, Spent, no

_CODES: Mapping[str, Code] = {
    "module_missing": "module_missing",
    "pages_gone": "pages_gone",
    "misfit": "misfit",
    "refused": "refused",
}
"""What a server may call its refusal."""


@dataclass(slots=True, eq=False)
class Answer:
    """What one order has been answered here."""

    order: Order
    eos: frozenset[int]
    spoken: Spoken
    began: float
    count: int = field(init=False)
    """Tokens of the answer so far, those that others said included."""

    def __post_init__(self) -> None:
        self.count = len(self.order.answer)
        for token in self.order.answer:
            self.spoken.push(token)

    @property
    def most(self) -> int:
        """Tokens that may still come."""
        return self.order.sampling.max_tokens - self.count

    @property
    def spoke(self) -> bool:
        """Whether anything was said here."""
        return self.count > len(self.order.answer)

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended it."""
        return self.spoken.stopped

    def take(self, choice: Choice, now: float) -> list[Said]:
        """What an event says. Raises ValueError where its tokens make no sense, or end for a reason that is none."""
        found, reason = sampled_of(choice), choice.finish_reason
        if reason not in (None, "stop", "length"):
            raise ValueError(f"the answer ended by {reason!r}")
        said: list[Said] = []
        for place, sampled in enumerate(found, start=1):
            finish: Finish | None = None
            if reason is not None and place == len(found):
                finish = "stop" if reason == "stop" else "length"
            said.append(self.say(sampled, finish, now))
            if said[-1].finish is not None:
                break
        return said

    def say(self, sampled: Sampled, finish: Finish | None, now: float) -> Said:
        """One more token; ``finish`` where the engine ended the answer with it."""
        wish = self.order.sampling
        ended = sampled.token in self.eos and not wish.ignore_eos and self.count >= wish.min_tokens
        text = "" if ended else self.spoken.push(sampled.token)
        if ended or self.spoken.stopped:
            finish = "stop"
        elif self.most <= 1:
            finish = finish or "length"
        if finish is not None:
            text += self.spoken.finish()
            finish = "stop" if self.spoken.stopped else finish
        if wish.logprobs is not None:
            sampled = msgspec.structs.replace(sampled, top=sampled.top[: wish.logprobs])
        spent = None if self.spoke else Spent(ran=now - self.began)
        said = Said(self.order.id, self.count, sampled, text, finish, spent=spent)
        self.count += 1
        return said


async def heard_of(
    answer: Answer, events: AsyncIterator[bytes], clock: Callable[[], float]
) -> AsyncIterator[Said]:
    """Tokens as they come. The last one waits for what was counted, which is sent right behind it."""
    last: Said | None = None
    async for data in events:
        if data == b"[DONE]":
            break
        event = decoded(data)
        if event.error is not None:
            raise Refusal(500, words_of(event.error))
        for choice in event.choices:
            for said in answer.take(choice, clock()):
                if said.finish is None or answer.stopped:
                    yield said  # a stop string was found here: nothing more is wanted
                else:
                    last = said
        if last is not None and event.usage is not None:
            spent = msgspec.structs.replace(last.spent or Spent(), cached=event.usage.cached)
            last = msgspec.structs.replace(last, spent=spent)
    if last is not None:
        yield last


def failed_by(order: Order, refusal: Refusal, *, fetches: bool = False) -> Failed:
    """What an answer that is none means; ``fetches``: what was written elsewhere may be missing."""
    if refusal.code in _CODES:
        return no(order.id, _CODES[refusal.code], refusal.words)
    if refusal.status in (400, 413, 422):
        return no(order.id, "refused", refusal.words)
    if refusal.status == 404:
        return no(order.id, "module_missing", refusal.words)
    if refusal.status in (429, 503):
        return no(order.id, "busy", refusal.words)
    if fetches:
        return no(order.id, "pages_gone", f"what was written for it could not be loaded: {refusal.words}")
    return no(order.id, "worker_lost", f"the server failed (status {refusal.status}): {refusal.words}")


def silent(order: Order) -> Order:
    """The same, where no token of it is wanted: nothing in it may refuse or steer one."""
    wish = Sampling(max_tokens=1, ignore_eos=True)
    return msgspec.structs.replace(order, sampling=wish, schema=None)
