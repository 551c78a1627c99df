"""An answer as text while its token ids arrive."""

from __future__ import annotations

from collections.abc import Iterable

from heliostat.model.tokenizer import UNFINISHED, Tokenizer

# Enough tokens that looking back is cheap and rare.
_WINDOW = 32


class TextStream:
    """An answer as text while its ids arrive: no piece ever ends inside a character.

    The pieces joined are ``decode`` of all ids. Stop strings are not looked for here.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []  # the latest ids: enough to see how the next one is written
        self._told = 0  # characters of the window's text that have been handed out
        self._whole = 0  # ids of the window after which no character was unfinished

    def push(self, ids: Iterable[int]) -> str:
        """The text that became certain by these ids; '' while a character is unfinished."""
        self._window += ids
        text = self._tokenizer.decode(self._window)
        piece = self._tell(text.rstrip(UNFINISHED))
        if not text.endswith(UNFINISHED):
            self._look_back_less()
        return piece

    def finish(self) -> str:
        """What is left when no more ids come: bytes of a character that was never finished, as U+FFFD."""
        return self._tell(self._tokenizer.decode(self._window))

    def _tell(self, text: str) -> str:
        piece = text[self._told :]
        self._told = max(self._told, len(text))
        return piece

    def _look_back_less(self) -> None:
        """Forget ids before the last whole character, so that a token of a long answer costs no more."""
        if len(self._window) > _WINDOW:
            kept = self._window[self._whole :]
            told = len(self._tokenizer.decode(kept))
            if told:  # special tokens alone would let a decoder take the next text for a beginning
                self._window, self._told = kept, told
        self._whole = len(self._window)
