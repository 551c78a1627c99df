"""What the cluster says that a vLLM server is, what it says itself, and the refusal where these differ. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from heliostat.errors import Refused
from heliostat.serve.protocol import Described, Role
from heliostat.serve.roster import family_name
from heliostat.vllm import wire

SOME_PAGES = 4096
"""Where a server does not say how many pages it has: so many are remembered for routing."""
_ROLES: Mapping[frozenset[Role], wire.Role] = {
    frozenset({"prefill"}): "prefill",
    frozenset({"decode"}): "decode",
    frozenset({"prefill", "decode"}): "both",
}


def wire_role(roles: tuple[Role, ...]) -> wire.Role:
    """Both roles together are one word: nothing travels there."""
    return _ROLES[frozenset(roles)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a server must be. None: whatever it is."""

    worker: str
    modules: Mapping[str, str]
    """Engine's names -> the family's digests."""
    roles: tuple[Role, ...]
    page_size: int | None = None
    dtype: str | None = None
    transfer: str | None = None
    fit: str | None = None
    incarnation: str | None = None
    where: str = "the cluster file"
    """Who says so."""

    def refuse_other(self, found: wire.Described) -> None:
        """Raise Refused, with both values, for the first thing that is not so."""
        for name, digest in self.modules.items():
            self._refuse_module(name, digest, found)
        wanted = {
            "role": wire_role(self.roles),
            "page_size": self.page_size,
            "dtype": self.dtype,
            "transfer": self.transfer if len(self.roles) == 1 else None,
            "incarnation": self.incarnation,
        }
        for what, value in wanted.items():
            if value is not None and value != getattr(found, what):
                raise Refused(
                    f"worker {self.worker!r} has {what.replace('_', ' ')} {getattr(found, what)!r}; {self.where} says "
                    f"{value!r}: start the server as `heliostat cluster render` writes it, or mend the file"
                )
        if self.fit is not None and self.fit != found.fit:
            raise Refused(
                f"worker {self.worker!r} has the fit {found.fit[:12]!r}, the family {self.fit[:12]!r}: shape, tokenizer, "
                "template, rope, number format or page size differ; export the family again and start the server with that"
            )

    def _refuse_module(self, name: str, digest: str, found: wire.Described) -> None:
        there = found.modules.get(name)
        if there == digest:
            return
        of_name = {n: d for n, d in found.modules.items() if family_name(n) == family_name(name)}
        if of_name:
            other = next(iter(of_name.values()))
            raise Refused(
                f"worker {self.worker!r} has {family_name(name)!r} with digest {other[:12]}; the family has "
                f"{digest[:12]}: export the family again and restart that server"
            )
        hosts = ", ".join(sorted({family_name(n) for n in found.modules})) or "nothing"
        raise Refused(
            f"worker {self.worker!r} does not host {family_name(name)!r}, as {self.where} says; it hosts {hosts}"
        )


def described_of(
    expected: Expected, found: wire.Described, offered: Mapping[str, str], *, draining: bool
) -> Described:
    """A server as the router knows workers. Modules that nobody placed there are not offered."""
    return Described(
        worker=expected.worker,
        incarnation=found.incarnation,
        engine="vllm",
        modules=offered,
        roles=expected.roles,
        fit=found.fit,
        page_size=found.page_size,
        dtype=found.dtype,
        pages=found.pages or SOME_PAGES,
        page_bytes=0,
        max_length=found.max_length,
        max_running=found.max_running,
        credit=found.max_running,
        hands=len(expected.roles) == 1,
        apart=expected.roles == ("decode",) and dict(found.writers) == dict(found.modules),
        draining=draining,
    )
