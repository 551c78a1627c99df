"""Where an engine's time goes, phase by phase, beside what the machine could do.

``python -m heliostat.bench.profile``: prefill by length, decode by batch with and without adapters, the second row where
who writes is not who speaks, and moving pages through shared memory beside computing them again.
"""

from __future__ import annotations

import argparse
import json
import secrets
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heliostat.bench.birth import certificate
from heliostat.bench.decode import PROMPT, bandwidth, median, prompts
from heliostat.bench.profile_page import page, picture
from heliostat.bench.stand import Stand
from heliostat.bench.systems import SYSTEMS, member_names
from heliostat.bench.trial import EMBEDDED_BASE
from heliostat.engine.engine import PAGE_SIZE, Engine
from heliostat.engine.paged import PagePool
from heliostat.engine.request import Request, Sampling
from heliostat.engine.store import Fetch, Form, Promise, Store
from heliostat.family import SHARINGS, Row
from heliostat.files import atomic_write_text
from heliostat.model.tokenizer import Tokenizer
from heliostat.model.transformer import Transformer
from heliostat.ops.codebook_product import ByRows
from heliostat.ops.native.blocks import Blocks, Laid, Worn

MEMBERS = 8
TOKENS = 13
"""Of each answer: a step of prefill, and twelve of decoding, the first of which does not count."""
LOOP_BATCH = 8
"""Where adapters are also run operation by operation."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured."""

    shapes: Sequence[str] = ("24M", "100M")
    batches: Sequence[int] = (1, 4, 8, 16, 32)
    lengths: Sequence[int] = (64, 256, 512, 1024, 2048)
    repeats: int = 5


@dataclass(slots=True)
class Timed:
    """All blocks at once, and the seconds that they took."""

    inner: Blocks | ByRows
    seconds: float = 0.0

    def serves(self, x: Tensor, laid: Laid) -> bool:
        """As Blocks."""
        return self.inner.serves(x, laid)

    def __call__(self, x: Tensor, angles: tuple[Tensor, Tensor], laid: Laid, worn: Worn = ()) -> None:
        began = time.perf_counter()
        self.inner(x, angles, laid, worn)
        self.seconds += time.perf_counter() - began


@dataclass(slots=True)
class Bench:
    """One engine, and rows to ask it by, in turn."""

    engine: Engine
    rows: Sequence[Row]
    _asked: int = field(default=0)

    def add(self, asked: Sequence[Sequence[int]], tokens: int) -> None:
        """Requests for so many tokens each."""
        wish = Sampling(max_tokens=tokens, ignore_eos=True)
        for place, prompt in enumerate(asked):
            self._asked += 1
            row = self.rows[place % len(self.rows)]
            digests = {name: self.engine.digests[name] for name in row.modules}
            self.engine.add(
                Request(f"r{self._asked}", row=row, digests=digests, prompt=tuple(prompt), sampling=wish)
            )

    def prefill(self, length: int, seed: int) -> float:
        """Seconds to the first token of one fresh prompt."""
        self.add(prompts(1, seed, length), 1)
        began = time.perf_counter()
        while self.engine.unfinished:
            self.engine.step()
        return time.perf_counter() - began

    def decode(self, batch: int, *, timed: Timed | None = None) -> tuple[float, float]:
        """Median seconds of a step in which every request gets a token, and of the blocks in it.

        The prompts of a batch size are always the same, so that they are found and only decoding is left.
        """
        self.add(prompts(batch, batch), TOKENS)
        steps, blocks = [], []
        while self.engine.unfinished:
            began, before = time.perf_counter(), timed.seconds if timed else 0.0
            said = len(self.engine.step())
            if said == batch:
                steps.append(time.perf_counter() - began)
                blocks.append(timed.seconds - before if timed else 0.0)
        return statistics.median(steps[1:]), statistics.median(blocks[1:])


@contextmanager
def looped(model: Transformer) -> Iterator[None]:
    """Operation by operation meanwhile, as where there are no compiled blocks."""
    model.at_once, before = None, model.at_once
    try:
        yield
    finally:
        model.at_once = before


@contextmanager
def watched(model: Transformer) -> Iterator[Timed | None]:
    """The blocks' seconds meanwhile; None where they are not compiled."""
    before = model.at_once
    timed = Timed(before) if before is not None else None
    model.at_once = timed  # type: ignore[assignment]
    try:
        yield timed
    finally:
        model.at_once = before


def benches(stand: Stand, members: Sequence[str], plan: Plan) -> dict[str, Bench]:
    """The base alone, an adapter a member, and adapters that ask what the base writes: on the same weights."""
    longest = max(plan.lengths) + PAGE_SIZE
    count = sum(plan.batches) * -(-(PROMPT + TOKENS) // PAGE_SIZE) + 4 * longest // PAGE_SIZE
    own: dict[str, Sequence[Row]] = {"base": [SHARINGS["independent"].instantiate("base")]}
    own |= {name: list(SYSTEMS[name].rows(members).values()) for name in ("multilora", "icarus")}
    found = {}
    for name, rows in own.items():
        modules = stand.modules(SYSTEMS["icarus" if name == "base" else name], members)
        engine = Engine(
            modules, Tokenizer.load(EMBEDDED_BASE), max_length=stand.config.max_length, pages=count
        )
        found[name] = Bench(engine, rows)
    return found


def decoding(own: Mapping[str, Bench], plan: Plan) -> list[dict[str, Any]]:
    """Milliseconds of a step by batch, in turn, round after round; of the blocks in it; of the loop at one batch."""
    model = next(iter(own["base"].engine.runner.models.values()))
    rows = []
    for batch in plan.batches:
        found: dict[str, list[float]] = {}
        for number in range(plan.repeats + 1):
            with watched(model) as timed:
                for name, bench in own.items():
                    step, blocks = bench.decode(batch, timed=timed)
                    if number:  # the first time reads the prompts
                        found.setdefault(name, []).append(1e3 * step)
                        found.setdefault(f"{name}_blocks", []).append(1e3 * blocks)
            if batch == LOOP_BATCH and number:
                with looped(model):
                    for name in ("multilora", "icarus"):
                        found.setdefault(f"{name}_loop", []).append(1e3 * own[name].decode(batch)[0])
        rows.append({"batch": batch, **{name: statistics.median(values) for name, values in found.items()}})
    return rows


def prefilling(bench: Bench, plan: Plan) -> list[dict[str, Any]]:
    """Seconds of fresh prompts by length."""
    found = []
    for length in plan.lengths:
        seconds = [bench.prefill(length, 10**6 + 100 * length + n) for n in range(plan.repeats + 1)][1:]
        found.append({"tokens": length, "seconds": statistics.median(seconds)})
    return found


def moving(stand: Stand, plan: Plan) -> list[dict[str, Any]]:
    """Seconds to bring a prompt's pages in from another memory, checks included, and to digest them there first."""
    config = stand.config
    width = PagePool.bytes_per_page(config, page_size=PAGE_SIZE, dtype=stand.dtype)
    form = Form(-(-max(plan.lengths) // PAGE_SIZE), 2 * config.layers, width // (2 * config.layers))
    found = []
    with ExitStack() as stack:
        theirs, ours = (
            Store.make(f"heliostat-profile-{secrets.token_hex(4)}", name, form) for name in ("a" * 8, "b" * 8)
        )
        for store in (theirs, ours):
            stack.callback(store.close, remove=True)
        theirs.content[:] = torch.randint(0, 256, (len(theirs.content),), dtype=torch.uint8).numpy().tobytes()
        for length in plan.lengths:
            pages = range(-(-length // PAGE_SIZE))
            promise = Promise(
                theirs.name, theirs.incarnation, pages, [0] * len(pages), _digests(theirs, pages)
            )
            bring = median(partial(_bring, ours, theirs, promise), plan.repeats)
            lend = median(partial(_digests, theirs, pages), plan.repeats)
            found.append({"tokens": length, "bytes": len(pages) * width, "bring": bring, "lend": lend})
    return found


def _digests(store: Store, pages: Sequence[int]) -> list[bytes]:
    return [store.digest(page) for page in pages]


def _bring(own: Store, theirs: Store, promise: Promise) -> None:
    fetch = Fetch(theirs, own, promise)
    for index, number in enumerate(promise.pages):
        fetch.bring(index, number)


@torch.inference_mode()
def products(dtype: torch.dtype) -> float:
    """Operations a second that a large product reaches here."""
    one, two = torch.zeros(2048, 2048, dtype=dtype), torch.zeros(2048, 2048, dtype=dtype)
    return 2 * 2048**3 / median(lambda: one @ two)


def measured(name: str, plan: Plan) -> dict[str, Any]:
    """All of one shape."""
    stand = Stand(name)
    members = member_names(MEMBERS)
    own = benches(stand, members, plan)
    config, size = stand.config, stand.dtype.itemsize
    return {
        "parameters": config.parameters,
        "bytes": config.parameters * size,
        "adapter_bytes": stand.bytes(SYSTEMS["icarus"], members) - config.parameters * size,
        "token_bytes": config.kv_values_per_token * size,
        "decode": decoding(own, plan),
        "prefill": prefilling(own["base"], plan),
        "move": moving(stand, plan),
    }


def main(given: Sequence[str] | None = None) -> None:
    """Measure, and write the page, its numbers and its picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="24M,100M")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="two batch sizes and two lengths of 24M, once")
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    asked = parser.parse_args(given)
    plan = Plan(asked.shapes.split(","), repeats=asked.repeats)
    command = f"python -m heliostat.bench.profile --shapes {asked.shapes} --repeats {asked.repeats}"
    if asked.short:
        plan, command = (
            Plan(("24M",), (1, LOOP_BATCH), (64, 256), 1),
            "python -m heliostat.bench.profile --short",
        )
    device = torch.device("cpu")
    found: dict[str, Any] = {name: measured(name, plan) for name in plan.shapes}
    results = {
        "birth": certificate(command, repeats=plan.repeats, members=MEMBERS, context=PROMPT + TOKENS // 2),
        "bandwidth": bandwidth(device),
        "products": products(torch.bfloat16),
        "shapes": found,
    }
    asked.docs.mkdir(parents=True, exist_ok=True)
    atomic_write_text(asked.docs / "profile.json", json.dumps(results, indent=1) + "\n")
    atomic_write_text(asked.docs / "profile.svg", picture(results))
    atomic_write_text(asked.docs / "profile.md", page(results))
    print(f"written: {asked.docs / 'profile.md'}")


if __name__ == "__main__":
    main()
