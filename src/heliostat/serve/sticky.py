"""Which version a conversation stays with while a canary is tried: the one that it began with. No torch.

A request that names its ``user`` goes where that user's first request went. One that holds an answer of ours goes on with
the version that gave it, whoever sends it under the same key's name. All others are new, and new ones are dealt out by
the exact share. What is kept are digests, the longest unused forgotten first.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from heliostat.serve.dialect import Asking, ChatAsking
from heliostat.serve.forms import turns
from heliostat.serve.roster import Roster, Version
from heliostat.serve.tools import Call

Turn = Mapping[str, Any]


class Sticky:
    """Versions by who asks. One thread uses it."""

    def __init__(self, *, limit: int = 2**16) -> None:
        """At most ``limit`` users and answers are remembered."""
        self._limit = limit
        self._held: OrderedDict[bytes, Version] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def choose(self, roster: Roster, asking: Asking, salt: str) -> Version:
        """The version that answers: the one that this conversation has, while it is served, or the next in turn."""
        name = asking.model
        key = _key(asking, salt) if name in roster else None
        if key is None:
            return roster.choose(name)
        version = self._held.get(key)
        if version is None or version not in roster.seat(name).versions:
            version = roster.choose(name)
        if asking.user:
            self._keep(key, version)
        return version

    def said(
        self, asking: Asking, version: Version, salt: str, answers: Sequence[tuple[str, Sequence[Call]]]
    ) -> None:
        """These answers (text, calls) were given: who sends one back goes on with the same version."""
        if asking.user or not isinstance(asking, ChatAsking) or asking.model != version.member:
            return
        before = turns(asking.messages)
        for text, calls in answers:
            answer = {"role": "assistant", "content": text, "tool_calls": [_opened(call) for call in calls]}
            self._keep(_digest(asking.model, salt, [*before, answer]), version)

    def _keep(self, key: bytes, version: Version) -> None:
        self._held[key] = version
        self._held.move_to_end(key)
        while len(self._held) > self._limit:
            self._held.popitem(last=False)


def _key(asking: Asking, salt: str) -> bytes | None:
    """Who a request belongs to; None where it does not say."""
    if asking.user:
        return _digest(asking.model, salt, [{"role": "\0user", "content": asking.user}])
    if not isinstance(asking, ChatAsking):
        return None
    found = turns(asking.messages)
    answers = [place for place, turn in enumerate(found) if turn["role"] == "assistant"]
    return _digest(asking.model, salt, found[: answers[-1] + 1]) if answers else None


def _opened(call: Call) -> Turn:
    try:
        arguments = json.loads(call.arguments)
    except (ValueError, RecursionError):
        arguments = call.arguments
    return {"function": {"name": call.name, "arguments": arguments}}


def _digest(member: str, salt: str, said: Sequence[Turn]) -> bytes:
    """SHA-256 over tagged lengths: no two conversations are the same by where one part ends."""
    found = hashlib.sha256()
    for part in (member, salt, *(part for turn in said for part in _parts(turn))):
        text = part.encode("utf-8", "surrogatepass")
        found.update(len(text).to_bytes(8, "big"))
        found.update(text)
    return found.digest()


def _parts(turn: Turn) -> tuple[str, ...]:
    calls = [call["function"] for call in turn.get("tool_calls") or ()]
    told = [(call.get("name"), call.get("arguments")) for call in calls]
    return turn["role"], turn["content"], json.dumps(told, sort_keys=True)
