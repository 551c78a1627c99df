"""A server's dispatcher and its workers on counted time, with everything going wrong that can: one story a seed.

Real engines on toy modules, the real dispatcher, the real line between them; only time, and what is done to frames,
pages and workers, is made up. Every answer is compared with what the same request says alone in one process.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from msgspec.structs import replace

from heliostat.bench.trial import EMBEDDED_BASE
from heliostat.build import Loaded
from heliostat.clock import run_virtual
from heliostat.engine.engine import Engine
from heliostat.engine.request import Request, Sampling
from heliostat.engine.sampler import Draw, Sampled, sample
from heliostat.errors import Refused
from heliostat.family import SHARINGS, Row
from heliostat.linear.lora import adapter_of, add_adapter
from heliostat.model.config import parse_config, read_config
from heliostat.model.tokenizer import Tokenizer
from heliostat.model.transformer import Transformer
from heliostat.serve.dispatch import Dispatcher
from heliostat.serve.dispatch_asked import Open
from heliostat.serve.faults import Chance, FaultyLine, Odds, faulty_shelves
from heliostat.serve.link import Ends
from heliostat.serve.link_client import RemoteWorker
from heliostat.serve.link_server import Servant
from heliostat.serve.log import Log
from heliostat.serve.metrics import Metrics
from heliostat.serve.protocol import Order, Role
from heliostat.serve.trouble import Trouble
from heliostat.serve.worker import EngineWorker
from heliostat.serve.worker_core import Core
from heliostat.serve.worker_drive import Paced
from heliostat.serve.worker_lending import Terms

PAGE, MAX_LENGTH = 4, 96
STEP = 0.01
"""Seconds of counted time that a step takes."""
CLOSE, TRIALS = 1e-4, 32
"""Nats by which a log-probability may be another when sums are taken in another order; so many ways are tried."""
LATE = 1.0
"""Seconds after its deadline at which a request that has not ended hangs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """What happens in a story."""

    requests: int
    seed: int = 0
    frames: Odds = field(default_factory=Odds)
    pages: Odds = field(default_factory=Odds)
    deaths: float = 0.0
    """Seconds between two deaths of workers, on average; 0: none dies."""
    leaving: float = 0.0
    """Chance that a client leaves before its answer has ended."""
    every: float = 0.03
    """Seconds between two requests, on average."""
    pool: int = 60
    lease: float = 3.0
    deadline: float = 60.0


@dataclass(slots=True)
class Outcome:
    """What came of it."""

    right: int = 0
    ties: int = 0
    """Right up to a token that the reference says or does not say by the order of its sums."""
    wrong: int = 0
    left: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    hung: int = 0
    leaked: int = 0
    """Pages that somebody holds when all is over."""
    retried: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    deaths: int = 0
    seconds: float = 0.0
    """Counted time."""

    def facts(self) -> dict[str, Any]:
        """As JSON has it."""
        plain = {name: getattr(self, name) for name in self.__slots__}
        return {name: dict(v) if isinstance(v, Counter) else v for name, v in plain.items()}


@dataclass(frozen=True, slots=True)
class Cast:
    """Modules, members and what each request says when it is alone."""

    modules: Mapping[str, Loaded]
    tokenizer: Tokenizer
    rows: Mapping[str, Row]

    def engine(self, pages: int, share: tuple[str, str] | None = None, *names: str) -> Engine:
        """An engine over all modules, or those named."""
        chosen = {name: self.modules[name] for name in names or self.modules}
        return Engine(chosen, self.tokenizer, max_length=MAX_LENGTH, pages=pages, page_size=PAGE, share=share)


def cast(seed: int = 0) -> Cast:
    """A toy base, two full modules and two adapters: eight members, each sharing twice."""
    shape = {
        "model_type": "llama",
        "vocab_size": read_config(EMBEDDED_BASE).vocabulary,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
    }
    torch.manual_seed(seed)
    modules = {}
    for name in ("base", "a", "b"):
        model = Transformer(parse_config(shape))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.25)
        modules[name] = Loaded(name, f"digest of {name}", name, model.requires_grad_(False))
    base = modules["base"].model
    for name in ("c", "d"):
        add_adapter(base, name, r=4, alpha=8, targets=("q_proj", "o_proj", "down_proj"))
        for part in adapter_of(base, name).values():
            torch.nn.init.normal_(part.a, std=0.2)
            torch.nn.init.normal_(part.b, std=0.2)
            part.requires_grad_(False)
        modules[name] = Loaded(name, f"digest of {name}", "base", base, name)
    own = {name: ("c", "d") if sharing.tuner == "lora" else ("a", "b") for name, sharing in SHARINGS.items()}
    rows = {f"{s}.{m}": SHARINGS[s].instantiate(m) for s, members in own.items() for m in members}
    return Cast(modules, Tokenizer.load(EMBEDDED_BASE), rows)


# ---- requests and what they must say


def orders_of(cast: Cast, plot: Plot, *, kinds: int = 400) -> list[Order]:
    """The requests of a story: many begin alike, some are sampled; at most ``kinds`` different ones."""
    dice = random.Random(plot.seed)
    digests = cast.engine(8).digests
    stems = [dice.choices(range(20, 200), k=40) for _ in range(6)]
    made = []
    for number in range(min(kinds, plot.requests)):
        member = dice.choice(sorted(cast.rows))
        row, stem = cast.rows[member], dice.choice(stems)
        prompt = (*stem[: dice.randint(0, 40)], *dice.choices(range(20, 200), k=dice.randint(1, 9)))
        sampling = Sampling(
            max_tokens=dice.randint(1, 10),
            temperature=dice.choice((0.0, 0.8)),
            seed=number,
            ignore_eos=True,
        )
        named = {name: digests[name] for name in row.modules}
        made.append(
            Order(id=str(number), member=member, row=row, digests=named, prompt=prompt, sampling=sampling)
        )
    return made


Reference = Mapping[str, tuple[int, ...]]
"""Order -> its tokens."""


def references(cast: Cast, orders: Sequence[Order]) -> Reference:
    """Each alone in one process."""
    engine = cast.engine(40)
    return {order.id: tuple(piece.token for piece in _alone(engine, order)) for order in orders}


def _alone(engine: Engine, order: Order, *, logprobs: int | None = None) -> list[Sampled]:
    engine.add(
        Request(
            order.id,
            row=order.row,
            digests=order.digests,
            prompt=order.prompt,
            sampling=dataclasses.replace(order.sampling, logprobs=logprobs),
        )
    )
    said = []
    while engine.unfinished:
        said += [piece.sampled for piece in engine.step() if piece.sampled is not None]
    return said


def near(cast: Cast, order: Order, place: int) -> set[int]:
    """Tokens that the same request would have said there, had its log-probabilities been ``CLOSE`` to what they are.

    Sums in another order, as in another batch, move them by less; where that decides, either token is right.
    """
    said = _alone(cast.engine(40), order, logprobs=10**6)
    top = said[place].top
    chances = torch.full((1, len(top)), -torch.inf)
    chances[0, [token for token, _ in top]] = torch.tensor([chance for _, chance in top])
    draw = Draw(order.sampling, [one.token for one in said[:place]], ())
    dice = torch.Generator().manual_seed(0)
    moved = chances + CLOSE * torch.randn(TRIALS, len(top), generator=dice)
    return {one.token for one in sample(moved, [draw] * TRIALS)}


def judge(
    outcome: Outcome, said: Sequence[int], wanted: Sequence[int], others: Callable[[int], Collection[int]]
) -> None:
    """Right, right up to a tie, or wrong; ``others``: tokens that are as right at a place."""
    for place, (ours, theirs) in enumerate(zip(said, wanted, strict=False)):
        if ours != theirs:
            if ours in others(place):
                outcome.ties += 1
            else:
                outcome.wrong += 1
            return
    if len(said) == len(wanted):
        outcome.right += 1
    else:
        outcome.wrong += 1


# ---- the stage


class Counted(Metrics):
    """Counts why requests were asked again."""

    reasons: Counter[str]

    def retried(self, request: Open, why: str) -> None:
        """Another attempt follows."""
        self.reasons[why] += 1
        super().retried(request, why)


@dataclass(slots=True, eq=False)
class Life:
    """One life of a worker: both ends of its line."""

    inside: EngineWorker
    servant: Servant
    remote: RemoteWorker


@dataclass(slots=True, eq=False)
class Stage:
    """Workers that come and go, and the dispatcher in front."""

    cast: Cast
    plot: Plot
    dispatcher: Dispatcher
    outcome: Outcome
    hosts: Mapping[str, tuple[Sequence[str], tuple[Role, ...]]]
    frames: Chance
    pages: Chance
    name: str
    lives: dict[str, Life] = field(default_factory=dict)
    _born: int = 0

    async def begin(self, worker: str) -> None:
        """A new life."""
        (modules, roles), loop = self.hosts[worker], asyncio.get_running_loop()
        self._born += 1
        incarnation = f"{worker}-{self._born}"
        engine = self.cast.engine(self.plot.pool, (f"{self.name}-{incarnation}", incarnation), *modules)
        terms = Terms(worker=worker, incarnation=incarnation, roles=roles, lease=self.plot.lease)
        inside = EngineWorker(
            Core(engine, terms, shelves=faulty_shelves(self.pages), clock=loop.time), drive=Paced(STEP)
        )
        inside.start()
        there, here = (FaultyLine(end, self.frames) for end in Ends.pair())
        servant, remote = Servant(inside, there, log=Log(None)), RemoteWorker(here, log=Log(None))
        servant.start()
        remote.start()
        self.lives[worker] = Life(inside, servant, remote)
        while worker in self.lives:
            with suppress(ConnectionError, Refused):
                self.dispatcher.join(remote, await remote.describe())
                return

    async def end(self, worker: str) -> None:
        """Dead, with all that was in it; who watches it notices a moment later."""
        life = self.lives.pop(worker, None)
        if life is None:
            return
        life.servant.stop()
        await life.inside.close()
        await asyncio.sleep(0.05)
        self.dispatcher.leave(worker)
        life.remote.lost("its process was killed")
        await life.remote.close()

    async def deaths(self, dice: random.Random) -> None:
        """Now and then somebody dies and is started again."""
        while True:
            await asyncio.sleep(dice.expovariate(1 / self.plot.deaths))
            worker = dice.choice(sorted(self.hosts))
            self.outcome.deaths += 1
            await self.end(worker)
            await asyncio.sleep(0.5)
            await self.begin(worker)

    async def client(self, order: Order, wanted: Sequence[int], leaves: float) -> None:
        """One request, asked and heard to its end, or left."""
        outcome, said = self.outcome, []
        try:
            asked = self.dispatcher.ask([order])
        except Trouble as trouble:
            outcome.failed[str(trouble.code)] += 1
            return
        try:
            async with asyncio.timeout(leaves):
                async for _, piece in asked.pieces():
                    said.append(piece.sampled.token)
        except TimeoutError:
            if leaves < self.plot.deadline:
                outcome.left += 1
            else:
                outcome.hung += 1
            self.dispatcher.abort(asked)
        except Trouble as trouble:
            outcome.failed[str(trouble.code)] += 1
        except Refused:
            outcome.failed["refused"] += 1
        else:
            judge(outcome, said, wanted, partial(near, self.cast, order))

    async def leaked(self) -> int:
        """Pages that are held when nobody wants anything any more."""
        await asyncio.sleep(2 * self.plot.lease + 15)
        found = 0
        for life in self.lives.values():
            table = life.inside.core.engine.table
            found += table.pages - table.available() + (not life.inside.core.idle)
        return found


def halves(cast: Cast) -> dict[str, tuple[Sequence[str], tuple[Role, ...]]]:
    """Two workers that host what prompts need, and two that host what answers need."""
    writers = sorted({row.prompt_writer for row in cast.rows.values()})
    speakers = sorted({name for row in cast.rows.values() for name in (row.answer_writer, row.speaker)})
    return {
        "prefill-0": (writers, ("prefill",)),
        "prefill-1": (writers, ("prefill",)),
        "decode-0": (speakers, ("decode",)),
        "decode-1": (speakers, ("decode",)),
    }


async def _story(cast: Cast, plot: Plot, orders: Sequence[Order], wanted: Reference, name: str) -> Outcome:
    outcome, dice, loop = Outcome(), random.Random(plot.seed + 1), asyncio.get_running_loop()
    metrics = Counted(cast.rows)
    metrics.reasons = outcome.retried
    dispatcher = Dispatcher(
        metrics, max_waiting=plot.requests, deadline=plot.deadline, patience=plot.deadline
    )
    frames, pages = Chance(plot.seed + 2, plot.frames), Chance(plot.seed + 3, plot.pages)
    stage = Stage(cast, plot, dispatcher, outcome, halves(cast), frames, pages, name)
    dispatcher.broke = lambda worker, why: None
    await asyncio.gather(*(stage.begin(worker) for worker in stage.hosts))
    killing = loop.create_task(stage.deaths(dice)) if plot.deaths else None
    clients = []
    for number in range(plot.requests):
        order = orders[number % len(orders)]
        again = replace(order, id=f"{order.id}/{number}")
        leaves = dice.uniform(0, 0.15) if dice.random() < plot.leaving else plot.deadline + LATE
        clients.append(loop.create_task(stage.client(again, wanted[order.id], leaves)))
        await asyncio.sleep(dice.expovariate(1 / plot.every))
    await asyncio.gather(*clients)
    if killing is not None:
        killing.cancel()
        await asyncio.gather(killing, return_exceptions=True)
    outcome.leaked, outcome.seconds = await stage.leaked(), loop.time()
    outcome.faults = frames.met + pages.met
    for worker in list(stage.lives):
        await stage.end(worker)
    await dispatcher.stop()
    return outcome


def play(cast: Cast, plot: Plot, *, name: str, wanted: Reference | None = None) -> Outcome:
    """A story from its beginning to its end; ``name``: what its workers' memories are called."""
    orders = orders_of(cast, plot)
    return run_virtual(_story(cast, plot, orders, wanted or references(cast, orders), name))
