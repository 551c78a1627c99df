"""What must hold of scheduler and page table after every step, whatever happened before."""

from collections import Counter
from collections.abc import Sequence

from heliostat.engine.request import Request, State
from heliostat.engine.scheduler import Scheduler


def check_pages(scheduler: Scheduler, requests: Sequence[Request]) -> None:
    """References are holders, a page is in one place, what others may find is found, chains go from their ends."""
    table = scheduler.table
    held = Counter(page for r in scheduler.holders for page in r.pages)
    assert [held[page] for page in range(table.pages)] == table._references
    keyed = {page for page, published in enumerate(table._published) if published is not None}
    unheld = set(range(table.pages)) - set(held)
    assert sorted(table._free) == sorted(unheld - keyed) and set(table._idle) == unheld & keyed
    found = {published.key: page for page, published in enumerate(table._published) if published is not None}
    assert table._by_key == found
    assert table.available() == len(unheld)
    _check_writers(scheduler, set(held))
    _check_order(scheduler, keyed)
    for queue in (scheduler.waiting, scheduler.running):
        assert [r.arrival for r in queue] == sorted(r.arrival for r in queue)
    assert all(r.state is State.RUNNING for r in scheduler.running)
    assert all(r.state is State.HANDED and r.computed == r.goal for r in scheduler.handed.values())
    for r in requests:
        assert r.computed <= r.length and (r.state in (State.RUNNING, State.HANDED) or not r.pages)


def _check_writers(scheduler: Scheduler, held: set[int]) -> None:
    """Every page that is not free has one writer: that of a holder, or one of equal weights under another name."""
    table = scheduler.table
    written = table.pages_by_writer(scheduler.holders)
    assert sum(pages.held for pages in written.values()) == len(held)
    assert sum(pages.idle for pages in written.values()) == table.pages - len(held) - len(table._free)
    known = {module for r in scheduler.holders for module in r.row.modules}
    assert set(written) <= known | {p.writer for p in table._published if p is not None}


def _check_order(scheduler: Scheduler, keyed: set[int]) -> None:
    """A page is lost before those that it goes on from."""
    table = scheduler.table
    order = {page: place for place, page in enumerate(table._idle)}
    for page in keyed:
        before = table._before(page)
        if before is not None:
            assert table._hits[before] >= table._hits[page]
            assert page not in order or before not in order or order[page] < order[before]
