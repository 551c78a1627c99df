"""API keys: who may ask which members. A file of keys is read once; without one, only this machine is served."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from heliostat.errors import Refused
from heliostat.serve.trouble import Trouble

SHORTEST = 16
"""Characters of a key: fewer can be guessed."""


class Entry(BaseModel):
    """What the file says of one key."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=64)]
    members: list[str] | str
    admin: bool = False


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who asks. ``members`` is None for one who may ask all."""

    name: str
    members: frozenset[str] | None
    admin: bool
    salt: str
    """Pages are shared only where this is equal."""

    def may(self, model: str) -> bool:
        """Whether a member, or a version of it, is theirs to ask."""
        return self.members is None or model.partition("@")[0] in self.members


OPEN = Tenant("", None, True, "")
"""Anybody, where there are no keys."""


class Keys:
    """The keys of a file, as digests; the keys themselves are not kept."""

    def __init__(self, tenants: Iterable[tuple[str, Tenant]]) -> None:
        self._tenants = [(_digest(key), tenant) for key, tenant in tenants]

    @classmethod
    def read(cls, path: Path) -> Keys:
        """The keys in a YAML or JSON file: ``KEY: {name: alice, members: [math] or all, admin: false}``.

        Raises Refused without ever showing a key.
        """
        try:
            text = path.read_text(encoding="utf-8")
            content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
            found = TypeAdapter(dict[str, Entry]).validate_python(content)
        except OSError as error:
            raise Refused(f"the keys in {path} cannot be read: {error.strerror}") from None
        except ValidationError as error:
            raise Refused(f"{path}: {_told(error)}. {_SHAPE}") from None
        except (ValueError, yaml.YAMLError):  # their messages quote the file
            raise Refused(f"{path} is no YAML or JSON file of keys. {_SHAPE}") from None
        return cls(_tenants(path, found))

    def tenant(self, authorization: str) -> Tenant:
        """Whose key an Authorization header holds; 401 where it is nobody's."""
        kind, _, key = authorization.partition(" ")
        given = _digest(key.strip())
        found: Tenant | None = None
        for digest, tenant in self._tenants:  # all of them: the time tells nothing of which
            if hmac.compare_digest(digest, given):
                found = tenant
        if found is None or kind.lower() != "bearer":
            raise Trouble(
                401,
                "no valid API key: send the header 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return found


_SHAPE = "Each entry is  KEY: {name: WHO, members: [MEMBER, ...] or all, admin: true or false}"


def _tenants(path: Path, found: dict[str, Entry]) -> list[tuple[str, Tenant]]:
    if not found:
        raise Refused(f"{path} holds no key, so nobody could ask anything. {_SHAPE}")
    tenants = []
    for number, (key, entry) in enumerate(found.items(), 1):
        if len(key) < SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
            raise Refused(
                f"{path}: key {number} ({entry.name}) is not {SHORTEST} or more visible ASCII characters; "
                "make one: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
            )
        if isinstance(entry.members, str) and entry.members != "all":
            raise Refused(f"{path}: members of {entry.name} is {entry.members!r}; allowed is a list, or all")
        members = None if isinstance(entry.members, str) else frozenset(entry.members)
        # Of the name, not of the key: a key that is renewed under its name finds its pages again.
        salt = hashlib.sha256(b"tenant\0" + entry.name.encode()).hexdigest()
        tenants.append((key, Tenant(entry.name, members, entry.admin, salt)))
    return tenants


def _told(error: ValidationError) -> str:
    """What is wrong, by number and field: a key is not shown."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"][1:] if part != "[key]"]
    return f"{'.'.join(place) or 'an entry'}: {first['msg']}"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
