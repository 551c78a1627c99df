"""How long the router takes to decide among a thousand workers, bookkeeping included."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heliostat.bench.birth import certificate
from heliostat.engine.request import Sampling
from heliostat.family import SHARINGS
from heliostat.files import atomic_write_text
from heliostat.serve.protocol import Described, Order, Role, Spent
from heliostat.serve.router import Route, Router, Wish

LIMIT = 100e-6
"""Seconds."""
PAGE = 16
MEMBERS = 64
PARTS = ("keys", "choice", "books", "all")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """A cluster and what is asked of it."""

    name: str
    workers: int = 1000
    prompt: int = 1024
    """Tokens."""
    contexts: int = 500
    """Prompts begin like one of so many."""
    flying: int = 3000
    """Requests that are open at a time."""
    mixed: bool = False
    """Whether every worker prefills and decodes; else one half does each."""


MIXES = (
    Mix(name="1,000 workers"),
    Mix(name="1,000 workers, each does both", mixed=True),
    Mix(name="1,000 workers, one context", contexts=1),
    Mix(name="1,000 workers, few requests", flying=50),
    Mix(name="1,000 workers, prompts of 8,192", prompt=8192),
    Mix(name="10 workers", workers=10, flying=30),
)


@dataclass(slots=True)
class Times:
    """Seconds of each decision."""

    keys: list[float] = field(default_factory=list)
    """Of the prompt's beginnings."""
    choice: list[float] = field(default_factory=list)
    books: list[float] = field(default_factory=list)
    """Noting what was sent where."""

    @property
    def all(self) -> list[float]:
        """Together."""
        return [sum(parts) for parts in zip(self.keys, self.choice, self.books, strict=True)]


def measure(mix: Mix, *, decisions: int, seed: int = 0) -> Times:
    """Decide so often, with requests that come and end."""
    dice = random.Random(seed)
    router, times = _router(mix, dice), Times()
    contexts = [[dice.randrange(32_000) for _ in range(mix.prompt)] for _ in range(mix.contexts)]
    flying: list[str] = []
    for number in range(decisions + 500):
        wish = Wish(_order(number, mix, contexts, dice), PAGE)
        began = time.thread_time()
        _ = wish.keys
        known = time.thread_time()
        route = router.route(wish, 0.0)
        chosen = time.thread_time()
        assert isinstance(route, Route), route
        router.send(wish, route)
        sent = time.thread_time()
        if number >= 500:  # the first fill the house
            times.keys.append(known - began)
            times.choice.append(chosen - known)
            times.books.append(sent - chosen)
        flying.append(wish.order.id)
        _go_on(router, wish, route, dice)
        while len(flying) > mix.flying:
            router.ended(_drawn(flying, dice))
    return times


def _go_on(router: Router, wish: Wish, route: Route, dice: random.Random) -> None:
    """What a worker reports of it, so that costs are known."""
    spent = Spent(
        waited=0.001, ran=0.0003 * route.tail + 0.002, computed=route.tail, bytes=10**6, moving=0.002
    )
    if dice.random() < 0.9:
        if route.prefill is not None:
            router.prefilled(wish.order.id, spent)
        router.arrived(wish.order.id, spent)


def _drawn(flying: list[str], dice: random.Random) -> str:
    place = dice.randrange(len(flying))
    flying[place], flying[-1] = flying[-1], flying[place]
    return flying.pop()


def _router(mix: Mix, dice: random.Random) -> Router:
    router = Router()
    for number in range(mix.workers):
        every = range(MEMBERS) if mix.workers < 100 else dice.sample(range(MEMBERS), 16)
        names = ["base", *(f"member-{member}" for member in every)]
        half: tuple[Role, ...] = ("prefill",) if number % 2 else ("decode",)
        router.join(
            Described(
                worker=f"worker-{number}",
                incarnation="1",
                modules={name: f"digest of {name}" for name in names},
                roles=("prefill", "decode") if mix.mixed else half,
                fit="",
                page_size=PAGE,
                dtype="float32",
                pages=4096,
                page_bytes=65_536,
                max_length=2 * mix.prompt,
                max_running=64,
                credit=10**6,
                hands=True,
            )
        )
    return router


def _order(number: int, mix: Mix, contexts: Sequence[Sequence[int]], dice: random.Random) -> Order:
    own = f"member-{dice.randrange(MEMBERS)}"
    row = dice.choice(list(SHARINGS.values())).instantiate(own)
    context = dice.choice(contexts)
    common = dice.randrange(mix.prompt)
    new = (dice.getrandbits(14) for _ in range(mix.prompt - common))
    return Order(
        id=str(number),
        row=row,
        digests={name: f"digest of {name}" for name in row.modules},
        prompt=(*context[:common], *new),
        sampling=Sampling(),
    )


def told(times: Times) -> dict[str, dict[str, float]]:
    """Microseconds, by part: median and 99th percentile."""
    found = {}
    for part in PARTS:
        values = sorted(getattr(times, part))
        found[part] = {
            "median": 1e6 * statistics.median(values),
            "p99": 1e6 * values[int(0.99 * len(values))],
        }
    return found


def _page(rows: Mapping[str, Mapping[str, Any]], birth: Mapping[str, Any]) -> str:
    lines = [
        "# Routing: microseconds for a decision",
        "",
        f"`{birth['command']}`; {birth['hardware']}, one thread, {birth['decisions']} decisions each; commit "
        f"{birth['commit']}; {birth['date']}",
        "",
        f"Requests of all rows over {MEMBERS} members. Prompts have 1,024 tokens where nothing else is said, and begin like",
        "one of 500 contexts for a random length; 3,000 are open at a time. A thousand workers host the base and 16 members",
        "each; one half prefills, the other decodes. *keys*: hashing the beginnings of the prompt; *choice*: filters,",
        "scorers, picker; *books*: noting what was sent where. The goal is 100 for all of it. Processor time of the thread.",
        "",
        "| | keys | choice | books | all: median | all: p99 |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        parts = " | ".join(f"{row[part]['median']:.0f}" for part in PARTS)
        lines.append(f"| {name} | {parts} | {row['all']['p99']:.0f} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure every mix and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    parser.add_argument("--decisions", type=int, default=5_000)
    given = parser.parse_args()
    rows: dict[str, Mapping[str, Any]] = {}
    for mix in MIXES:
        rows[mix.name] = told(measure(mix, decisions=given.decisions))
        whole = rows[mix.name]["all"]
        print(f"{mix.name:36s} median {whole['median']:6.1f} us, p99 {whole['p99']:6.1f} us")
    birth = certificate(
        f"python -m heliostat.bench.routing --decisions {given.decisions}", decisions=given.decisions, seed=0
    )
    given.docs.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"birth": birth, "rows": rows}, indent=1) + "\n"
    atomic_write_text(given.docs / "routing.json", content)
    atomic_write_text(given.docs / "routing.md", _page(rows, birth))


if __name__ == "__main__":
    main()
