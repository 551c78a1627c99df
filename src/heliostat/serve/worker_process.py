"""A worker's process, from both ends: how a server starts one, and what it does until it is let go.

It gets its settings as a line of JSON on its standard input and lives while that stays open: when whoever started it
dies, however he dies, it ends as well and takes its memory for pages along.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import BinaryIO

import msgspec

from heliostat.errors import Refused
from heliostat.serve.link import Wire
from heliostat.serve.link_server import Servant
from heliostat.serve.protocol import WorkerSettings
from heliostat.serve.worker import EngineWorker
from heliostat.serve.worker_start import worker_of

REFUSED = 2
"""Exit status where the settings cannot be met; the reason is on standard error."""
BROKEN = 1
"""Exit status after the engine failed."""
_LOOK = 0.1
_FLUSH = 0.5
"""Seconds that the last words of a broken worker have to go out."""


def spawn(settings: WorkerSettings) -> subprocess.Popen[bytes]:
    """Start a worker; it serves at ``settings.endpoint`` when it is ready. Keep the result: it holds the input open."""
    environment = dict(os.environ)
    if settings.threads is not None:
        environment["OMP_NUM_THREADS"] = str(settings.threads)
    # In a session of its own: a Ctrl-C is for the server, which drains first.
    process = subprocess.Popen(
        [sys.executable, "-m", "heliostat.serve.worker_process"],
        stdin=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    assert process.stdin is not None
    try:
        process.stdin.write(msgspec.json.encode(settings) + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it ended already: whoever waits for it sees that
    return process


def main(given: BinaryIO) -> int:
    """Serve until dismissed; returns the exit status."""
    # Sent to a whole group, it is for the server, which drains first.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    settings = msgspec.json.decode(given.readline(), type=WorkerSettings)
    held: list[EngineWorker] = []
    threading.Thread(target=_until_orphaned, args=(given, held), daemon=True).start()
    try:
        worker = worker_of(settings)
    except Refused as refused:
        print(f"worker {settings.worker}: {refused}", file=sys.stderr, flush=True)
        return REFUSED
    held.append(worker)
    return asyncio.run(_serve(worker, Path(settings.endpoint)))


def _until_orphaned(given: BinaryIO, held: list[EngineWorker]) -> None:
    """Ends the process at once when nobody holds its input open any more."""
    while os.read(given.fileno(), 1):  # below its buffer, which must be free when the process ends
        pass
    for worker in held:
        if (store := worker.core.engine.store) is not None:
            store.close(remove=True)
    os._exit(0)


async def _serve(worker: EngineWorker, endpoint: Path) -> int:
    worker.start()
    partial = endpoint.with_name(f"{endpoint.name}~")
    servant = Servant(worker, Wire(partial, bind=True))
    servant.start()
    partial.rename(endpoint)  # only now: whoever finds it is answered
    while not servant.dismissed.is_set() and not worker.failure:
        await asyncio.sleep(_LOOK)
    if worker.failure:
        await asyncio.sleep(_FLUSH)
    servant.stop()
    await worker.close()
    return BROKEN if worker.failure else 0


if __name__ == "__main__":
    sys.exit(main(sys.stdin.buffer))
