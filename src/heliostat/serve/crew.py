"""Those who work for a server: they begin, end, and come to host what a member's row needs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from heliostat.build import read_family, verify_member
from heliostat.errors import Refused
from heliostat.family import Family, Row
from heliostat.serve.dispatch import Dispatcher
from heliostat.serve.metrics_now import Standing
from heliostat.serve.protocol import Described, Stats
from heliostat.serve.roster import family_name, module_name
from heliostat.serve.worker import EngineWorker


class Crew(Protocol):
    """All workers of a server; lives on the event loop."""

    folder: Path
    """The family's."""

    @property
    def failure(self) -> str:
        """Why no request can be answered any more; empty while some can."""

    async def start(self) -> None:
        """Returns when every worker is ready. Refused, by name, where one is not what it should be."""

    async def stop(self) -> None:
        """End them all."""

    def standing(self, stats: Mapping[str, Stats]) -> tuple[Standing, ...]:
        """How each is, by what was asked of them just now."""

    def missing(self) -> Mapping[str, str]:
        """Workers that are not there, and how that is."""

    async def host(self, source: str) -> tuple[Row, Mapping[str, str]]:
        """Have a member, or a module alone, hosted as the folder has it now: its row over the engines' names, and
        their digests of its modules. Refused where that cannot be, and nothing is changed."""

    async def keep_only(self, needed: Collection[str]) -> None:
        """Let go of what was hosted for members and is not among these (the engines' names)."""


@dataclass(frozen=True, slots=True)
class Hosts:
    """Has members hosted by workers, as the family's folder has them now."""

    folder: Path
    tokenizer: str
    """Digest of the tokenizer that serves."""
    dispatcher: Dispatcher
    places: Callable[[Row], Mapping[str, Sequence[str]]]
    """Worker -> modules of a row that it should host, by the family's names."""

    async def host(self, source: str) -> tuple[Row, dict[str, str], dict[str, dict[str, str]]]:
        """The row over the engines' names, the engines' digests of its modules, and for each worker what it hosts
        of them: the family's names -> digests."""
        family, row = await asyncio.to_thread(self._read, source)
        wanted = {
            worker: {module: family.module(module).digest for module in modules}
            for worker, modules in self.places(row).items()
        }
        await self.dispatcher.load({worker: self._missing(worker, found) for worker, found in wanted.items()})
        new = named(family, row)
        return new, digests_of(new, self.dispatcher.described.values()), wanted

    def _read(self, name: str) -> tuple[Family, Row]:
        """Refused where the member is not what it was tuned as."""
        family = read_family(self.folder)
        if self.tokenizer and family.tokenizer != self.tokenizer:
            raise Refused("the family has another tokenizer than the one that serves: start the server again")
        if name in family.members:
            verify_member(family, name, folder=self.folder)
        return family, family.row(name)

    def _missing(self, worker: str, wanted: Mapping[str, str]) -> dict[str, str]:
        described = self.dispatcher.described.get(worker)
        there = described.modules if described is not None else {}
        return {name: digest for name, digest in wanted.items() if module_name(name, digest) not in there}


def named(family: Family, row: Row) -> Row:
    """The row over the engines' names."""
    parts = (row.prompt_writer, row.answer_writer, row.speaker, row.first_speaker)
    return Row(*(module_name(part, family.module(part).digest) for part in parts))


def digests_of(row: Row, described: Collection[Described]) -> dict[str, str]:
    """The engines' digests of a row's modules; Refused where nobody hosts one."""
    hosted = {name: digest for each in described for name, digest in each.modules.items()}
    if missing := [name for name in row.modules if name not in hosted]:
        raise Refused(f"no worker hosts {family_name(missing[0])!r} now")
    return {name: hosted[name] for name in row.modules}


class Alone:
    """One worker in this very process, which hosts everything."""

    def __init__(
        self, worker: EngineWorker, name: str, dispatcher: Dispatcher, folder: Path, tokenizer: str
    ) -> None:
        self.folder = folder
        self.worker, self._name, self._dispatcher = worker, name, dispatcher
        self._hosts = Hosts(folder, tokenizer, dispatcher, lambda row: {name: row.modules})

    @property
    def failure(self) -> str:
        """What ends the worker is told to the dispatcher."""
        return ""

    async def start(self) -> None:
        """Take it in."""
        self.worker.start()
        self._dispatcher.join(self.worker, await self.worker.describe())

    async def stop(self) -> None:
        """End it after the step that it is in."""
        self._dispatcher.leave(self._name)
        await self.worker.close()

    def standing(self, stats: Mapping[str, Stats]) -> tuple[Standing, ...]:
        """Nothing that the server itself does not tell."""
        return ()

    def missing(self) -> Mapping[str, str]:
        """Its failure is the server's."""
        return {}

    async def host(self, source: str) -> tuple[Row, Mapping[str, str]]:
        """On the one worker."""
        row, digests, _ = await self._hosts.host(source)
        return row, digests

    async def keep_only(self, needed: Collection[str]) -> None:
        """On the one worker."""
        there = self._dispatcher.described.get(self._name)
        if there is not None and (unneeded := sorted(there.modules.keys() - set(needed))):
            await self._dispatcher.unload({self._name: unneeded})
