"""What an engine's step takes, from what its passes hold: coefficients fitted to measured steps. No torch.

A step is described pass by pass, for each reads its weights once. The description is made from what the scheduler
decided, without laying the passes out; ``works_in`` makes the same from passes that are, and a test holds them equal.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from heliostat.engine.arrivals import STEP_BYTES
from heliostat.engine.batch import Pass, Run, order_of
from heliostat.engine.step import Step
from heliostat.errors import Refused

ROUNDS = 20_000
"""Most rounds of the fit; it ends earlier where nothing moves any more."""


@dataclass(slots=True)
class Work:
    """What one pass runs through its weights."""

    weights: str
    rows: int = 0
    """Rows of requests that decode: one position each, with one row or two."""
    prompt_rows: int = 0
    """Rows of chunks that are longer: prompts, and what is written again."""
    context: int = 0
    """Positions that those who decode see, each request once however many rows it has."""
    pairs: int = 0
    """(row, position that it sees) of the longer chunks."""
    read: int = 0
    """Positions that the longer chunks see, each chunk once."""
    adapters: int = 0
    """Different adapters among its rows."""
    adapted_rows: int = 0
    sampled: int = 0
    """Rows that choose a token."""


def works_of(step: Step, modules: Mapping[str, Run]) -> list[Work]:
    """The works of a step's passes, in the order in which these run; ``modules`` as ``passes_of`` takes them."""
    if not step.chunks:
        return []
    order = order_of(step.chunks, modules)
    found = {(0, weights): Work(weights) for weights in order}
    adapters: dict[tuple[int, str], set[str]] = {}
    for chunk in step.chunks:
        writer = modules[chunk.writer]
        speaker = writer if chunk.speaker is None else modules[chunk.speaker]
        place = 0, writer[0]
        work, count = found[place], chunk.stop - chunk.start
        if count == 1:
            work.rows += 1
            work.context += chunk.stop
        else:
            work.prompt_rows += count
            work.pairs += (chunk.start + 1 + chunk.stop) * count // 2
            work.read += chunk.stop
        if writer[1] is not None:
            work.adapted_rows += count
            adapters.setdefault(place, set()).add(writer[1])
        if chunk.speaker is None:
            continue
        if speaker == writer:
            work.sampled += 1
            continue
        late = int(order.get(speaker[0], -1) < order[writer[0]])
        beside = late, speaker[0]
        other = found.setdefault(beside, Work(speaker[0]))
        other.sampled += 1
        if beside != place or count == 1:  # else one more query of a longer chunk
            other.rows += 1
            other.context += chunk.stop if beside != place else 0
        else:
            other.prompt_rows += 1
            other.pairs += chunk.stop
        if speaker[1] is not None:
            other.adapted_rows += 1
            adapters.setdefault(beside, set()).add(speaker[1])
    for place, names in adapters.items():
        found[place].adapters = len(names)
    return [work for _, work in sorted(found.items(), key=lambda item: item[0][0])]


def works_in(passes: Sequence[Pass]) -> list[Work]:
    """The same from passes that are laid out."""
    return [_work(each) for each in passes]


def _work(each: Pass) -> Work:
    work = Work(each.weights, sampled=len(each.sampled))
    for entry in each.entries:
        if entry.visible[0] == entry.visible[-1]:
            work.rows += len(entry.rows)
            work.context += entry.visible[-1]
        else:
            work.prompt_rows += len(entry.rows)
            work.pairs += sum(entry.visible)
            work.read += entry.visible[-1]
    adapted = [segment for segment in each.segments if segment.adapter is not None]
    work.adapters = len(adapted)
    work.adapted_rows = sum(segment.stop - segment.start for segment in adapted)
    return work


class Costs(Protocol):
    """Seconds of what a worker does."""

    @property
    def byte_seconds(self) -> float:
        """Of bringing in one byte of another worker's pages."""

    @property
    def hop(self) -> float:
        """Of a message between server and worker."""

    @property
    def step_bytes(self) -> int:
        """Most bytes that are brought in between two steps."""

    def seconds(self, works: Sequence[Work]) -> float:
        """Of one step with these passes."""


KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""Rows of a pass at which its seconds are found; between two of them they lie on a line."""
PARTS = (
    "step",
    *(f"pass of {knot}" for knot in KNOTS),
    *(f"adapted pass of {knot}" for knot in KNOTS),
    "pass beside others",
    "adapter",
    "adapted row",
    "row",
    "context",
    "pair",
    "sampled",
)
"""What a step's seconds are a sum over; each has a coefficient. How long a pass takes is no line in its rows: kernels
change with them, and a few rows ride along with the reading of the weights. A pass in which any row wears an adapter
runs otherwise, so it has a curve of its own. Weights that take turns with others are not in a processor's cache when
their turn comes: so passes of steps that have several are counted once more."""
_PLACE = {name: place for place, name in enumerate(PARTS)}
_CURVE, _ADAPTED = _PLACE["pass of 1"], _PLACE["adapted pass of 1"]


def counted(works: Sequence[Work]) -> list[float]:
    """How much of each of PARTS a step has."""
    found = [0.0] * len(PARTS)
    found[0] = 1.0
    found[_PLACE["pass beside others"]] = _beside(works)
    for work in works:
        first = _ADAPTED if work.adapters else _CURVE
        for knot, share in _between(work.rows + work.prompt_rows):
            found[first + knot] += share
        found[_PLACE["adapter"]] += work.adapters
        found[_PLACE["adapted row"]] += work.adapted_rows
        found[_PLACE["row"]] += work.rows
        found[_PLACE["context"]] += work.context
        found[_PLACE["pair"]] += work.pairs
        found[_PLACE["sampled"]] += work.sampled
    return found


def _beside(works: Sequence[Work]) -> int:
    return len(works) if len(works) > 1 else 0


def _between(rows: int) -> tuple[tuple[int, float], ...]:
    """(knot's place, its share) of a number of rows; above the last knot in proportion to it."""
    if rows >= KNOTS[-1]:
        return ((len(KNOTS) - 1, rows / KNOTS[-1]),)
    place = bisect_right(KNOTS, rows) - 1
    share = (rows - KNOTS[place]) / (KNOTS[place + 1] - KNOTS[place])
    return ((place, 1 - share), (place + 1, share))


@dataclass(frozen=True, slots=True)
class Fitted:
    """Costs of a machine on which steps were measured. All coefficients are at least 0."""

    coefficients: Mapping[str, float]
    """Seconds for one of each of PARTS."""
    byte_seconds: float = 0.0
    hop: float = 0.0
    step_bytes: int = STEP_BYTES
    about: Mapping[str, Any] = field(default_factory=dict)
    """Where it comes from: birth certificate, shape, threads, error on steps that were held out, page bytes."""

    def __post_init__(self) -> None:
        if strange := sorted(set(self.coefficients) ^ set(PARTS)):
            raise Refused(
                f"costs with {', '.join(strange)}: they must have exactly {', '.join(PARTS)}; measure them anew "
                "with python -m heliostat.bench.steps"
            )
        for name, value in {**self.coefficients, "byte_seconds": self.byte_seconds, "hop": self.hop}.items():
            if not 0 <= value < float("inf"):
                raise Refused(f"costs: {name} is {value!r}; it must be seconds, at least 0")

    def seconds(self, works: Sequence[Work]) -> float:
        """Of one step with these passes: the sum over ``counted``, written out because it runs for every step."""
        each = self.coefficients
        total = each["step"] + _beside(works) * each["pass beside others"]
        for work in works:
            curve = "adapted pass of" if work.adapters else "pass of"
            for knot, share in _between(work.rows + work.prompt_rows):
                total += share * each[f"{curve} {KNOTS[knot]}"]
            total += work.adapters * each["adapter"] + work.adapted_rows * each["adapted row"]
            total += work.rows * each["row"] + work.context * each["context"]
            total += work.pairs * each["pair"] + work.sampled * each["sampled"]
        return total

    def to_json(self) -> dict[str, Any]:
        """As ``from_json`` reads it."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Fitted:
        """Refused where it is no table of costs."""
        try:
            return cls(
                {str(name): float(value) for name, value in data["coefficients"].items()},
                float(data["byte_seconds"]),
                float(data["hop"]),
                int(data["step_bytes"]),
                dict(data["about"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Refused(
                f"no table of costs ({error}); make one with python -m heliostat.bench.steps"
            ) from error


def fit(samples: Sequence[tuple[Sequence[float], float]]) -> list[float]:
    """Coefficients, none below 0, with which the counts of each sample come closest to its seconds.

    Least squares of relative errors, by coordinates: small steps count as much as large ones.
    """
    if not samples:
        raise Refused("nothing was measured: there is nothing to fit")
    rows = [[count / seconds for count in counts] for counts, seconds in samples]
    size = len(rows[0])
    scale = [max((row[n] for row in rows), default=0.0) or 1.0 for n in range(size)]
    rows = [[value / unit for value, unit in zip(row, scale, strict=True)] for row in rows]
    gram = [[sum(row[a] * row[b] for row in rows) for b in range(size)] for a in range(size)]
    aim = [sum(row[a] for row in rows) for a in range(size)]
    found = [0.0] * size
    for _ in range(ROUNDS):
        moved = 0.0
        for a in range(size):
            if not gram[a][a]:
                continue
            rest = aim[a] - sum(gram[a][b] * found[b] for b in range(size) if b != a)
            value = max(0.0, rest / gram[a][a])
            moved = max(moved, abs(value - found[a]))
            found[a] = value
        if moved < 1e-12:
            break
    return [value / unit for value, unit in zip(found, scale, strict=True)]


def errors(coefficients: Sequence[float], samples: Sequence[tuple[Sequence[float], float]]) -> list[float]:
    """Relative error of each sample, ascending by size."""
    return sorted(
        abs(sum(c * n for c, n in zip(coefficients, counts, strict=True)) / seconds - 1)
        for counts, seconds in samples
    )


def read_costs(path: Path) -> Fitted:
    """A table that ``bench.steps`` wrote. Refused where it is none."""
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refused(f"{path} cannot be read as a table of costs: {error}") from error
    return Fitted.from_json(data)
