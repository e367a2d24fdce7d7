"""Check the Host of each request, so that a web page cannot read the server under a name of its own.

The owner of a page can let its name point to 127.0.0.1 (DNS rebinding). The browser of a visitor then gives the page
whatever our server answers. Such a request is recognised by its header Host, which has the name of the page.
"""

import ipaddress
import re
import socket
from collections.abc import Sequence

from espalier.errors import ConfigError

OWN = ("localhost", "127.0.0.1", "[::1]")
ALL = "*"
NAME = re.compile(r"[\w.-]+|\[[0-9a-f:.]+\]", re.IGNORECASE)
AUTHORITY = re.compile(rb"([^:\[\]]*?|\[[0-9a-f:.]+\])\.?(?::\d*)?")
ABSOLUTE = re.compile(rb"[a-z]+://([^/?#]*)", re.IGNORECASE)
VERSIONS = ("1.0", "1.1")
MAX_SEEN = 100  # values of a header that are known to be allowed


class Hosts:
    """Decides by its Host whether a request is meant for this server; any port will do."""

    def __init__(self, bound: str, allowed: Sequence[str]) -> None:
        """Take the address `bound` that the server listens on, and further names in `allowed`; `*` allows all."""
        self._allows_all = ALL in allowed
        self._names = {name.lower().removesuffix(".").encode() for name in (*OWN, *allowed)}
        self._allows_addresses = _is_every(bound)
        if self._allows_addresses:
            self._names.add(socket.gethostname().lower().encode())
        else:
            self._names.add((f"[{bound}]" if ":" in bound else bound).lower().encode())
        self._seen: set[bytes] = set()

    def problem(self, version: str, url: bytes, headers: Sequence[tuple[bytes, bytes]]) -> tuple[int, str] | None:
        """Return status and sentence of a refusal, or None if the request is meant for this server."""
        hosts = [value for name, value in headers if name == b"host"]
        if version not in VERSIONS:
            return 400, "HTTP 1.0 and 1.1 are spoken here"
        if len(hosts) != 1 and (hosts or version == "1.1"):
            return 400, f"{len(hosts)} headers Host; a request has one"
        if not url.startswith(b"/") and (absolute := ABSOLUTE.match(url)):
            hosts.append(absolute[1])
        for host in hosts:
            if host not in self._seen:
                if not self._is_ours(host.lower()):
                    return 421, "the header Host names another server; task.hosts (--hosts) says which names are ours"
                if len(self._seen) < MAX_SEEN:
                    self._seen.add(host)
        return None

    def _is_ours(self, host: bytes) -> bool:
        found = AUTHORITY.fullmatch(host)
        return self._allows_all or bool(
            found and (found[1] in self._names or (self._allows_addresses and _is_address(found[1])))
        )


def require_names(hosts: Sequence[str]) -> None:
    """Raise `ConfigError` unless each is the name of a host, without scheme and port, or `*`."""
    for name in hosts:
        if name != ALL and not NAME.fullmatch(name):
            raise ConfigError(f"task.hosts={name}: no name of a host; such as example.org, without http:// and port")


def _is_every(bound: str) -> bool:
    try:
        return ipaddress.ip_address(bound).is_unspecified
    except ValueError:
        return not bound


def _is_address(name: bytes) -> bool:
    """Return whether the name is an IP address, which a web page cannot redirect as it can a name."""
    try:
        ipaddress.ip_address(name.strip(b"[]").decode("latin-1"))
    except ValueError:
        return False
    return True
