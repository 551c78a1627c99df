"""Public traces through every sharing, one after another on the same cores: as fast as it goes, with members assigned.

``python -m heliostat.bench.replaying FILE...``: members have random weights, so what is told is throughput and what the
cache met, at a small scale of the trace's lengths. Who was asked no trace tells: the turns of a conversation go round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from heliostat.bench.birth import certificate
from heliostat.bench.direct import Direct
from heliostat.bench.stand import Stand
from heliostat.bench.systems import System, member_names, systems_named
from heliostat.bench.traces import Replay, read_trace, replayed
from heliostat.bench.workloads import Session
from heliostat.errors import Refused
from heliostat.files import atomic_write_text

AT_ONCE = 1e9
"""Speed at which all requests are due when the first is, in their order."""
SOURCES: Mapping[str, tuple[str, str]] = {
    "mooncake_conversation": ("Mooncake, FAST'25 release: conversations", "Apache-2.0"),
    "mooncake_synthetic": ("Mooncake, FAST'25 release: synthetic", "Apache-2.0"),
    "azure_2023_code": ("Azure LLM inference trace 2023: code", "CC BY 4.0"),
    "azure_2023_conv": ("Azure LLM inference trace 2023: conversations", "CC BY 4.0"),
}
"""(Where a file of that name comes from, its licence); of another name nothing is said."""


def run(
    stand: Stand, system: System, made: Sequence[Session], members: Sequence[str], pages: int
) -> dict[str, Any]:
    """Requests a second of one replay into empty pages, and what the cache met."""
    engine = stand.engine(system, members, pages=pages)
    ran = Direct(engine, system.rows(members), time.perf_counter).run(made)
    if missing := len(made) - sum(record.answered for record in ran.records):
        raise Refused(f"{system.name}: {missing} requests were not answered")
    last = max(record.end for record in ran.records)
    prompt = sum(record.prompt_tokens or 0 for record in ran.records)
    return {
        "requests_a_second": len(ran.records) / last,
        "prompt_tokens": prompt,
        "answer_tokens": sum(record.tokens for record in ran.records),
        "hits": sum(record.cached_tokens or 0 for record in ran.records) / prompt,
    }


def replay(
    stand: Stand, path: Path, systems: Sequence[System], how: Replay, *, repeats: int, pages: int
) -> Any:
    """Every system over one trace, round after round, each round beginning with another; medians."""
    made, left_out = replayed(read_trace(path), how)
    runs: dict[str, list[dict[str, Any]]] = {system.name: [] for system in systems}
    for number in range(repeats):
        turn = number % len(systems)
        for system in (*systems[turn:], *systems[:turn]):
            runs[system.name].append(run(stand, system, made, how.members, pages))
    source, licence = SOURCES.get(path.stem, ("unknown", "unknown"))
    table = {
        name: {fact: statistics.median(one[fact] for one in found) for fact in found[0]}
        | {"all": [one["requests_a_second"] for one in found]}
        for name, found in runs.items()
    }
    facts = {"source": source, "licence": licence, "requests": len(made), "left_out": left_out}
    conversations = len({session.conversation for session in made})
    return {**facts, "conversations": conversations, "systems": table}


def page(results: Mapping[str, Any]) -> str:
    """The tables."""
    birth, how = results["birth"], results["how"]
    lines = [
        "# Public traces with members assigned",
        "",
        f"`{birth['command']}`; {birth['hardware']}; commit {birth['commit']}; {birth['date']}; Python {birth['python']}, "
        f"torch {birth['versions']['torch']}; medians of {birth['repeats']}, systems in turn on the same cores.",
        "",
        f"Random weights of {how['shape']} parameters, {how['members']} members; the turns of a conversation go round them. "
        f"Every length is {how['scale']:g} times the trace's; the first requests of each trace, all due at once, as fast as "
        f"it goes; {how['pages']} pages of 16 tokens for every system. Which member was asked is made up: no trace tells.",
    ]
    for name, found in results["traces"].items():
        first = next(iter(found["systems"].values()))["requests_a_second"]
        lines += [
            "",
            f"## {found['source']}",
            "",
            f"{name}, {found['licence']}; {found['requests']} requests of {found['conversations']} conversations, "
            f"{found['left_out']} too long and left out.",
            "",
            "| | requests/s | | lowest to highest | prompt tokens that did not run |",
            "|---|---|---|---|---|",
        ]
        for system, row in found["systems"].items():
            rate, spread = row["requests_a_second"], f"{min(row['all']):.2f} to {max(row['all']):.2f}"
            lines.append(f"| {system} | {rate:.2f} | {rate / first:.2f}x | {spread} | {row['hits']:.1%} |")
    lines += [
        "",
        "Azure's trace does not tell what prompts hold, so nothing is common to any two: where only prompts are shared, "
        "nothing is gained there.",
        "",
    ]
    return "\n".join(lines)


def main(given: Sequence[str] | None = None) -> None:
    """Replay, and write the page and its numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--systems", default="independent,prefillshare,icarus")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--shape", default="24M")
    parser.add_argument("--scale", type=float, default=0.03)
    parser.add_argument("--limit", type=int, default=160)
    parser.add_argument("--pages", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    asked = parser.parse_args(given)
    stand, systems = Stand(asked.shape), systems_named(asked.systems)
    facts: dict[str, Any] = {"speed": AT_ONCE, "scale": asked.scale, "limit": asked.limit}
    how = Replay(members=member_names(asked.members), max_length=stand.config.max_length, **facts)
    found = {
        path.stem: replay(stand, path, systems, how, repeats=asked.repeats, pages=asked.pages)
        for path in asked.traces
    }
    options = (
        f"--systems {asked.systems} --members {asked.members} --shape {asked.shape} --scale {asked.scale:g}"
    )
    files = " ".join(path.name for path in asked.traces)
    command = f"python -m heliostat.bench.replaying {files} {options} --limit {asked.limit} --repeats {asked.repeats}"
    kept = {name: getattr(asked, name) for name in ("shape", "members", "scale", "limit", "pages")}
    results = {
        "birth": certificate(command, repeats=asked.repeats, seed=how.seed),
        "how": kept,
        "traces": found,
    }
    asked.docs.mkdir(parents=True, exist_ok=True)
    atomic_write_text(asked.docs / "replay.json", json.dumps(results, indent=1) + "\n")
    atomic_write_text(asked.docs / "replay.md", page(results))
    print(f"written: {asked.docs / 'replay.md'}")


if __name__ == "__main__":
    main()
