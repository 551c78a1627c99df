"""A time limit for work that somebody else wrote, a chat template for instance, and that may not end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable


class Endless(BaseException):
    """What ends a template in the midst of its work; no Exception, which jinja's compiler would pass over."""


def within(seconds: float, work: Callable[[], str]) -> str:
    """``work()``, given up with Endless after so many seconds.

    In the main thread an alarm breaks it off; elsewhere nothing can, and it is left behind in a thread of its own.
    One single operation that takes long, such as a power of large numbers, is not broken off.
    """
    if threading.current_thread() is not threading.main_thread():
        return _in_a_thread(seconds, work)

    def ring(signum: int, frame: object) -> None:
        raise Endless

    handler = signal.signal(signal.SIGALRM, ring)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return work()
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)  # somebody else's rings that much later
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)


def _in_a_thread(seconds: float, work: Callable[[], str]) -> str:
    said: list[str] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            said.append(work())
        except BaseException as error:  # it is the caller's, whatever it is
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not said:
        raise Endless
    return said[0]
