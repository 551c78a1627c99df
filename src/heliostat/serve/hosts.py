"""Names and addresses by which a server is asked, and on which it listens. No torch."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")


def is_address(name: str) -> bool:
    """Whether it is one of IPv4 or IPv6, and no name."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that is bound there."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def host_names(hosts: Iterable[str]) -> frozenset[str]:
    """Names as they are compared."""
    return frozenset(host.lower() for host in hosts)


def knows(names: frozenset[str], host: str) -> bool:
    """Whether a server of these names (``host_names``) is meant by a Host header.

    An address tells a browser nothing wrong about who it is; a name may be anybody's.
    """
    found = HOST.fullmatch(host)
    if found is None:
        return False
    name = found[1].lower()
    return name == "localhost" or name in names or is_address(name.strip("[]"))
