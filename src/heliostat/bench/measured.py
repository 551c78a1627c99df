"""From what a client saw to what may be said of a server: rates, times, goodput, hits, its own faults. No torch.

A request is *due* when the workload says so. Goodput is of all that were due: a failure, a time-out and a call that
could not be made because the one before it failed are misses. What Ctrl-C cut short counts neither for nor against.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from heliostat.bench.counting import PAGE, Counted, cases, count
from heliostat.bench.logs import Log, Logged, pack
from heliostat.bench.records import PHASES, Limits, Record, Run
from heliostat.bench.statistics import Queue, percentile, queue, ratio
from heliostat.bench.workloads import POOLS, Session, prompt_ids

SLOW_LOOP = 0.02
"""Seconds of lateness (99 of 100 rings below) up to which the client does not speak of itself."""
SLOW_SHARE = 0.05
"""Of the median time to the first text: where the client's own lag is more, its numbers say so."""


def summary(run: Run, limits: Limits) -> dict[str, Any]:
    """All that is said of one run; values with intervals, or the reason why there is none."""
    due = [record for record in run.records if record.outcome != "unfinished"]
    if not due:
        return {"run": run.number, "rate": run.rate, "requests": {"due": 0}, "stopped": run.stopped}
    waiting = queue(list(run.spans.values())) if run.spans else Queue((), False)
    met = [record for record in due if record.meets(limits)]
    first, last = min(record.scheduled for record in due), max(record.end for record in due)
    wall = max(last - first, 1e-9)
    answered = [record for record in due if record.answered]
    return {
        "run": run.number,
        "rate": run.rate,
        "seconds": wall,
        "stopped": run.stopped,
        "sessions": {"ended": len(run.spans), "conversations": len(set(run.conversations.values()))},
        "requests": _requests(due, answered, met, len(run.records) - len(due)),
        "throughput": {
            "requests": len(answered) / wall,
            "sessions": len(run.spans) / wall,
            "answer_tokens": sum(record.tokens for record in answered) / wall,
            "prompt_tokens": sum(record.prompt_tokens or 0 for record in answered) / wall,
        },
        "goodput": {
            "share": ratio((_group(run, r), float(r.meets(limits)), 1.0) for r in due).to_json(),
            "requests": len(met) / wall,
        },
        "queue": {"windows": list(waiting.means), "grows": waiting.grows, "why": waiting.why},
        "ttft": _spread(run, answered, _ttft, waiting.grows),
        "tpot": _spread(run, answered, _tpot, waiting.grows),
        "latency": _spread(run, answered, _latency, waiting.grows),
        "session": _sessions(run, waiting.grows),
        "hits": _hits(run, answered),
        "by_member": _by_member(due),
        "where": where(answered),
        "phases": phases(answered),
        "tpot_steps": steps([found for r in answered if (found := r.tpot) is not None]),
        "client": client(run, answered),
    }


def _requests(
    due: Sequence[Record], answered: Sequence[Record], met: Sequence[Record], unfinished: int
) -> dict[str, Any]:
    return {
        "due": len(due),
        "sent": sum(record.sent is not None for record in due),
        "answered": len(answered),
        "met": len(met),
        "unfinished": unfinished,
        "outcomes": dict(sorted(Counter(record.outcome for record in due).items())),
        "too_many": sum(record.too_many for record in due),
        "stand_ins": sum(record.stand_ins for record in due),
        "short": sum(record.tokens < record.asked_tokens for record in answered),
        "bundled": sum(record.bundled for record in answered),
        "without_usage": sum(record.answer_tokens is None for record in answered),
    }


def _group(run: Run, record: Record) -> int:
    """What a record is a sample of: calls of one conversation go together."""
    return run.conversations.get(record.session, record.session)


def _ttft(record: Record) -> float | None:
    return record.ttft


def _tpot(record: Record) -> float | None:
    return record.tpot


def _latency(record: Record) -> float | None:
    return record.end - record.scheduled


def _spread(
    run: Run, records: Iterable[Record], find: Callable[[Record], float | None], grows: bool
) -> dict[str, Any]:
    samples = [(_group(run, r), value) for r in records if (value := find(r)) is not None]
    return _percentiles(samples, grows)


def _sessions(run: Run, grows: bool) -> dict[str, Any]:
    """Whole sessions, from their scheduled start to their last answer; those with a failed call are left out."""
    failed = {r.session for r in run.records if not r.answered}
    samples = [
        (run.conversations.get(number, number), end - start)
        for number, (start, end) in run.spans.items()
        if number not in failed
    ]
    return _percentiles(samples, grows)


def _percentiles(samples: Sequence[tuple[int, float]], grows: bool) -> dict[str, Any]:
    return {f"p{q}": percentile(samples, q, grows=grows).to_json() for q in (50, 95, 99)}


def _hits(run: Run, answered: Iterable[Record]) -> dict[str, Any]:
    """Prompt tokens that did not have to run, where the server tells."""
    told = [r for r in answered if r.cached_tokens is not None and r.prompt_tokens]
    parts = [(_group(run, r), float(r.cached_tokens or 0), float(r.prompt_tokens or 0)) for r in told]
    cached, prompt = (int(sum(part[place] for part in parts)) for place in (1, 2))
    return {
        "told": len(told),
        "cached_tokens": cached,
        "prompt_tokens": prompt,
        "ratio": ratio(parts).to_json(),
    }


def _by_member(due: Iterable[Record]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for record in due:
        sums = found.setdefault(
            record.member,
            {"due": 0, "answered": 0, "prompt_tokens": 0, "cached_tokens": 0, "answer_tokens": 0},
        )
        sums["due"] += 1
        sums["answered"] += record.answered
        if record.answered:
            sums["prompt_tokens"] += record.prompt_tokens or 0
            sums["cached_tokens"] += record.cached_tokens or 0
            sums["answer_tokens"] += record.tokens
    return dict(sorted(found.items()))


def where(answered: Sequence[Record]) -> dict[str, float]:
    """Mean seconds of a request by what a client can tell apart."""
    if not answered:
        return {}
    sums = dict.fromkeys(("late or refused for now", "to the first text", "to the last", "to the end"), 0.0)
    for r in answered:
        assert r.sent is not None and r.first is not None and r.last is not None, "it was answered"
        parts = (r.sent - r.scheduled, r.first - r.sent, r.last - r.first, r.end - r.last)
        for name, seconds in zip(sums, parts, strict=True):
            sums[name] += seconds
    return {name: seconds / len(answered) for name, seconds in sums.items()}


def phases(answered: Sequence[Record]) -> dict[str, Any]:
    """Seconds of a request as the server tells them apart, of those answers for which it does: means, and medians.

    ``the rest`` is what lies between the two: the way there and back, HTTP, the client.
    """
    told = [(r, r.phases, r.sent) for r in answered if r.phases is not None and r.sent is not None]
    if not told:
        return {"told": 0}
    parts: dict[str, list[float]] = {name: [known[name] for _, known, _ in told] for name in PHASES}
    parts["the rest"] = [max(0.0, r.end - sent - sum(known.values())) for r, known, sent in told]
    return {
        "told": len(told),
        "mean": {name: sum(seconds) / len(told) for name, seconds in parts.items()},
        "p50": {name: median(seconds) for name, seconds in parts.items()},
    }


def steps(values: Sequence[float], count: int = 100) -> list[list[float]]:
    """A distribution as at most ``count`` points (value, share of values up to it)."""
    ordered = sorted(values)
    places = sorted({max(1, round(len(ordered) * n / count)) for n in range(1, count + 1)}) if ordered else []
    return [[ordered[place - 1], place / len(ordered)] for place in places]


def client(run: Run, answered: Sequence[Record]) -> dict[str, Any]:
    """How slow the client was itself, and whether that may pass for the server's slowness."""
    late = sorted(run.lateness.late) or [0.0]
    lags = sorted(record.lag for record in answered) or [0.0]
    loop, lag = late[int(0.99 * (len(late) - 1))], lags[int(0.99 * (len(lags) - 1))]
    usual = median([found for r in answered if (found := r.ttft) is not None] or [0.0])
    slow = max(loop, lag) > max(SLOW_LOOP, SLOW_SHARE * usual)
    return {
        "lag_p99": lag,
        "lag_worst": lags[-1],
        "loop_p99": loop,
        "loop_worst": late[-1],
        "cpu_share": run.lateness.cpu / run.lateness.wall if run.lateness.wall else 0.0,
        "slow": slow,
        "why": f"the client itself was late by {1000 * max(loop, lag):.0f} ms (99 of 100 below): "
        "part of what it measured is its own; take another machine, or less load"
        if slow
        else "",
    }


# ---- what could be shared of what was sent


def planned_log(sessions: Sequence[Session]) -> Log:
    """The sessions as they would be logged if every answer were its stand-in, one call after the other."""
    found = []
    for session in sessions:
        for call in session.calls:
            ids = prompt_ids(call, {})
            found.append(
                Logged(
                    time=session.start + call.number * 1e-6,
                    member=call.member,
                    prompt_tokens=len(ids),
                    answer_tokens=call.answer_tokens,
                    prompt=pack(ids),
                    answer=pack(call.stand_in),
                )
            )
    return Log(found)


def ceilings(sessions: Sequence[Session], members: Iterable[str]) -> dict[str, dict[str, Any]]:
    """For every sharing, the hit ratio and pool that the sessions allow: counted in planned ids, every page kept."""
    log = planned_log(sessions)
    found: Mapping[str, Counted] = {c.case: c for c in count(log, cases(members), size=PAGE)}
    return {
        name: {
            "hit_ratio": counted.cached / counted.prompt,
            "from_other_members": counted.cached_other / counted.prompt,
            "prefill_tokens": counted.prefill,
            "session_tokens": counted.kept / len(sessions),
            "pools": {pool: times * counted.kept / len(sessions) for pool, times in POOLS.items()},
        }
        for name, counted in found.items()
    }
