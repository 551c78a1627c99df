"""vLLM servers as a crew's workers: those that are started here, and those that somebody else runs at a url."""

from __future__ import annotations

import asyncio
import importlib.util
import math
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import Popen

from heliostat.engine.ledger import MIB, Ledger, available_memory, weights_of
from heliostat.errors import Refused
from heliostat.family import Family, Row
from heliostat.files import OWNER, hold, remove_abandoned
from heliostat.llm import parse_dtype
from heliostat.model.tokenizer import Tokenizer
from heliostat.serve.cluster import Cluster, Place
from heliostat.serve.dispatch import Dispatcher
from heliostat.serve.http_facts import Expected
from heliostat.serve.http_keeper import Kept, spawn
from heliostat.serve.http_launching import KEPT, Common, common_of, cores_of, key_of, launch_of
from heliostat.serve.http_layout import Server, servers_of
from heliostat.serve.http_line import HttpLine
from heliostat.serve.http_watch import PATIENCE
from heliostat.serve.http_worker import HttpWorker
from heliostat.serve.log import Log
from heliostat.serve.nodes import USED
from heliostat.serve.processes import SILENT, STORE, Means, sweep_folders
from heliostat.serve.roster import module_name
from heliostat.serve.supervisor import Supervisor
from heliostat.vllm.kept import private_folder
from heliostat.vllm.launch import FILES, command
from heliostat.vllm.layout import refuse_unfit

PYTHON = "HELIOSTAT_VLLM"
"""Environment variable that names the Python of an environment with vLLM; without it, this very one."""
READY_SECONDS = 1800.0
"""Most seconds until a server has loaded its weights."""
RUNTIME_MIB = 1536
"""What a vLLM process takes on a CPU besides weights and pages: libraries, workspace, its API server."""
_LOOK = 0.25
"""Seconds between two looks whether a server is ready, or gone."""
_LAST_WORDS = 400
"""Bytes of a log that are told of a server that ended."""


class Served:
    """One server, started here or not."""

    def __init__(self, worker: HttpWorker, process: Popen[bytes] | None) -> None:
        self.worker, self._process = worker, process
        self.number = process.pid if process is not None else 0

    async def ended(self) -> str:
        """How it ended, when it has, or why it is lost; one of ours that is lost is ended."""
        while not self.worker.gone and not self._over:
            await asyncio.sleep(_LOOK)
        why = self.worker.gone or _how(self._process)
        self.worker.lost(why)
        self.kill()
        while not self._over and self._process is not None:
            await asyncio.sleep(_LOOK)
        await self._let_go()
        return why

    @property
    def _over(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    async def end(self) -> None:
        """Ours lives while somebody holds its keeper's input open; another's lives on."""
        await self._let_go()
        while self._process is not None and not self._over:
            await asyncio.sleep(_LOOK)

    async def _let_go(self) -> None:
        await self.worker.close()
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def kill(self) -> None:
        """At once, with all that it started; nothing where it is not ours."""
        if self._process is not None and not self._over:
            self._process.terminate()


def _how(process: Popen[bytes] | None) -> str:
    status = process.returncode if process is not None else None
    return "the server is gone" if status is None else f"the server ended with status {status}"


class Servers:
    """Starts servers, and reaches those that run already."""

    def __init__(self, common: Common, servers: Mapping[str, Server], tokenizer: Tokenizer, log: Log) -> None:
        self._common, self._servers, self._tokenizer, self._log = common, servers, tokenizer, log
        self._folder = Path(tempfile.mkdtemp(prefix=STORE))
        self._reached: dict[str, HttpWorker] = {}
        self._ports: dict[str, socket.socket] = {}
        # Ports of the loopback are everybody's on this machine.
        self._agreed = key_of(common.terms)
        self._key = self._agreed or secrets.token_urlsafe(24)
        self._kept = f"{KEPT}-{os.getpid()}-{secrets.token_hex(4)}"
        self._memory = private_folder(self._kept)
        self._held = [hold(folder / OWNER) for folder in (self._folder, self._memory)]
        here = [server.place for server in servers.values() if server.place.url is None]
        self._cores = cores_of(here)
        # Side by side on one device: vLLM would give each nearly all of it.
        share = ("--gpu-memory-utilization", f"{USED / max(1, len(here)):.3f}")
        self._extra = () if common.device == "cpu" else share

    async def __call__(self, place: Place, modules: Mapping[str, str]) -> Served:
        """The server of a place, when it answers. ConnectionError where it ends before that, Refused where it is another
        than the cluster says."""
        if place.url is not None:
            return await self._reach(place.url, self._expected(place, modules, None), None)
        incarnation, port = secrets.token_hex(8), self._port(place)
        log = self._folder / f"{place.name}.log"
        launch = launch_of(
            self._common,
            self._servers[place.name],
            port=port,
            cores=self._cores[place.name],
            folder=self._kept,
            incarnation=incarnation,
            extra=self._extra,
        )
        done = command(launch, python=python())
        environment = {**done.environment, "VLLM_API_KEY": self._key}
        process = spawn(Kept(done.words, environment, str(log), str(self._memory)))
        self._log.say("worker starts", worker=place.name, process=process.pid, port=port)
        expected = self._expected(place, modules, incarnation)
        try:
            return await self._reach(f"http://127.0.0.1:{port}", expected, process)
        except BaseException as error:
            with suppress(BrokenPipeError), process:  # waits
                process.terminate()
            if isinstance(error, ConnectionError):
                self._log.say("worker's last words", worker=place.name, words=_last_words(log))
            raise

    async def _reach(self, url: str, expected: Expected, process: Popen[bytes] | None) -> Served:
        key, patience = (self._agreed, PATIENCE) if process is None else (self._key, SILENT)
        worker = HttpWorker(HttpLine(url, key=key), expected, self._tokenizer, patience=patience)
        told = asyncio.get_running_loop().time() + PATIENCE
        try:
            while True:
                with suppress(ConnectionError):
                    await worker.describe()
                    self._refuse_other_version(worker, expected)
                    worker.start()
                    return Served(worker, process)
                if process is not None and process.poll() is not None:
                    raise ConnectionError(_how(process))
                if process is None and asyncio.get_running_loop().time() > told:
                    told = math.inf
                    self._log.say("worker does not answer yet", worker=expected.worker)
                await asyncio.sleep(_LOOK)
        except BaseException:
            await worker.close()
            raise

    def _refuse_other_version(self, worker: HttpWorker, expected: Expected) -> None:
        """Where vLLM's own connectors carry keys and values: two versions need not lay them out alike."""
        if self._common.terms.transfer == FILES or len(expected.roles) > 1:
            return
        for name, other in self._reached.items():
            if name != expected.worker and not other.gone and other.version != worker.version:
                raise Refused(
                    f"worker {expected.worker!r} runs vLLM {worker.version}, worker {name!r} {other.version}: keys and "
                    "values do not travel between two versions; start all with one"
                )
        self._reached[expected.worker] = worker

    def _port(self, place: Place) -> int:
        """A port of the loopback for its server. It stays bound here, too: whoever takes any port gets another one."""
        if (before := self._ports.pop(place.name, None)) is not None:
            before.close()
        self._ports[place.name] = bound = socket.socket()
        bound.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # the server sets it as well, and so may have it
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])

    def _expected(self, place: Place, modules: Mapping[str, str], incarnation: str | None) -> Expected:
        common = self._common
        return Expected(
            worker=place.name,
            modules={module_name(name, digest): digest for name, digest in modules.items()},
            roles=place.roles,
            page_size=common.terms.page_size,
            dtype=common.dtype,
            transfer=common.terms.transfer,
            fit=common.fits[place.tensor_parallel],
            incarnation=incarnation,
        )

    def sweep(self) -> None:
        """Remove what servers of this user left, on the disk and in memory, that were killed with all that they started."""
        sweep_folders()
        remove_abandoned(Path(KEPT).parent.glob(f"{Path(KEPT).name}-*-*-{os.getuid()}"))

    def leave(self) -> None:
        """Remove the folders; what is held for others in memory goes with those that held it."""
        shutil.rmtree(self._folder, ignore_errors=True)
        shutil.rmtree(self._memory, ignore_errors=True)
        for bound in self._ports.values():
            bound.close()
        while self._held:
            os.close(self._held.pop())


def servers(
    cluster: Cluster,
    family: Family,
    rows: Mapping[str, Row],
    dispatcher: Dispatcher,
    means: Means,
    *,
    tokenizer: Tokenizer,
    log: Log,
) -> Supervisor:
    """The crew of a cluster of vLLM servers. Refused for what vLLM cannot load or play, or has no room for here."""
    placed = servers_of(cluster, family, rows)
    here = [server for server in placed.values() if server.place.url is None]
    refuse_unfit(means.family, family, rows)
    common = common_of(cluster, family, means, write=bool(here))
    if here:
        refuse_missing_vllm()
        _refuse_too_large(here, family, means, common)
    starter = Servers(common, placed, tokenizer, log)
    return Supervisor(
        cluster,
        {name: module.digest for name, module in family.modules.items()},
        starter,
        dispatcher,
        folder=means.family,
        tokenizer=tokenizer.digest,
        log=log,
        sweep=starter.sweep,
        at_last=starter.leave,
        ready=READY_SECONDS,
    )


def python() -> str:
    """The interpreter that has vLLM."""
    return os.environ.get(PYTHON) or sys.executable


def refuse_missing_vllm() -> None:
    """Raise Refused where there is no vLLM to start."""
    chosen = os.environ.get(PYTHON)
    there = Path(chosen).is_file() if chosen else importlib.util.find_spec("vllm") is not None
    if not there:
        where = f"{PYTHON} names {chosen}, which is not there" if chosen else "vLLM is not installed here"
        raise Refused(
            f"{where}: pip install 'heliostat[vllm]', or on a CPU `make vllm-env` and {PYTHON}=.venv-vllm/bin/python"
        )


def _refuse_too_large(here: Sequence[Server], family: Family, means: Means, common: Common) -> None:
    """Servers of this machine together; on a GPU vLLM itself weighs what it may take."""
    if common.device != "cpu":
        return
    lines: list[tuple[str, int]] = []
    for server in here:
        weights = weights_of(means.family, family, server.modules, dtype=parse_dtype(common.dtype))
        cache = common.cache_mib(server.place)
        parts = {"weights": weights.total, "pages": cache * MIB, "vLLM itself": RUNTIME_MIB * MIB}
        lines += [(f"{server.place.name}: {what}", size) for what, size in parts.items()]
    remedy = (
        "Start fewer workers, lower --cache-mib, or put some on other machines (heliostat cluster render)"
    )
    Ledger(tuple(lines)).refuse_over(available_memory("cpu"), remedy=remedy)


def _last_words(log: Path) -> str:
    try:
        return log.read_bytes()[-_LAST_WORDS:].decode("utf-8", "replace").strip()
    except OSError:
        return ""
