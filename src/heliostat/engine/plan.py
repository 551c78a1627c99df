"""How an engine for a family will be laid out, before anything of it is loaded: longest request, pages, memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from heliostat.build import config_of
from heliostat.engine.engine import MAX_TOKENS_PER_STEP, PAGE_SIZE, longest_that_fits, pages_that_fit
from heliostat.engine.ledger import Ledger, Shape, ledger_of, room_of, weights_of
from heliostat.engine.paged import PagePool
from heliostat.engine.speculation.wanted import Wanted
from heliostat.family import Family
from heliostat.model.transformer import Transformer

NOTHING = Wanted()


@dataclass(frozen=True, slots=True)
class Plan:
    """What an engine is started with, and what that takes."""

    max_length: int
    """Most tokens of a request."""
    pages: int
    ledger: Ledger


def plan_of(
    folder: Path,
    family: Family,
    modules: Sequence[str],
    *,
    dtype: torch.dtype,
    max_length: int | None,
    cache_mib: int,
    max_running: int,
    wanted: Wanted = NOTHING,
) -> Plan:
    """The plan for these modules; only configs and heads of files are read. ``wanted``: what is drafted.

    Raises Refused where not even one request of full length fits into ``cache_mib``.
    """
    shapes = [Shape(config_of(folder, family, name), dtype) for name in modules]
    longest, pages = lay_out(shapes, max_length=max_length, cache_mib=cache_mib, max_running=max_running)
    ledger = ledger_of(
        folder,
        family,
        modules,
        dtype=dtype,
        pages=pages,
        page_size=PAGE_SIZE,
        max_running=max_running,
        max_tokens_per_step=MAX_TOKENS_PER_STEP,
    )
    lines = _of_drafts(folder, family, modules, wanted, dtype, pages=pages, most=max_running * wanted.ahead)
    return Plan(longest, pages, Ledger((*ledger.lines, *lines)))


def _of_drafts(
    folder: Path,
    family: Family,
    modules: Sequence[str],
    wanted: Wanted,
    dtype: torch.dtype,
    *,
    pages: int,
    most: int,
) -> Iterator[tuple[str, int]]:
    """Logits of so many drafted tokens at ``most``; a module's weights, if they are not there anyway; and its pages, as
    many as the speakers', if it does not read theirs."""
    if wanted.draft is None:
        return
    rows, size = min(most, MAX_TOKENS_PER_STEP), config_of(folder, family, modules[0]).vocabulary
    yield "logits of drafted tokens, at most", rows * size * dtype.itemsize
    if (draft := wanted.module) is None:
        return
    weights = {family.module(name).weights for name in modules}
    yield from weights_of(folder, family, [draft], dtype=dtype, there={*modules, *weights}).lines
    if family.module(family.module(draft).weights).quantization is None:
        each = PagePool.bytes_per_page(config_of(folder, family, draft), page_size=PAGE_SIZE, dtype=dtype)
        yield f"{pages} pages of the draft {draft}", pages * each


def plan_around(
    models: Sequence[Transformer], *, max_length: int | None, cache_mib: int, max_running: int
) -> Plan:
    """The plan for an engine around models that are in memory already: they stand in no line of its ledger."""
    longest, pages = lay_out(models, max_length=max_length, cache_mib=cache_mib, max_running=max_running)
    room = room_of(
        max(models, key=lambda m: m.dtype.itemsize),
        pages=pages,
        page_size=PAGE_SIZE,
        max_running=max_running,
        max_tokens_per_step=MAX_TOKENS_PER_STEP,
    )
    return Plan(longest, pages, room)


def lay_out(
    models: Sequence[Transformer | Shape], *, max_length: int | None, cache_mib: int, max_running: int
) -> tuple[int, int]:
    """(most tokens of a request, pages) for modules of these shapes."""
    widest = max(models, key=lambda m: m.dtype.itemsize)  # the pool has the widest format of all
    if max_length is None:
        longest = min(model.config.max_length for model in models)
        max_length = min(longest, longest_that_fits(widest, cache_mib=cache_mib))
    pages = pages_that_fit(widest, max_length=max_length, max_running=max_running, cache_mib=cache_mib)
    return max_length, pages
