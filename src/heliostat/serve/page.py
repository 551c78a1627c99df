"""The page at ``/``: what is alive, told by the server, and a question to several members side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, Template
from starlette.responses import HTMLResponse, Response

from heliostat.serve.keys import Tenant
from heliostat.serve.metrics_now import Snapshot, Standing
from heliostat.serve.protocol import Parting
from heliostat.serve.roster import family_name
from heliostat.serve.service import Service

# Nothing comes from elsewhere, and nobody else may show the page inside theirs.
SAFE = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

WHY: Mapping[str, str] = {
    "shared": "one reads the other's pages",
    "writer": "different modules write their prompts: nothing can be shared",
    "short": "prompts shorter than a page of {page_size} tokens",
    "early": "they part before a page of {page_size} tokens: put what they have in common first",
}


@cache
def _template() -> Template:
    text = (files("heliostat") / "assets" / "page.html.jinja").read_text(encoding="utf-8")
    return Environment(autoescape=True).from_string(text)


def _known(service: Service, tenant: Tenant) -> set[str]:
    """Modules that the members of this tenant need; the others' go without a name."""
    seats = service.roster.seats.items()
    versions = [version for member, seat in seats if tenant.may(member) for version in seat.versions]
    return {family_name(module) for version in versions for module in version.row.modules}


def _hosted(standing: Standing, known: set[str]) -> Standing:
    others = len(set(standing.modules) - known)
    named = sorted(known.intersection(standing.modules))
    return replace(standing, modules=(*named, *([f"{others} more"] if others else [])))


def _written(known: set[str], now: Snapshot) -> list[tuple[str, int, int]]:
    """(writer, pages held, pages kept)."""
    held, kept = Counter[str](), Counter[str]()
    for counts, found in ((now.held, held), (now.idle, kept)):
        for writer, count in counts.items():
            found[writer if writer in known else "others"] += count
    return [(writer, held[writer], kept[writer]) for writer in sorted(held.keys() | kept.keys())]


def _parting(pair: tuple[str, str], met: Parting, *, page_size: int) -> dict[str, Any]:
    """How much the prompts of two members have in common, and what mostly came of it."""
    ((outcome, _),) = Counter(met.outcomes).most_common(1)
    return {
        "pair": pair,
        "count": met.count,
        "common": met.common / met.count,
        "tokens": met.tokens / met.count,
        "shared": met.shared / met.count,
        "outcome": outcome,
        "why": WHY[outcome].format(page_size=page_size),
    }


async def front(service: Service, tenant: Tenant | None) -> Response:
    """The whole page; to nobody known, only what asks for a key."""
    facts = await _facts(service, tenant) if tenant is not None else {}
    text = _template().render(whole=True, known=tenant is not None, **facts)
    return HTMLResponse(text, 200 if tenant is not None else 401, headers=SAFE)


async def live(service: Service, tenant: Tenant) -> Response:
    """The part that changes, to be put in its place."""
    text = _template().render(whole=False, known=True, **await _facts(service, tenant))
    return HTMLResponse(text, headers=SAFE)


async def _facts(service: Service, tenant: Tenant) -> dict[str, Any]:
    """What the page tells, of members that this tenant may ask."""
    metrics = service.dispatcher.metrics
    now = metrics.snapshot if service.failure else await service.look()
    first, gap = metrics.average(metrics.first), metrics.average(metrics.gap)
    members = [
        {
            "name": version.name if version is seat.canary else member,
            "version": version.name,
            "share": seat.share if version is seat.canary else 1 - seat.share if seat.canary else 1,
            "writer": family_name(version.row.prompt_writer),
            "speaker": family_name(version.row.speaker),
            "running": now.running.get(member, 0) if version is seat.current else "",
            "waiting": now.waiting.get(member, 0) if version is seat.current else "",
            "first": first.get(member),
            "gap": gap.get(member),
        }
        for member, seat in service.roster.seats.items()
        for version in seat.versions
        if tenant.may(member)
    ]
    known = _known(service, tenant)
    hits = [(w, m, tokens) for (w, m), tokens in sorted(now.shared_hits.items()) if tenant.may(m)]
    return {
        "members": members,
        "hits": hits,
        "written": _written(known, now),
        "prefixes": [
            _parting(pair, met, page_size=service.dispatcher.page_size)
            for pair, met in sorted(now.prefixes.items())
            if all(map(tenant.may, pair))
        ],
        "draft": service.wanted.draft,
        "speculation": [
            (member, rule, *counts)
            for (member, rule), counts in metrics.speculation().items()
            if tenant.may(member)
        ],
        "workers": [_hosted(standing, known) for standing in now.workers],
        "pages": now.pages,
        "used": now.pages - now.available,
        "kept": sum(now.idle.values()),
        "unfinished": service.dispatcher.unfinished,
        "most": service.dispatcher.most,
        "state": "failed" if service.failure else "draining" if service.draining else "ready",
        "longest": service.dispatcher.max_length,
        "chat": service.tokenizer.has_template,
    }
