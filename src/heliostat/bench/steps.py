"""Measures steps of the real engine on this machine and fits the costs that plans and simulations reckon with.

``python -m heliostat.bench.steps --shape 24M --threads 1 --out costs.json``: batches of all rows over random weights
(prompts short and long, contexts, whole modules and adapters, alone and mixed), and pages brought in from another
memory. A fifth of the batches is held out; the error on their steps stands in the table.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

import torch

from heliostat.bench.birth import certificate
from heliostat.bench.costs import PARTS, Fitted, counted, errors, fit, works_of
from heliostat.bench.decode import SHAPES, shape
from heliostat.bench.trial import EMBEDDED_BASE
from heliostat.build import Loaded, best_dtype
from heliostat.engine.batch import Run
from heliostat.engine.engine import PAGE_SIZE, Engine
from heliostat.engine.paged import PagePool
from heliostat.engine.request import Request, Sampling
from heliostat.engine.store import Fetch, Form, Promise, Store
from heliostat.family import BASE, SHARINGS, Row, choose
from heliostat.files import atomic_write_text
from heliostat.linear.lora import adapter_of, add_adapter
from heliostat.model.config import parse_config
from heliostat.model.tokenizer import Tokenizer
from heliostat.model.transformer import Transformer
from heliostat.train.recipe import TARGETS

MEMBERS, RANK = 4, 16
LONGEST, PAGES, ANSWER = 1536, 4096, 10
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
HELD_OUT = 5
"""Every so-manyth batch is not fitted to, but fitted against."""
Sample = tuple[list[float], float]
"""(how much of each of PARTS a step had, its seconds)."""


def toolbox(name: str, *, members: int = MEMBERS, dtype: torch.dtype | None = None) -> dict[str, Loaded]:
    """Random weights of a shape: a base, whole modules ``m0`` ... and adapters ``a0`` ... on the base."""
    torch.manual_seed(0)
    config = parse_config(shape(name))
    modules = {}
    for weights in (BASE, *(f"m{n}" for n in range(members))):
        model = Transformer(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.02)
        model = model.to(dtype or best_dtype()).requires_grad_(False)
        model.join()
        modules[weights] = Loaded(weights, f"random {weights}", weights, model)
    base = modules[BASE].model
    for number in range(members):
        adapter = f"a{number}"
        add_adapter(base, adapter, r=RANK, alpha=2 * RANK, targets=TARGETS["query_side"])
        for part in adapter_of(base, adapter).values():
            for weight in (part.a, part.b):
                weight.data = torch.randn_like(weight).mul_(0.02).to(base.dtype)
                weight.requires_grad_(False)
        modules[adapter] = Loaded(adapter, f"random {adapter}", BASE, base, adapter)
    return modules


def rows_of(members: int = MEMBERS) -> dict[str, list[Row]]:
    """Which rows run together, by the name of a mixture."""
    whole, ridden = [f"m{n}" for n in range(members)], [f"a{n}" for n in range(members)]
    found = {
        name: [s.instantiate(own) for own in (ridden if s.tuner == "lora" else whole)]
        for name, s in SHARINGS.items()
    }
    found["base"] = [Row(BASE, BASE, BASE, BASE)]
    found["adapters"] = [SHARINGS["independent"].instantiate(own) for own in ridden]
    return found


class Bench:
    """An engine whose steps are timed."""

    def __init__(self, modules: Mapping[str, Loaded], clock: Callable[[], float]) -> None:
        self.engine = Engine(modules, Tokenizer.load(EMBEDDED_BASE), max_length=LONGEST, pages=PAGES)
        self.runs: dict[str, Run] = {name: (m.weights, m.adapter) for name, m in modules.items()}
        self.clock = clock
        self._count = 0

    def batch(self, rows: Sequence[Row], lengths: Sequence[int], seed: int) -> list[Sample]:
        """Requests of these rows in turn, with prompts of these lengths: every step until all are answered.

        They come all at once with an even ``seed``, else one by one: then some read while others speak.
        """
        dice, engine, found = random.Random(seed), self.engine, []
        waiting = [(rows[number % len(rows)], length) for number, length in enumerate(lengths)]
        while waiting or engine.unfinished:
            come = len(waiting) if seed % 2 == 0 else dice.randint(0 if engine.unfinished else 1, 2)
            for row, length in waiting[:come]:
                self._add(row, dice.choices(range(3, 1000), k=length))
            del waiting[:come]
            begin = self.clock()
            engine.step()
            took = self.clock() - begin
            found.append((counted(works_of(engine.latest, self.runs)), took))
        return found

    def _add(self, row: Row, prompt: Sequence[int]) -> None:
        self._count += 1
        self.engine.add(
            Request(
                str(self._count),
                row=row,
                digests={name: self.engine.digests[name] for name in row.modules},
                prompt=tuple(prompt),
                sampling=Sampling(max_tokens=ANSWER, ignore_eos=True),
            )
        )


def batches(seed: int) -> Iterator[tuple[list[Row], list[int]]]:
    """What to run, without end: every mixture by turns, sizes and lengths drawn."""
    dice, mixtures = random.Random(seed), list(rows_of().values())
    while True:
        for rows in mixtures:
            count = dice.choice(BATCHES)
            most = dice.choice((32, 128, 512, 1400))
            lengths = [round(math.exp(dice.uniform(math.log(8), math.log(most)))) for _ in range(count)]
            yield dice.sample(rows, dice.randint(1, len(rows))), lengths


def measured(bench: Bench, seconds: float) -> tuple[list[Sample], list[Sample]]:
    """(steps to fit to, steps held out), for about so many seconds of running."""
    told: list[Sample] = []
    held: list[Sample] = []
    spent = 0.0
    for number, (rows, lengths) in enumerate(batches(0)):
        found = bench.batch(rows, lengths, number)
        spent += sum(sample[1] for sample in found)
        if number < 7:  # every mixture once: caches and clocks warm up
            spent = 0.0
            continue
        (held if number % HELD_OUT == 0 else told).extend(found)
        if spent > seconds and held:
            return told, held
    raise AssertionError("there are batches without end")


def moving(page_bytes: int, slices: int, *, pages: int = 256, repeats: int = 5) -> float:
    """Seconds to bring in a byte of another's pages: copied and its digest looked at; the median of some rounds."""
    form = Form(pages, slices, page_bytes // slices)
    ours, theirs = (
        Store.make(f"heliostat-steps-{os.getpid()}-{who}", "measured", form) for who in ("a", "b")
    )
    try:
        numbers = range(pages)
        promise = Promise(
            theirs.name, "measured", numbers, [0] * pages, [theirs.digest(page) for page in numbers]
        )
        found = []
        for _ in range(repeats):
            fetch = Fetch(theirs, ours, promise)
            begin = time.perf_counter()
            for page in numbers:
                fetch.bring(page, page)
            found.append((time.perf_counter() - begin) / fetch.bytes)
        return median(found)
    finally:
        for store in (ours, theirs):
            store.close(remove=True)


def table(name: str, *, seconds: float, hop: float, command: str) -> tuple[Fitted, list[Sample]]:
    """Measure a shape with as many threads as torch has now; returns the costs and the steps held out."""
    modules = toolbox(name)
    # One thread is judged by its own time on the processor: what the neighbours do is no cost of a step.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    told, held = measured(Bench(modules, clock), seconds)
    coefficients = fit(told)
    off, model = errors(coefficients, held), modules[BASE].model
    page_bytes = PagePool.bytes_per_page(model.config, page_size=PAGE_SIZE, dtype=model.dtype)
    about = {
        "birth": certificate(command),
        "shape": name,
        "parameters": model.config.parameters,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "page_size": PAGE_SIZE,
        "page_bytes": page_bytes,
        "members": MEMBERS,
        "rank": RANK,
        "steps": {"fitted": len(told), "held_out": len(held)},
        "error": {"median": median(off), "p95": off[int(0.95 * (len(off) - 1))], "worst": off[-1]},
        "total": _total(coefficients, held),
    }
    byte_seconds = moving(page_bytes, 2 * model.config.layers)
    costs = Fitted(dict(zip(PARTS, coefficients, strict=True)), byte_seconds, hop, about=about)
    return costs, held


def _total(coefficients: Sequence[float], samples: Sequence[Sample]) -> float:
    """Reckoned over measured seconds, of all together."""
    reckoned = sum(sum(c * n for c, n in zip(coefficients, counts, strict=True)) for counts, _ in samples)
    return reckoned / sum(seconds for _, seconds in samples)


def main(given: Sequence[str] | None = None) -> None:
    """Measure, fit, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="24M", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=90, help="of steps")
    parser.add_argument("--hop", type=float, default=0.0003, help="assumed seconds of a message to a worker")
    parser.add_argument("--out", type=Path, default=Path("out/costs.json"))
    asked = parser.parse_args(given)
    choose(asked.shape, SHAPES, what="shape")
    torch.set_num_threads(asked.threads)
    command = f"python -m heliostat.bench.steps --shape {asked.shape} --threads {asked.threads}"
    command += f" --seconds {asked.seconds:g} --hop {asked.hop:g}"
    costs, _ = table(asked.shape, seconds=asked.seconds, hop=asked.hop, command=command)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(asked.out, json.dumps(costs.to_json(), indent=1) + "\n")
    error = costs.about["error"]
    print(
        f"{costs.about['steps']['held_out']} steps held out: half within {error['median']:.1%}, 95 % within "
        f"{error['p95']:.1%}; all together {costs.about['total']:.3f} of what was measured\nwritten: {asked.out}"
    )


if __name__ == "__main__":
    main()
