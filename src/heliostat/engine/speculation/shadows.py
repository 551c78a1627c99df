"""What a draft with pages of its own has read of each request: a page chain beside the request's. No torch.

The chain is like any other (``page_table``): keyed by the draft's digest, shared between requests that begin alike, and
offered only where its tokens are known for good. Who finds no room loses its chain, and is read again later: nobody else
gives up any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from heliostat.engine.page_table import PageTable
from heliostat.engine.request import Request
from heliostat.engine.writing import completed
from heliostat.family import Row


@dataclass(slots=True)
class Shadow:
    """A request as its draft sees it: the same tokens, in the draft's own pages."""

    of: Request
    chain: Request
    """Row, pages and keys of the draft; ``computed`` counts positions of tokens that are known for good."""
    guessed: list[int] = field(default_factory=list)
    """Tokens that were read behind those: the last one known then, and drafted ones."""
    strange: bool = False
    """Whether there are token ids that the draft does not know."""

    @property
    def behind(self) -> int:
        """Known tokens that are still to be read."""
        return self.of.length - self.chain.computed


class Shadows:
    """The shadows of all requests that a draft follows, and the table of its pages."""

    def __init__(self, name: str, digest: str, *, vocabulary: int, pages: int, page_size: int) -> None:
        self._vocabulary = vocabulary
        self.table = PageTable(pages, page_size=page_size)
        self._row, self._digests = Row(name, name, name, name), {name: digest}
        self._shadows: dict[str, Shadow] = {}

    def __len__(self) -> int:
        return len(self._shadows)

    @property
    def chains(self) -> list[Request]:
        """All that hold pages."""
        return [shadow.chain for shadow in self._shadows.values()]

    def follow(self, request: Request) -> Shadow:
        """The shadow of a request as it is now: guesses that came true count as read, the others as never made."""
        shadow = self._shadows.get(request.id)
        if shadow is not None and shadow.of is not request:
            self.forget(request.id)
            shadow = None
        if shadow is None:
            chain = Request(
                request.id,
                row=self._row,
                digests=self._digests,
                prompt=request.prompt,
                member=request.member,
                salt=request.salt,
            )
            shadow = self._shadows[request.id] = Shadow(request, chain, strange=self._strange(request.prompt))
        self._settle(shadow)
        if not shadow.chain.pages:
            self._find(shadow.chain)
        return shadow

    def at(self, request_id: str) -> Shadow:
        """The shadow of a request that is followed, as it was left."""
        return self._shadows[request_id]

    def _strange(self, tokens: Sequence[int]) -> bool:
        return max(tokens, default=0) >= self._vocabulary

    def _find(self, chain: Request) -> None:
        pages = self.table.match(chain)
        self.table.take(chain, pages)
        chain.pages += pages
        chain.computed = len(pages) * self.table.page_size

    def _settle(self, shadow: Shadow) -> None:
        chain, known = shadow.chain, len(shadow.chain.answer)
        chain.answer += shadow.of.answer[known:]
        del chain.answer[len(shadow.of.answer) :]
        shadow.strange = shadow.strange or self._strange(chain.answer[known:])
        # The last token is read by who drafts what follows it, again where nothing was said since.
        told = chain.token_ids(chain.computed, max(chain.computed, chain.length - 1))
        pairs = zip(shadow.guessed, told, strict=False)
        true = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self.read(shadow, chain.computed + true)
        shadow.guessed = []
        keep = self.table.pages_for(chain.computed)
        self.table.release(chain.pages[keep:])
        del chain.pages[keep:]

    def read(self, shadow: Shadow, stop: int) -> None:
        """Known tokens up to position ``stop`` have been read: full pages of them are offered."""
        chain = shadow.chain
        for index in completed(chain.computed, stop, self.table.page_size):
            self.table.publish(chain, index)
        chain.computed = stop

    def make_room(self, shadow: Shadow, stop: int) -> bool:
        """Pages for positions below ``stop``; False, and the chain is given up, where there are none."""
        chain, table = shadow.chain, self.table
        missing = table.pages_for(stop) - len(chain.pages)
        if missing > table.available():
            self.forget(shadow.of.id)
            return False
        if missing > 0:
            chain.pages += table.allocate(missing)
        table.assert_writable(chain.pages[chain.computed // table.page_size :])
        return True

    def guess(self, shadow: Shadow, tokens: Sequence[int]) -> None:
        """Tokens that were read behind all that is known for good."""
        shadow.guessed = list(tokens)

    def forget(self, request_id: str) -> None:
        """A request has ended, or is followed no more; full pages of what it said stay for others to find."""
        shadow = self._shadows.get(request_id)
        if shadow is not None:
            self._settle(shadow)
            del self._shadows[request_id]
            self.table.release(shadow.chain.pages)
            shadow.chain.pages.clear()
