"""Decoding with several members at once, system beside system: tokens a second and seconds a token.

Whole requests are served. What is timed are the steps in which every request gets a token: prompts have been read by
then, by whoever writes them in that row, and none has ended. Rounds are made in turns.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from heliostat.bench.birth import certificate
from heliostat.bench.comparing import Kept, Tell, decisive
from heliostat.bench.decode import prompts
from heliostat.bench.decoded import Case, decoded
from heliostat.bench.stand import Stand
from heliostat.bench.systems import System, member_names, rank
from heliostat.engine.engine import PAGE_SIZE
from heliostat.engine.request import Request, Sampling
from heliostat.files import atomic_write_text

PROMPT_ROWS = 1_024
"""Prompt tokens that an engine reads in a step, at least, while others decode beside."""


@dataclass(frozen=True, slots=True)
class Timed:
    """One system, one case, one round."""

    requests: int
    seconds: list[float]
    """Of each timed step: one token for every request."""
    prefill: float
    """Seconds before the first of them."""


def timed(stand: Stand, system: System, case: Case, *, seed: int) -> Timed:
    """Serve the requests of a case once, in a fresh engine."""
    members = member_names(case.members)
    counts = case.counts()
    total = sum(counts)
    # Who is read first goes on saying tokens until the last prompt is read; only then every step has all of them.
    spoken = case.steps + 2 + -(-total * case.prompt // PROMPT_ROWS)
    tokens = case.prompt + spoken
    engine = stand.engine(system, members, pages=total * (1 + -(-tokens // PAGE_SIZE)), most=total)
    rows = system.rows(members)
    wish = Sampling(max_tokens=spoken, ignore_eos=True)
    who = [member for member, count in zip(members, counts, strict=True) for _ in range(count)]
    for number, (member, prompt) in enumerate(zip(who, prompts(total, seed, case.prompt), strict=True)):
        digests = dict(engine.digests)
        engine.add(
            Request(str(number), row=rows[member], digests=digests, prompt=tuple(prompt), sampling=wish)
        )
    begun, seconds, before = time.perf_counter(), [], 0.0
    while engine.unfinished:
        started = time.perf_counter()
        said = engine.step()
        now = time.perf_counter()
        # In its first step a request that was read just now may say its first token: that is still prefill.
        if len(said) == total and all(len(chunk.request.answer) > 1 for chunk in engine.latest.chunks):
            before = before or started - begun
            seconds.append(now - started)
    assert len(seconds) >= case.steps, f"{len(seconds)} steps in which all {total} say a token"
    return Timed(total, seconds[-case.steps :], before)


@dataclass(frozen=True, slots=True)
class Decoding:
    """What is asked for."""

    systems: tuple[System, ...]
    cases: tuple[Case, ...]
    shape: str
    rounds: int
    seed: int


def run_all(asked: Decoding, folder: Path, *, command: str, tell: Tell) -> dict[str, Any]:
    """All cases, and results.json; after Ctrl-C what there is of them (``stopped`` is then true)."""
    stand = Stand(asked.shape, seed=asked.seed)
    birth = certificate(command, seed=asked.seed, repeats=asked.rounds)
    kept = Kept(folder, {**decisive(birth), **asdict(asked)})
    stopped = False
    try:
        _measure(asked, stand, kept, tell)
    except KeyboardInterrupt:
        stopped = True
    most = member_names(max(case.members for case in asked.cases))
    results = {
        "birth": birth,
        "what": "decode, several members",
        "stopped": stopped,
        "shape": asked.shape,
        "adapter_rank": rank(stand.config.width),
        "systems": [system.name for system in asked.systems],
        "weights_bytes": {system.name: stand.bytes(system, most) for system in asked.systems},
        "cases": [
            found
            for case in asked.cases
            if (found := decoded(case, [s.name for s in asked.systems], _points(asked, case, kept.found)))
        ],
    }
    atomic_write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    return results


def _measure(asked: Decoding, stand: Stand, kept: Kept, tell: Tell) -> None:
    """Round by round over all cases, each round beginning with another system."""
    missing = len(asked.systems) * len(asked.cases) * asked.rounds - len(kept.found)
    if missing:
        tell.begin(missing, missing * _usual(asked, stand))
    for number in range(asked.rounds):
        turn = number % len(asked.systems)
        for place, case in enumerate(asked.cases):
            for system in (*asked.systems[turn:], *asked.systems[:turn]):
                seed = asked.seed + 1000 * number + place
                make = _Making(stand, system, case, seed)
                kept.get(_name(case, system.name, number), make, tell)


def _usual(asked: Decoding, stand: Stand) -> float:
    """Seconds of a point of the middle, in the baseline; it also warms up."""
    case = asked.cases[len(asked.cases) // 2]
    begun = time.perf_counter()
    for system in asked.systems:
        timed(stand, system, replace(case, steps=4), seed=1)
    begun = time.perf_counter()
    timed(stand, asked.systems[0], case, seed=2)
    return 0.7 * (time.perf_counter() - begun)


@dataclass(frozen=True, slots=True)
class _Making:
    """A point that is made when it is called for."""

    stand: Stand
    system: System
    case: Case
    seed: int

    def __call__(self) -> Mapping[str, Any]:
        return asdict(timed(self.stand, self.system, self.case, seed=self.seed))


def _name(case: Case, system: str, number: int) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", f"{case.name}-{system}-{number}".lower())


def _points(asked: Decoding, case: Case, found: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    """Rounds of each system that are there."""
    return {
        system.name: [
            found[name] for n in range(asked.rounds) if (name := _name(case, system.name, n)) in found
        ]
        for system in asked.systems
    }
