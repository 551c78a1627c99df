"""``heliostat chat``: a conversation in the terminal or from a pipe, that any member can go on with."""

from __future__ import annotations

import importlib
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heliostat.cli.answering import CacheMib, Device, Dtype, Member, sampling_of
from heliostat.cli.failing import tell_error
from heliostat.cli.options import given, sampling_options, taking
from heliostat.cli.printing import Family, note
from heliostat.engine.request import Sampling
from heliostat.errors import Refused

if TYPE_CHECKING:
    from heliostat.llm import LLM

COMMANDS = "/member NAME, /reset, /help, /quit"


@taking(sampling_options())
def chat(
    family: Family,
    member: Member = "base",
    dtype: Dtype = "auto",
    device: Device = "auto",
    cache_mib: CacheMib = 1024,
    **flags: Any,
) -> None:
    """/member NAME lets another one go on, /reset forgets, /quit or Ctrl-D leaves; Ctrl-C stops an answer."""
    from heliostat.build import device_named

    options = {"dtype": dtype, "device": device_named(device), "cache_mib": cache_mib}
    talk = Chat(family, sampling_of(given(flags)), options)
    talk.switch(member)
    talk.check_template()
    note(f"{member} listens. {COMMANDS}")
    with suppress(ImportError):
        importlib.import_module("readline")  # gives input() editing and a memory, where the system has it
    talk.run()


@dataclass(slots=True)
class Chat:
    """A conversation, who speaks next, and the models loaded so far."""

    family: Path
    sampling: Sampling
    options: dict[str, Any]
    member: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)
    loaded: LLM | None = None

    @property
    def llm(self) -> LLM:
        """The engine, once a member was chosen."""
        assert self.loaded is not None
        return self.loaded

    def check_template(self) -> None:
        """Refuse a family that cannot tell who said what."""
        if not self.llm.tokenizer.has_template:
            raise Refused(
                "this family's tokenizer has no chat template, so there is no conversation: use generate"
            )

    def switch(self, member: str) -> None:
        """Let another member speak; the conversation stays. One not in memory yet is loaded."""
        from heliostat.llm import LLM

        if self.loaded is None or member not in self.loaded.rows:
            before = list(self.loaded.rows) if self.loaded is not None else []
            self.loaded = LLM(self.family, members=[*before, member], **self.options)
        self.member = member

    def run(self) -> None:
        """Listen and answer until the end of input or /quit."""
        while (line := self.listen()) is not None:
            try:
                if not self.obey(line):
                    return
            except Refused as error:  # a wrong name, or a conversation grown too long: nothing is lost
                tell_error(str(error))

    def listen(self) -> str | None:
        """The next line; None at the end of input."""
        try:
            line = input(f"{self.member}> ") if sys.stdin.isatty() else sys.stdin.readline()
        except EOFError:
            print()
            return None
        return line if line or sys.stdin.isatty() else None

    def obey(self, line: str) -> bool:
        """Do what a line asks for; False to leave."""
        word, _, rest = line.strip().partition(" ")
        if word == "/quit":
            return False
        if word == "/reset":
            self.turns.clear()
            note("the conversation is empty")
        elif word == "/help":
            note(f"{COMMANDS}; members: {self._names()}")
        elif word == "/member":
            if not rest.strip():
                raise Refused(f"/member needs a name: {self._names()}")
            self.switch(rest.strip())
            note(f"{self.member} goes on")
        elif word.startswith("/"):
            raise Refused(f"no command {word!r}; there is: {COMMANDS}")
        elif word:
            self.answer(line.strip())
        return True

    def _names(self) -> str:
        """Who can speak."""
        return ", ".join([*self.llm.family.members, *self.llm.family.modules])

    def answer(self, text: str) -> None:
        """Say the answer as it comes; what Ctrl-C cut short stays as far as it came."""
        asked = [*self.turns, {"role": "user", "content": text}]
        pieces: list[str] = []
        try:
            for piece in self.llm.stream(asked, member=self.member, sampling=self.sampling):
                pieces.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            note(" (stopped)")
        print()
        if pieces:
            self.turns = [*asked, {"role": "assistant", "content": "".join(pieces)}]
