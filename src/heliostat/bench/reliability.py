"""Ten thousand requests through workers where everything goes wrong that can; the table says what came of them.

On counted time: hours of silence and broken lines take minutes, and a seed tells the same story every time.
"""

from __future__ import annotations

import argparse
import json
import secrets
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from heliostat.bench.birth import certificate
from heliostat.bench.ordeal import Outcome, Plot, cast, orders_of, play, references
from heliostat.files import atomic_write_text
from heliostat.serve.faults import Odds

FRAMES = Odds(drop=0.01, delay=0.03, duplicate=0.01, truncate=0.01, flip=0.01, silence=0.001)
PAGES = Odds(truncate=0.01, flip=0.01, rewrite=0.01)

PLOTS: Mapping[str, Plot] = {
    "nothing goes wrong": Plot(requests=1000, seed=1),
    "frames": Plot(requests=1500, seed=2, frames=FRAMES),
    "pages": Plot(requests=1500, seed=3, pages=PAGES),
    "tiny pools, short leases": Plot(requests=1500, seed=4, pool=18, lease=0.1, every=0.006),
    "deaths": Plot(requests=1500, seed=5, deaths=1.0, every=0.015),
    "nine of ten clients leave": Plot(requests=1500, seed=6, leaving=0.9),
    "all at once": Plot(
        requests=1500, seed=7, frames=FRAMES, pages=PAGES, deaths=2.0, leaving=0.1, pool=40, lease=1.0
    ),
}
"""What is told, by what goes wrong: 10,000 requests."""


def tell(share: float = 1.0, *, seed: int = 0) -> dict[str, Outcome]:
    """All stories, each with this share of its requests, from these seeds on."""
    actors, found = cast(), {}
    run = f"heliostat-ordeal-{secrets.token_hex(4)}"
    for number, (what, plot) in enumerate(PLOTS.items()):
        plot = replace(plot, requests=max(1, round(plot.requests * share)), seed=plot.seed + 100 * seed)
        wanted = references(actors, orders_of(actors, plot))
        found[what] = play(actors, plot, name=f"{run}-{number}", wanted=wanted)
    return found


def sound(outcome: Outcome) -> bool:
    """No wrong answer, no leaked page, nobody who hangs."""
    return not (outcome.wrong or outcome.leaked or outcome.hung)


def page(found: Mapping[str, Mapping[str, Any]], birth: Mapping[str, Any]) -> str:
    """The table as a page."""
    lines = [
        "# When things go wrong",
        "",
        "Two workers that host what prompts need and two that host what answers need; eight members over all four",
        "sharings, toy modules in float32, greedy and seeded. The dispatcher, the engines and the line between them",
        "are the real ones; time is counted, and faults are drawn from a seed: frames are dropped (1 %), late by up",
        "to a second (3 %), doubled, cut, one bit changed (1 % each), or nothing passes for up to three seconds (0.1 %);",
        "pages arrive cut, changed, or are given to somebody else while they are copied (1 % each); a worker dies with all",
        "that was in it every one or two seconds and is started again. *Right*: each token is what the same request says",
        "alone in one process. *Failed*: told so, with a reason. *Hung*: not ended a second after its deadline of a minute.",
        "*Leaked*: pages that are held when all is over.",
        "",
        f"`{birth['command']}`; {birth['hardware']}, {birth['threads']} threads; commit {birth['commit']}; {birth['date']}",
        "",
        "| what goes wrong | requests | faults | deaths | asked again | right | left | failed | wrong | hung | leaked |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    total = [0] * 9
    for what, one in found.items():
        numbers = [
            sum(one["faults"].values()),
            one["deaths"],
            sum(one["retried"].values()),
            one["right"] + one["ties"],
            one["left"],
            sum(one["failed"].values()),
            one["wrong"],
            one["hung"],
            one["leaked"],
        ]
        total = [a + b for a, b in zip(total, numbers, strict=True)]
        lines.append(f"| {what} | {_asked(one)} | {' | '.join(map(str, numbers))} |")
    asked = sum(_asked(one) for one in found.values())
    lines.append(f"| **together** | {asked} | {' | '.join(map(str, total))} |")
    ties = sum(one["ties"] for one in found.values())
    failed: Counter[str] = Counter()
    for one in found.values():
        failed.update(one["failed"])
    told = ", ".join(f"{code} ({count})" for code, count in sorted(failed.items())) or "none"
    lines += [
        "",
        f"Right up to a token that the order of sums decides: {ties}. Failures by reason: {told}.",
        "",
    ]
    return "\n".join(lines)


def _asked(one: Mapping[str, Any]) -> int:
    ended = ("right", "ties", "left", "wrong", "hung")
    return sum(one[what] for what in ended) + sum(one["failed"].values())


def main() -> None:
    """Tell all stories and write the table; exit status 1 where an answer is wrong, a page leaks or somebody hangs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    parser.add_argument("--share", type=float, default=1.0, help="of the 10,000 requests")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    found = tell(given.share, seed=given.seed)
    birth = certificate(
        f"python -m heliostat.bench.reliability --share {given.share:g} --seed {given.seed}",
        seconds=round(time.perf_counter() - began),
    )
    rows = {what: outcome.facts() for what, outcome in found.items()}
    given.docs.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"birth": birth, "rows": rows}, indent=1) + "\n"
    atomic_write_text(given.docs / "reliability.json", text)
    atomic_write_text(given.docs / "reliability.md", page(rows, birth))
    print(page(rows, birth))
    if not all(map(sound, found.values())):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
