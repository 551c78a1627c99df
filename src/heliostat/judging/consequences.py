"""What becomes of an answer when one of its tokens is another: the speaker goes on from there, and its result is compared.

Where another result comes of it, the token is known to be unacceptable. Where none does, nothing is known of the token
alone: the speaker may have mended it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from heliostat.engine.request import Request, Sampling
from heliostat.errors import Refused
from heliostat.judging.labels import Scored
from heliostat.llm import LLM
from heliostat.tasks.grade import grade


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, and the right answer where the data has one."""

    line: int
    """Of the file it came from, from 1."""
    prompt: tuple[int, ...]
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class Said:
    """A greedy answer."""

    ids: tuple[int, ...]
    """The end token included, where it came to one."""
    ended: bool


def answered(
    llm: LLM,
    member: str,
    prompts: Sequence[Sequence[int]],
    begun: Sequence[Sequence[int]],
    *,
    longest: Sequence[int],
) -> list[Said]:
    """Greedy answers of one member's row that go on from ``begun``, in one batch, each of at most so many tokens."""
    row, engine = llm.rows[member], llm.engine
    digests = {name: engine.digests[name] for name in row.modules}
    run = secrets.token_hex(4)
    requests = [
        Request(
            f"{run}-{number}",
            row=row,
            digests=digests,
            prompt=tuple(prompt),
            sampling=Sampling(max_tokens=max(most, len(answer) + 1)),
            member=member,
            answer=list(answer),
        )
        for number, (prompt, answer, most) in enumerate(zip(prompts, begun, longest, strict=True))
    ]
    over = set(llm.tokenizer.eos_ids)
    full = engine.max_length - 1  # nothing can follow, and no engine takes it
    going = [r for r in requests if not (r.answer and r.answer[-1] in over) and r.length <= full]
    try:
        for request in going:
            engine.add(request)
        while engine.unfinished:
            engine.step()
    finally:
        for request in going:
            engine.abort(request.id)
    return [Said(tuple(r.answer), bool(r.answer) and r.answer[-1] in over) for r in requests]


def known_unacceptable(
    llm: LLM,
    member: str,
    asked: Sequence[tuple[Question, Said, Scored]],
    *,
    metric: str,
    longest: int,
) -> list[list[bool] | None]:
    """For each answer, which of its scored tokens change the result; None where the answer is no measure.

    That is where it did not end, where it is wrong by the data's own answer, or where it has no result. A result is
    compared with the data's answer, or with that of the speaker's own answer where the data has none.
    """
    wanted = [_reference(llm, metric, question, said) for question, said, _ in asked]
    rows = [
        (number, place, token)
        for number, (_, _, scored) in enumerate(asked)
        if wanted[number] is not None
        for place, token in zip(scored.places.tolist(), scored.tokens.tolist(), strict=True)
    ]
    prompts = [asked[number][0].prompt for number, _, _ in rows]
    begun = [[*asked[number][1].ids[:place], token] for number, place, token in rows]
    found: list[list[bool] | None] = [None if one is None else [] for one in wanted]
    ends = answered(llm, member, prompts, begun, longest=[longest] * len(rows))
    for (number, _, _), said in zip(rows, ends, strict=True):
        reference, changed = wanted[number], found[number]
        assert reference is not None and changed is not None
        changed.append(not (said.ended and grade(metric, llm.tokenizer.decode(said.ids), reference)))
    return found


def _reference(llm: LLM, metric: str, question: Question, said: Said) -> str | None:
    """What a result is compared with; None where there is none."""
    if not said.ended:
        return None
    own = llm.tokenizer.decode(said.ids)
    reference = own if question.reference is None else question.reference
    try:
        return reference if grade(metric, own, reference) else None
    except Refused:  # an answer of its own without a result; of the data's own answers it is said
        if question.reference is not None:
            raise
        return None
