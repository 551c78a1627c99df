"""A worker dies between any two words: the request goes on elsewhere and its answer is the same, and nothing is left.

Each story is one request over lines that are cut, once and for ever, after so many frames; all that was in the worker
is gone with it. On counted time every moment there is gets its turn.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec
import pytest

from heliostat.build import Loaded
from heliostat.clock import run_virtual
from heliostat.engine.request import Sampling
from heliostat.model.tokenizer import Tokenizer
from heliostat.serve.link import Ends, Line
from heliostat.serve.link_client import RemoteWorker
from heliostat.serve.link_server import Servant
from heliostat.serve.log import Log
from heliostat.serve.protocol import Failed, Order, Said
from heliostat.serve.worker import EngineWorker
from tests.promises.crews import Listener, assert_empty, make_worker, order_of
from tests.promises.toys import PAGE, ROWS, Job, make_engine, serve

Modules = Mapping[str, Loaded]


@dataclass
class Fuse:
    """Counts frames on all lines of one worker; when it has burnt down the worker is dead."""

    left: int
    burn: Callable[[], None] = lambda: None

    def spend(self) -> bool:
        """Whether the frame still passes."""
        self.left -= 1
        if self.left == 0:
            self.burn()
        return self.left > 0


class Cut:
    """A line that ends with its worker."""

    def __init__(self, line: Line, fuse: Fuse) -> None:
        self._line, self._fuse = line, fuse

    @property
    def receive(self) -> Callable[[bytes], None]:
        return self._line.receive

    @receive.setter
    def receive(self, receive: Callable[[bytes], None]) -> None:
        self._line.receive = receive

    def send(self, frame: bytes) -> None:
        if self._fuse.spend():
            self._line.send(frame)

    def close(self) -> None:
        self._line.close()


def mortal(inside: EngineWorker, fuse: Fuse) -> RemoteWorker:
    """A worker that dies when its fuse has burnt down: it steps no more and its memory has no name."""
    there, here = Ends.pair()
    servant, remote = (
        Servant(inside, Cut(there, fuse), log=Log(None)),
        RemoteWorker(Cut(here, fuse), log=Log(None)),
    )

    def die() -> None:
        servant.stop()
        store = inside.core.engine.store
        assert store is not None
        store.close(remove=True)
        inside._drive._stopped = True  # type: ignore[attr-defined]

    fuse.burn = die
    servant.start()
    remote.start()
    return remote


async def persistent(
    order: Order, prefillers: list[RemoteWorker], decoders: list[RemoteWorker]
) -> list[Said]:
    """The answer, from the first workers that live; each failure is a reason to ask the next."""
    heard: list[Said] = []
    for attempt in range(12):
        answer = tuple(said.sampled.token for said in heard)
        now = msgspec.structs.replace(order, id=f"{order.id}.{attempt}", answer=answer)
        first, second = prefillers[attempt % len(prefillers)], decoders[attempt % len(decoders)]
        handed = await first.prefill(now)
        if isinstance(handed, Failed):
            assert handed.retry, handed
            continue
        if handed.first is not None:
            heard.append(handed.first)
            now = msgspec.structs.replace(now, answer=(*now.answer, handed.first.sampled.token))
        if handed.handle is None:
            return heard
        listener = Listener()
        failed = await second.decode(now, listener.hear, handed.handle)
        if failed is None:
            await listener.ended.wait()
            failed = listener.failed
        heard += listener.said
        first.release(handed.handle)
        if failed is None:
            return heard
        assert failed.retry, failed
    raise AssertionError(f"no answer in twelve attempts, the last failed with {failed}")


FRAMES = 40
"""More than one request takes on one worker's lines, so that the last stories have no death in them."""


@pytest.mark.parametrize("row", ["sun-a", "icarus-la"])
@pytest.mark.parametrize("who", ["prefill", "decode"])
def test_a_death_between_any_two_frames(who: str, row: str, modules: Modules, tokenizer: Tokenizer) -> None:
    wish = Sampling(max_tokens=6, ignore_eos=True, temperature=0.9, seed=3, logprobs=1)
    job = Job(ROWS[row], tuple(range(5, 5 + 3 * PAGE + 2)), wish)
    engine = make_engine(modules, tokenizer)
    (alone,) = serve(engine, [job])
    deaths = set()

    async def story(frames: int) -> float:
        fuses = {"prefill": Fuse(10**9), "decode": Fuse(10**9)}
        fuses[who] = Fuse(frames)
        inside = [
            make_worker(modules, tokenizer, name=f"{part}{n}", pages=30) for part in fuses for n in (0, 1)
        ]
        remote = [
            mortal(worker, fuse)
            for worker, fuse in zip(
                inside, (fuses["prefill"], Fuse(10**9), fuses["decode"], Fuse(10**9)), strict=True
            )
        ]
        said = await persistent(order_of(job, engine.digests), remote[:2], remote[2:])
        assert tuple(one.sampled.token for one in said) == alone.ids
        assert said[-1].finish == "length" and [one.number for one in said] == list(range(6))
        took = asyncio.get_running_loop().time()
        await asyncio.sleep(31)  # leases of what nobody could release
        dead = fuses[who].left <= 0
        lives = [w for n, w in enumerate(inside) if not (dead and n == (0 if who == "prefill" else 2))]
        await assert_empty(*lives)
        if took > 0.5:
            deaths.add(frames)
        return took

    longest = max(run_virtual(story(frames)) for frames in range(1, FRAMES))
    assert len(deaths) > 3, "it mattered when the worker died"
    assert longest < 40, "nobody hangs"
