"""Workers over toy modules on counted time, and a plain way to have them answer: prefill here, decode there."""

import asyncio
import itertools
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from heliostat.build import Loaded
from heliostat.engine.store import Shelves
from heliostat.model.tokenizer import Tokenizer
from heliostat.serve.faults import Chance, FaultyLine, Odds
from heliostat.serve.link import Ends
from heliostat.serve.link_client import RemoteWorker
from heliostat.serve.link_server import Servant
from heliostat.serve.log import Log
from heliostat.serve.protocol import Failed, Order, Said, Worker
from heliostat.serve.worker import EngineWorker
from heliostat.serve.worker_core import Core
from heliostat.serve.worker_drive import Drive, Paced
from heliostat.serve.worker_lending import Terms
from tests.promises.toys import Job, make_engine

_numbers = itertools.count()
_RUN = f"heliostat-test-{secrets.token_hex(4)}"


def make_worker(
    modules: Mapping[str, Loaded],
    tokenizer: Tokenizer,
    *,
    name: str = "worker",
    lease: float = 30.0,
    credit: int = 16,
    pace: float = 0.01,
    shelves: Shelves | None = None,
    drive: Drive | None = None,
    **options: Any,
) -> EngineWorker:
    """A worker whose pages others can read; its loop is the one that is running."""
    incarnation = f"t{next(_numbers)}"
    engine = make_engine(modules, tokenizer, share=(f"{_RUN}-{incarnation}", incarnation), **options)
    core = Core(
        engine, Terms(worker=name, incarnation=incarnation, lease=lease, credit=credit), shelves=shelves
    )
    worker = EngineWorker(core, drive=drive or Paced(pace))
    worker.start()
    return worker


def order_of(job: Job, digests: Mapping[str, str], **more: Any) -> Order:
    """The order of a job; ``digests`` of all modules, hosted by whomever."""
    return Order(
        id=f"order-{next(_numbers)}",
        row=job.row,
        digests={name: digests[name] for name in job.row.modules},
        prompt=job.prompt,
        sampling=job.sampling,
        salt=job.salt,
        **more,
    )


@dataclass
class Listener:
    """Hears one order to its end."""

    said: list[Said] = field(default_factory=list)
    failed: Failed | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def hear(self, event: Said | Failed) -> None:
        """As ``Worker.decode`` wants it."""
        assert not self.ended.is_set(), "something was heard after the end"
        if isinstance(event, Failed):
            self.failed = event
        else:
            self.said.append(event)
        if isinstance(event, Failed) or event.finish is not None:
            self.ended.set()


@dataclass
class Told:
    """What came back of one order."""

    ids: tuple[int, ...]
    text: str
    chances: tuple[float, ...]
    finish: str | None
    failures: tuple[str, ...] = ()


async def answered(
    order: Order, decoder: Worker, prefiller: Worker | None = None, *, tries: int = 20
) -> Told:
    """The answer, asked again with what was said so far where a worker says that this makes sense."""
    heard: list[Said] = []
    failures: list[str] = []
    for attempt in range(tries):
        answer = order.answer + tuple(said.sampled.token for said in heard)
        now = msgspec.structs.replace(order, id=f"{order.id}.{attempt}", answer=answer)
        failed = await _attempt(now, heard, decoder, prefiller)
        if failed is None:
            break
        failures.append(failed.code)
        assert failed.retry, failed
        await asyncio.sleep(0.05)
    else:
        raise AssertionError(f"{order.id} failed {tries} times: {failures}")
    assert [said.number for said in heard] == list(range(len(order.answer), len(order.answer) + len(heard)))
    return Told(
        tuple(said.sampled.token for said in heard),
        "".join(said.text for said in heard),
        tuple(said.sampled.logprob or 0.0 for said in heard),
        heard[-1].finish,
        tuple(failures),
    )


async def _attempt(
    order: Order, heard: list[Said], decoder: Worker, prefiller: Worker | None
) -> Failed | None:
    handle = None
    if prefiller is not None:
        handed = await prefiller.prefill(order)
        if isinstance(handed, Failed):
            return handed
        if handed.first is not None:
            heard.append(handed.first)
            order = msgspec.structs.replace(order, answer=(*order.answer, handed.first.sampled.token))
        if handed.handle is None:
            return None
        handle = handed.handle
    listener = Listener()
    failed = await decoder.decode(order, listener.hear, handle)
    if failed is None:
        await listener.ended.wait()
        failed = listener.failed
    heard += listener.said
    if prefiller is not None and handle is not None:
        prefiller.release(handle)
    return failed


async def crowd(
    orders: Sequence[Order], decoder: Worker, prefiller: Worker | None = None, *, tries: int = 20
) -> list[Told]:
    """All at once."""
    return list(await asyncio.gather(*(answered(o, decoder, prefiller, tries=tries) for o in orders)))


async def assert_empty(*workers: EngineWorker) -> None:
    """Nothing is open, lent or held on any of them: pages are back where they were."""
    for worker in workers:
        stats = await worker.stats()
        assert stats.available == stats.pages and not stats.leased and not stats.arriving, stats
        assert worker.core.idle and not worker.core.engine.unfinished


@dataclass
class Linked:
    """A worker behind a line with faults, and how it is asked from the other end."""

    inside: EngineWorker
    remote: RemoteWorker
    servant: Servant
    met: Counter[str]

    async def close(self) -> None:
        """Both ends."""
        await self.remote.close()
        self.servant.stop()
        await self.inside.close()


def linked(inside: EngineWorker, *, seed: int = 0, odds: Odds | None = None) -> Linked:
    """``inside`` as if it were another process's."""
    there, here = Ends.pair()
    met: Counter[str] = Counter()
    lines = [
        FaultyLine(end, Chance(seed + n, odds or Odds(), met=met)) for n, end in enumerate((there, here))
    ]
    servant, remote = Servant(inside, lines[0], log=Log(None)), RemoteWorker(lines[1], log=Log(None))
    servant.start()
    remote.start()
    return Linked(inside, remote, servant, met)


def forget_memories() -> None:
    """Give up the names of all workers' pages: a test may leave its workers as they are."""
    for path in Path("/dev/shm").glob(f"{_RUN}-*"):
        path.unlink()
