"""Pages that change workers: what one lends, with a lease, and what another makes of a handle. One thread a worker.

Who lends keeps the pages until they are given back or the lease is over. Who borrows copies them; it never trusts a
handle further than it can check.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from heliostat.engine.engine import Engine
from heliostat.engine.fitting import fit_of
from heliostat.engine.request import Request
from heliostat.engine.store import Fetch, Promise, Shelves
from heliostat.serve.protocol import Code, Handle, Order, Role, content_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How a worker works."""

    worker: str
    incarnation: str
    roles: tuple[Role, ...] = ("prefill", "decode")
    lease: float = 30.0
    """Seconds for which handed pages are kept."""
    credit: int = 16
    """Most handed requests that wait for their pages here."""


def fit(engine: Engine) -> str:
    """Digest of what must be equal before pages may travel between two engines."""
    return fit_of(
        engine.config,
        tokenizer=engine.tokenizer.digest,
        dtype=str(engine.runner.pool.keys.dtype),
        page_size=engine.table.page_size,
    )


@dataclass(slots=True)
class Lending:
    """What a worker has lent, by order."""

    engine: Engine
    terms: Terms
    fit: str
    shelves: Shelves = field(default_factory=Shelves)
    """Other workers' memories."""
    out: dict[str, Handle] = field(default_factory=dict)

    def lend(self, order: Order, request: Request) -> Handle:
        """A handle of the pages that a request, just handed over, holds."""
        store, size = self.engine.store, self.engine.table.page_size
        assert store is not None
        full = request.boundary // size
        handle = Handle(
            order=order.id,
            worker=self.terms.worker,
            incarnation=self.terms.incarnation,
            fit=self.fit,
            content=content_of(order),
            store=store.name,
            tokens=request.boundary,
            pages=tuple(request.pages),
            generations=tuple(store.generations[page] for page in request.pages),
            digests=tuple(
                store.digest_of_full(page) if number < full else store.digest(page)
                for number, page in enumerate(request.pages)
            ),
            lease=self.terms.lease,
        )
        self.out[order.id] = handle
        return handle

    def give_back(self, handle: Handle) -> None:
        """Lent pages are needed no more; a handle that is not the latest of its order means nothing."""
        if handle.incarnation == self.terms.incarnation and self.out.get(handle.order) == handle:
            self.give_back_all(handle.order)

    def give_back_all(self, order_id: str) -> None:
        """Whatever was lent for an order is needed no more."""
        if self.out.pop(order_id, None) is not None:
            self.engine.abort(order_id)

    def objection(self, order: Order, handle: Handle, *, waiting: int) -> tuple[Code, str] | None:
        """Why pages cannot be borrowed for an order, while so many others wait for theirs; None: they can."""
        boundary = order.row.boundary(len(order.prompt))
        pages = self.engine.table.pages_for(boundary)
        lists: Sequence[Sequence[object]] = (handle.pages, handle.generations, handle.digests)
        if self.engine.store is None:
            return "misfit", "this worker can bring no pages in"
        if handle.fit != self.fit:
            return "misfit", (
                f"pages of worker {handle.worker!r} do not fit worker {self.terms.worker!r}: their shape, tokenizer, "
                "chat template, rope, number format or page size differ"
            )
        if handle.content != content_of(order) or handle.tokens != boundary:
            return "pages_gone", "the handle is of another prompt or another writer"
        if any(len(each) != pages for each in lists):
            return "pages_gone", f"the handle names not the {pages} pages that {boundary} tokens have"
        if waiting >= self.terms.credit:
            return (
                "busy",
                f"{waiting} handed requests wait for their pages here, at most {self.terms.credit} may",
            )
        return None

    def fetch(self, handle: Handle) -> Fetch:
        """Ready to bring a handle's pages in. Raises Gone where they are not there."""
        assert self.engine.store is not None
        promise = Promise(handle.store, handle.incarnation, handle.pages, handle.generations, handle.digests)
        return Fetch(self.shelves.look(handle.store), self.engine.store, promise)
