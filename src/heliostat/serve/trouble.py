"""What a client is told when something is wrong: the error object of the OpenAI dialect, with its status."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from heliostat.errors import Refused
from heliostat.serve.roster import Unknown

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


@dataclass(slots=True, eq=False)
class Trouble(Exception):
    """A request that is not answered, or not to its end."""

    status: int
    message: str
    param: str | None = None
    """The field of the request that is at fault."""
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    @property
    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = KINDS.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def unsupported(param: str, why: str) -> Trouble:
    """400 for a field that we know and cannot serve."""
    return Trouble(400, f"{param} is not supported here: {why}", param, "unsupported_parameter")


def trouble_of(refused: Refused, *, fields: frozenset[str] = frozenset()) -> Trouble:
    """A refusal from below as an error; its first word names the field where it is one of ``fields``."""
    if isinstance(refused, Unknown):
        return Trouble(404, str(refused), "model", "model_not_found")
    first = str(refused).partition(" ")[0]
    return Trouble(400, str(refused), first if first in fields else None)
