"""The page at ``/``: what is alive, told by the server, and a question to several members side by side."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, Template
from starlette.responses import HTMLResponse, Response

from heliostat.serve.keys import Tenant
from heliostat.serve.roster import family_name
from heliostat.serve.service import Service

# Nothing comes from elsewhere, and nobody else may show the page inside theirs.
SAFE = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@cache
def _template() -> Template:
    text = (files("heliostat") / "assets" / "page.html.jinja").read_text(encoding="utf-8")
    return Environment(autoescape=True).from_string(text)


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
    metrics = service.owner.metrics
    now = service.owner.metrics.snapshot if service.owner.failure else await service.look()
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
    hits = [(w, m, tokens) for (w, m), tokens in sorted(now.shared_hits.items()) if tenant.may(m)]
    return {
        "members": members,
        "hits": hits,
        "held": sorted(now.held.items()),
        "pages": now.pages,
        "used": now.pages - now.available,
        "unfinished": service.owner.unfinished,
        "most": service.owner.most,
        "state": "failed" if service.owner.failure else "draining" if service.draining else "ready",
        "longest": service.owner.engine.max_length,
        "chat": service.tokenizer.has_template,
    }
