"""What goes over the line between a server and a worker process, and the line itself. Frames are typed and checked.

Nothing here trusts the line: words may be lost, come twice, late, in another order or damaged. Every frame carries a
check of its bytes; what is not one of the messages below is dropped, with a line in the log. Calls have numbers, the
tokens of an answer have places, and both sides tell each other now and then what they think is open.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec
import zmq
import zmq.asyncio

from heliostat.serve.log import Log
from heliostat.serve.protocol import Described, Failed, Handed, Handle, Order, Said, Stats

BEAT = 0.5
"""Seconds between two beats of either side."""
GRACE = 2.0
"""Seconds for words that were said and are not here to arrive."""
PATIENCE = 10.0
"""Seconds without any word after which the other side is given up."""
LAST_WORDS = 500
"""Milliseconds that the last frames of a line that is closed may take."""


class Describe(msgspec.Struct, frozen=True, tag=True):
    """``Worker.describe``."""


class Prefill(msgspec.Struct, frozen=True, tag=True):
    """``Worker.prefill``; answered when it is done."""

    order: Order


class Decode(msgspec.Struct, frozen=True, tag=True):
    """``Worker.decode``; answered when the order is taken in."""

    order: Order
    handle: Handle | None


class GetStats(msgspec.Struct, frozen=True, tag=True):
    """``Worker.stats``."""


class Load(msgspec.Struct, frozen=True, tag=True):
    """``Worker.load``."""

    modules: Mapping[str, str]


class Unload(msgspec.Struct, frozen=True, tag=True):
    """``Worker.unload``."""

    modules: tuple[str, ...]


class Drain(msgspec.Struct, frozen=True, tag=True):
    """``Worker.drain``; answered when all is done."""


Call = Describe | Prefill | Decode | GetStats | Load | Unload | Drain


class Ask(msgspec.Struct, frozen=True, tag=True):
    """A call. A number is used once; the same one again is the same call, come twice."""

    number: int
    call: Call


class Abort(msgspec.Struct, frozen=True, tag=True):
    """``Worker.abort``."""

    order: str


class Release(msgspec.Struct, frozen=True, tag=True):
    """``Worker.release``."""

    handle: Handle


class Ping(msgspec.Struct, frozen=True, tag=True):
    """The server's beat: of the calls up to a number it still wants these; the others' orders may end."""

    upto: int
    wanted: tuple[int, ...]


class Bye(msgspec.Struct, frozen=True, tag=True):
    """The worker's process may end."""


class Done(msgspec.Struct, frozen=True, tag=True):
    """Taken in, or drained."""


class No(msgspec.Struct, frozen=True, tag=True):
    """Refused."""

    reason: str


class Reply(msgspec.Struct, frozen=True, tag=True):
    """The answer to a call."""

    number: int
    result: Described | Handed | Failed | Stats | Done | No


class Told(msgspec.Struct, frozen=True, tag=True):
    """What is heard of orders that were taken in, as much as came at once."""

    events: tuple[Said | Failed, ...]


class Beat(msgspec.Struct, frozen=True, tag=True):
    """The worker's beat: calls that are not answered yet, and the place of the next token of each open answer."""

    asked: tuple[int, ...]
    open: Mapping[str, int]


ToWorker = Ask | Abort | Release | Ping | Bye
ToServer = Reply | Told | Beat


class Line(Protocol):
    """Carries frames, and promises nothing about them."""

    receive: Callable[[bytes], None]
    """Called on the event loop with every frame that comes."""

    def send(self, frame: bytes) -> None:
        """Let a frame go."""

    def close(self) -> None:
        """No frame comes or goes any more."""


def sealed(message: ToWorker | ToServer) -> bytes:
    """A message as a frame."""
    body = msgspec.msgpack.encode(message)
    return zlib.crc32(body).to_bytes(4, "big") + body


class Opener:
    """Makes messages of frames again."""

    def __init__(self, kind: Any, log: Log) -> None:
        self._decoder, self._log = msgspec.msgpack.Decoder(kind), log
        self.dropped = 0

    def __call__(self, frame: bytes) -> Any:
        """The message; None for a frame that is damaged or says nothing that is known."""
        body = memoryview(frame)[4:]
        try:
            if len(frame) < 4 or zlib.crc32(body) != int.from_bytes(frame[:4], "big"):
                raise ValueError("damaged")
            return self._decoder.decode(body)
        except (ValueError, msgspec.MsgspecError) as error:
            self.dropped += 1
            self._log.warn_once(f"a frame between server and worker was dropped: {str(error)[:200]}")
            return None


class Wire:
    """A line over a socket in the file system: one end binds, the other connects."""

    def __init__(self, path: Path, *, bind: bool) -> None:
        self.receive: Callable[[bytes], None] = lambda frame: None
        self._socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, LAST_WORDS)
        # What is on its way is bounded by what is open, not here: a frame that is dropped ends a request.
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        (self._socket.bind if bind else self._socket.connect)(f"ipc://{path}")
        self._listening = asyncio.get_running_loop().create_task(self._listen())

    def send(self, frame: bytes) -> None:
        """Into the socket's queue; lost where nobody is at the other end."""
        if not self._socket.closed:
            sending = asyncio.ensure_future(self._socket.send(frame, flags=zmq.NOBLOCK))
            sending.add_done_callback(lambda sent: sent.cancelled() or sent.exception())

    def close(self) -> None:
        """At once; what was sent may still go out."""
        self._listening.cancel()
        self._socket.close()

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            frame = await self._socket.recv()
            loop.call_soon(self.receive, frame)  # what goes wrong there must not end the listening


class Ends:
    """One end of a line inside this process."""

    def __init__(self) -> None:
        self.receive: Callable[[bytes], None] = lambda frame: None
        self.other: Ends | None = None

    @classmethod
    def pair(cls) -> tuple[Ends, Ends]:
        """Two ends of one line."""
        one, two = cls(), cls()
        one.other, two.other = two, one
        return one, two

    def send(self, frame: bytes) -> None:
        """To the other end, soon."""
        if self.other is not None:
            asyncio.get_running_loop().call_soon(self._arrive, frame)

    def _arrive(self, frame: bytes) -> None:
        if self.other is not None:
            self.other.receive(frame)

    def close(self) -> None:
        """On both sides."""
        if self.other is not None:
            self.other.other = None
        self.other = None
