"""The simulator beside the engine: the same sessions, measured and reckoned, and the table of both.

``python -m heliostat.bench.validating``: steps are measured and costs fitted first, on batches of their own; then the
real engine answers sessions of every sharing at some loads, and the simulator the same sessions with the fitted costs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from heliostat.bench.birth import certificate
from heliostat.bench.costs import Fitted, read_costs
from heliostat.bench.counting import Case
from heliostat.bench.decode import SHAPES
from heliostat.bench.direct import Direct
from heliostat.bench.layout import Machine, pools_of, stations
from heliostat.bench.machines import measured_machine
from heliostat.bench.measured import summary
from heliostat.bench.records import Limits, Run
from heliostat.bench.simulator import Service
from heliostat.bench.steps import LONGEST, MEMBERS, PAGES, table, toolbox
from heliostat.bench.trial import EMBEDDED_BASE
from heliostat.bench.workloads import Lengths, Load, Session, respelled, sessions
from heliostat.build import Loaded
from heliostat.engine.engine import Engine
from heliostat.family import BASE, SHARINGS, choose
from heliostat.files import atomic_write_text
from heliostat.model.tokenizer import Tokenizer

LOADS = (0.5, 0.75, 3.0)
"""Times the throughput that the simulator finds at most; the last is a service that is overrun."""
SESSIONS = 200
TOLERANCE = {"throughput": 0.10, "p95": 0.25}
"""What the simulator is to keep to: of throughput at every load, of 95th percentiles below 80 % load."""
LOAD = Load(
    members=tuple(f"member{n}" for n in range(MEMBERS)),
    workflow="react",
    sessions=SESSIONS,
    turns=1,
    popularity=0.0,
    role_place="kept",
    pause=0.1,
    lengths=Lengths(context=96, role=16, answer=16, observation=24),
)
"""The sessions: short, so that 200 of them fit into half a minute of one core."""
SAID = ("throughput", "ttft p50", "ttft p95", "tpot p50", "tpot p95", "session p50", "session p95", "hits")


def case_of(sharing: str, members: Sequence[str]) -> Case:
    """Rows of members over the modules of the toolbox."""
    found = SHARINGS[sharing]
    letter = "a" if found.tuner == "lora" else "m"
    own = {member: f"{letter}{number}" for number, member in enumerate(members)}
    weights = dict.fromkeys(own.values(), BASE) if letter == "a" else {}
    return Case(sharing, {member: found.instantiate(name) for member, name in own.items()}, weights)


def machine_of(costs: Fitted) -> Machine:
    """A worker as the engine of the measurement is."""
    return replace(measured_machine(replace(costs, hop=0.0), pages=PAGES), max_length=LONGEST)


def simulated(case: Case, costs: Fitted, asked: Sequence[Session]) -> Run:
    """One worker that does all, as reckoned."""
    pools = pools_of(case, split=False, apart=False)
    return Service(stations(machine_of(costs), case, pools), case.rows).run(asked)


def measured(case: Case, modules: Mapping[str, Loaded], asked: Sequence[Session]) -> Run:
    """One real engine with an empty cache."""
    needed = {name for row in case.rows.values() for name in row.modules} | {BASE}
    chosen = {name: modules[name] for name in modules if name in needed}
    engine = Engine(chosen, Tokenizer.load(EMBEDDED_BASE), max_length=LONGEST, pages=PAGES)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    return Direct(engine, case.rows, clock).run(asked)


def peak(case: Case, costs: Fitted, load: Load) -> float:
    """Sessions a second that the simulated worker ends when more than enough are there."""
    found = simulated(case, costs, sessions(replace(load, rate=1e6)))
    return len(found.spans) / max(end for _, end in found.spans.values())


def told(run: Run) -> dict[str, float | None]:
    """What is compared. Seconds; throughput in answer tokens a second."""
    found = summary(run, Limits())
    numbers: dict[str, float | None] = {"throughput": found["throughput"]["answer_tokens"]}
    for name in ("ttft", "tpot", "session"):
        for q in ("p50", "p95"):
            numbers[f"{name} {q}"] = found[name][q].get("value")
    numbers["hits"] = found["hits"]["ratio"].get("value")
    return numbers


def _times(reckoned: float | None, real: float | None) -> float | None:
    """How many times the one is the other; None where either is missing or there is nothing to divide by."""
    return reckoned / real if real and reckoned is not None else None


def point(
    case: Case, modules: Mapping[str, Loaded], costs: Fitted, load: Load, share: float, most: float
) -> dict[str, Any]:
    """One row at a share of the ``most`` sessions a second: measured, simulated, how many times the one is the other."""
    at = replace(load, rate=share * most)
    if share > 1:
        at = replace(at, sessions=at.sessions // 2)
    asked = respelled(sessions(at), f"{case.name}/{share}")
    real, reckoned = told(measured(case, modules, asked)), told(simulated(case, costs, asked))
    ratios = {name: _times(reckoned[name], real[name]) for name in SAID}
    return {
        "sharing": case.name,
        "load": share,
        "rate": at.rate,
        "measured": real,
        "simulated": reckoned,
        "ratio": ratios,
        "within": within(ratios, share),
    }


def within(ratios: Mapping[str, float | None], share: float) -> dict[str, bool]:
    """Whether throughput, and below 80 % load every 95th percentile, are as near as they are to be."""
    found = {}
    for name, ratio in ratios.items():
        kind = "throughput" if name == "throughput" else "p95" if name.endswith("p95") and share < 0.8 else ""
        if kind and ratio is not None:
            found[name] = abs(ratio - 1) <= TOLERANCE[kind]
    return found


def page(points: Sequence[Mapping[str, Any]], birth: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """The table."""
    error = about["error"]
    lines = [
        "# The simulator beside the engine",
        "",
        f"One worker, shape {about['shape']} with random weights ({about['dtype']}), {about['threads']} thread, "
        f"{MEMBERS} members; {SESSIONS} sessions of",
        "`react` a point (half as many where it is overrun), the same for both. Costs were fitted to other batches; of",
        f"{about['steps']['held_out']} steps held out, half are within {error['median']:.0%} and 95 % within "
        f"{error['p95']:.0%}, and all together come to {about['total']:.2f}",
        "of what was measured. Each cell: simulated, and in brackets simulated over measured. Load: of the most that",
        "the simulator finds; at 3 the service is overrun, so its times say nothing and only throughput is compared.",
        "Time is the thread's own time on the processor, and where nothing is to do it jumps to the next call.",
        "",
        f"`{birth['command']}`; {birth['hardware']}; commit {birth['commit']}; {birth['date']}",
        "",
        "| sharing | load | tokens/s | TTFT p50, ms | TTFT p95, ms | TPOT p50, ms | TPOT p95, ms | session p95, s | hits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in points:
        cells = [
            _cell(row, "throughput", 1, 0),
            *(_cell(row, name, 1000, 1) for name in SAID[1:5]),
            _cell(row, "session p95", 1, 2),
            _cell(row, "hits", 1, 2),
        ]
        lines.append(f"| {row['sharing']} | {row['load']:g} | {' | '.join(cells)} |")
    kept = [near for row in points for near in row["within"].values()]
    lines += [
        "",
        f"Goal: throughput within {TOLERANCE['throughput']:.0%}, 95th percentiles within {TOLERANCE['p95']:.0%} "
        "below 80 % load. "
        f"Kept in {sum(kept)} of {len(kept)} cells{_missed(points)}.",
        "",
    ]
    return "\n".join(lines)


def _cell(row: Mapping[str, Any], name: str, times: float, digits: int) -> str:
    value, ratio = row["simulated"][name], row["ratio"][name]
    if value is None:
        return "too few"
    if ratio is None:
        return f"{times * value:.{digits}f}"
    return f"{times * value:.{digits}f} ({ratio:.2f}x)"


def _missed(points: Sequence[Mapping[str, Any]]) -> str:
    missed = [
        f"{row['sharing']} at {row['load']:g}: {name} {row['ratio'][name]:.2f}x"
        for row in points
        for name, near in row["within"].items()
        if not near
    ]
    return f"; missed: {', '.join(missed)}" if missed else ""


def main(given: Sequence[str] | None = None) -> None:
    """Measure, simulate, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="24M", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--sharings", default=",".join(SHARINGS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60, help="of steps that costs are fitted to")
    parser.add_argument("--sessions", type=int, default=SESSIONS)
    parser.add_argument("--costs", type=Path, help="a table that was measured before, instead")
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    asked = parser.parse_args(given)
    choose(asked.shape, SHAPES, what="shape")
    torch.set_num_threads(asked.threads)
    command = f"python -m heliostat.bench.validating --shape {asked.shape} --sharings {asked.sharings}"
    command += f" --threads {asked.threads} --sessions {asked.sessions}"
    command += f" --costs {asked.costs.name}" if asked.costs else f" --seconds {asked.seconds:g}"
    costs = (
        read_costs(asked.costs)
        if asked.costs
        else table(asked.shape, seconds=asked.seconds, hop=0.0, command=command)[0]
    )
    modules, load, points = toolbox(asked.shape), replace(LOAD, sessions=asked.sessions), []
    for sharing in asked.sharings.split(","):
        case = case_of(sharing, load.members)
        most = peak(case, costs, load)
        for share in LOADS:
            points.append(point(case, modules, costs, load, share, most))
            near = ", ".join(f"{name} {r:.2f}x" for name, r in points[-1]["ratio"].items() if r is not None)
            print(f"{sharing} at {share:g}: {near}", flush=True)
    birth = certificate(command, seed=load.seed, sessions=asked.sessions)
    asked.docs.mkdir(parents=True, exist_ok=True)
    whole = {"birth": birth, "costs": costs.to_json(), "points": points}
    atomic_write_text(asked.docs / "simulator.json", json.dumps(whole, indent=1) + "\n")
    atomic_write_text(asked.docs / "simulator.md", page(points, birth, costs.about))


if __name__ == "__main__":
    main()
