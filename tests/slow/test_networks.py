"""Router, prefill server and decode server in network namespaces of their own: links that are slow, that lose packets, that
are cut. No wrong text, nothing hangs past its deadline. Wants root and the kernel's namespaces."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from heliostat.build import load_tokenizer, read_family
from heliostat.engine.request import Sampling
from heliostat.llm import LLM
from heliostat.serve.crew import named
from heliostat.serve.dispatch import Dispatcher
from heliostat.serve.dispatch_asked import Asked
from heliostat.serve.http_facts import Expected
from heliostat.serve.http_line import HttpLine
from heliostat.serve.http_worker import HttpWorker
from heliostat.serve.metrics import Metrics
from heliostat.serve.protocol import Order, Role
from heliostat.serve.trouble import Trouble

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
MEMBER = "math"
PROMPT = tuple(range(5, 45))
COUNT = 30
DEADLINE = 4.0


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass
class Net:
    """One namespace, and the link to it: ``here`` is our end."""

    name: str
    here: str
    ours: str
    theirs: str

    def link(self, state: str) -> None:
        ip("link", "set", self.here, state)

    def shape(self, *words: str) -> None:
        """What our end sends goes through this, and what the other sends, too; nothing: as fast as it can."""
        for place in ([], ["ip", "netns", "exec", self.name]):
            device = self.here if not place else self.here.replace("a", "b")
            subprocess.run([*place, "tc", "qdisc", "del", "dev", device, "root"], capture_output=True)
            if words:
                subprocess.run([*place, "tc", "qdisc", "add", "dev", device, "root", *words], check=True)


@pytest.fixture
def nets() -> Iterator[dict[str, Net]]:
    """A namespace for each role; skips where this machine gives none."""
    tag, made = f"{os.getpid() % 10000}", {}
    try:
        for number, role in enumerate(("prefill", "decode")):
            net = Net(f"hs{tag}{number}", f"hsa{tag}{number}", f"10.213.{number}.1", f"10.213.{number}.2")
            made[role] = net
            peer = net.here.replace("a", "b")
            ip("netns", "add", net.name)
            ip("link", "add", net.here, "type", "veth", "peer", "name", peer)
            ip("link", "set", peer, "netns", net.name)
            ip("addr", "add", f"{net.ours}/30", "dev", net.here)
            ip("link", "set", net.here, "up")
            ip("-n", net.name, "addr", "add", f"{net.theirs}/30", "dev", peer)
            ip("-n", net.name, "link", "set", peer, "up")
            ip("-n", net.name, "link", "set", "lo", "up")
        yield made
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', error)}")
    finally:
        for net in made.values():
            for words in (("link", "del", net.here), ("netns", "del", net.name)):
                with suppress(OSError, subprocess.CalledProcessError):
                    ip(*words)


@dataclass
class House:
    """Our end: a dispatcher, and how its workers are met again after a cut."""

    dispatcher: Dispatcher
    expected: dict[str, Expected]
    urls: dict[str, str]
    folder: Path
    workers: dict[str, HttpWorker]

    async def meet(self, role: str) -> None:
        """As the supervisor does, when a server can be reached again."""
        if role in self.workers:
            await self.workers.pop(role).close()
        tokenizer = load_tokenizer(self.folder, read_family(self.folder))
        worker = HttpWorker(HttpLine(self.urls[role]), self.expected[role], tokenizer, beat=0.2, patience=1.5)
        worker.start()
        self.workers[role] = worker
        async with asyncio.timeout(20):
            while True:
                with suppress(ConnectionError):
                    self.dispatcher.join(worker, await worker.describe())
                    return
                await asyncio.sleep(0.1)

    def ask(self) -> Asked:
        family = read_family(self.folder)
        row = named(family, family.row(MEMBER))
        digests = {name: digest for one in self.expected.values() for name, digest in one.modules.items()}
        wish = Sampling(max_tokens=COUNT, ignore_eos=True)
        order = Order(
            id=f"o{os.urandom(4).hex()}",
            row=row,
            digests={name: digests[name] for name in row.modules},
            prompt=PROMPT,
            sampling=wish,
        )
        return self.dispatcher.ask([order])


@asynccontextmanager
async def house(folder: Path, nets: dict[str, Net]) -> AsyncIterator[House]:
    family = read_family(folder)
    row = family.row(MEMBER)
    roles: dict[str, str] = {"prefill": row.prompt_writer, "decode": row.speaker}
    processes: list[asyncio.subprocess.Process] = []
    urls: dict[str, str] = {}
    made = House(Dispatcher(Metrics(), deadline=DEADLINE), {}, urls, folder, {})
    try:
        for role, module in roles.items():
            words = [sys.executable, str(ROOT / "tests" / "slow" / "double_serving.py")]
            words += [str(folder), module, role, role, nets[role].theirs]
            process = await asyncio.create_subprocess_exec(
                *("ip", "netns", "exec", nets[role].name),
                *words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
            )
            processes.append(process)
            module_digest = family.module(module).digest
            made.expected[role] = Expected(
                worker=role, modules={f"{module}#{module_digest[:12]}": module_digest}, roles=(_role(role),)
            )
        for role, process in zip(roles, processes, strict=True):
            assert process.stdout is not None
            line = (await process.stdout.readline()).decode()
            assert line.startswith("UP "), line
            urls[role] = line.split()[1]
            await made.meet(role)
        yield made
    finally:
        await made.dispatcher.stop()
        for worker in made.workers.values():
            await worker.close()
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
            await process.wait()


def _role(role: str) -> Role:
    return "prefill" if role == "prefill" else "decode"


async def heard(asked: Asked, found: list[int]) -> None:
    async for _, said in asked.pieces():
        found.append(said.sampled.token)


def wanted(folder: Path) -> list[int]:
    answer = LLM(folder, dtype="float32").generate(
        list(PROMPT), member=MEMBER, max_tokens=COUNT, ignore_eos=True
    )
    return list(answer[0].ids)


@pytest.mark.parametrize(
    "shape",
    [
        ("tbf", "rate", "64kbit", "burst", "3kb", "latency", "2s"),
        ("tbf", "rate", "200kbit", "burst", "2kb", "limit", "2kb"),
    ],
    ids=["slow", "losing"],
)
def test_slow_links_and_lost_packets_cost_time_only(
    tiny_family: Path, nets: dict[str, Net], shape: tuple[str, ...]
) -> None:
    async def story() -> None:
        async with house(tiny_family, nets) as made:
            made.dispatcher.deadline = 60.0
            for net in nets.values():
                net.shape(*shape)
            for worker in made.workers.values():
                worker._watch._patience = 30.0  # a look takes long here, and says nothing against the server
            found: list[int] = []
            await heard(made.ask(), found)
            assert found == wanted(tiny_family)

    asyncio.run(story())


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_link_that_is_cut_ends_in_time_with_a_reason(
    tiny_family: Path, nets: dict[str, Net], role: str
) -> None:
    right = wanted(tiny_family)

    async def story() -> None:
        loop = asyncio.get_running_loop()
        async with house(tiny_family, nets) as made:
            whole: list[int] = []
            await heard(made.ask(), whole)
            assert whole == right
            began, found, asked = loop.time(), list[int](), made.ask()
            listening = loop.create_task(heard(asked, found))
            if role == "decode":
                while len(found) < 5:
                    await asyncio.sleep(0.005)
            nets[role].link("down")
            with pytest.raises(Trouble) as failed:
                await listening
            assert loop.time() - began < DEADLINE + 2
            assert failed.value.code == "deadline" and found == right[: len(found)] != right
            nets[role].link("up")
            for name in ("prefill", "decode"):
                if made.workers[name].gone:
                    made.dispatcher.leave(name)
                    await made.meet(name)
            again: list[int] = []
            await heard(made.ask(), again)
            assert again == right

    asyncio.run(story())
