"""An answer while it is spoken: its text in pieces, stop strings found across tokens and kept out. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from heliostat.model.text_stream import TextStream
from heliostat.model.tokenizer import Tokenizer


@dataclass(slots=True)
class Spoken:
    """The text of one answer so far. Text that may be the beginning of a stop string is held back."""

    stream: TextStream
    stop: tuple[str, ...]
    text: str = ""
    """What was handed out."""
    stopped: bool = False
    """Whether a stop string ended it."""
    _held: str = field(default="")

    @classmethod
    def begin(cls, tokenizer: Tokenizer, stop: Sequence[str]) -> Spoken:
        """An answer that has not begun."""
        return cls(TextStream(tokenizer), tuple(stop))

    def push(self, token: int) -> str:
        """The text that became certain with one more token; '' after a stop string was found."""
        return self._take(self.stream.push([token]), last=False)

    def finish(self) -> str:
        """What is still held back when no more tokens come."""
        return self._take(self.stream.finish(), last=True)

    def _take(self, piece: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        waiting = self._held + piece
        found = [place for place in (waiting.find(word) for word in self.stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return self._hand_out(waiting[: min(found)])
        keep = 0 if last else max((_overlap(waiting, word) for word in self.stop), default=0)
        self._held = waiting[len(waiting) - keep :]
        return self._hand_out(waiting[: len(waiting) - keep])

    def _hand_out(self, piece: str) -> str:
        self.text += piece
        return piece


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``word`` and not all of it."""
    return next((n for n in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:n])), 0)
