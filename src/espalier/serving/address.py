"""The address that a server listens on. Standard library alone, so that a task can check it without the server."""

import socket

from espalier.errors import ConfigError

BACKLOG = 2048  # connections that the kernel holds until they are accepted


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket, so that connections wait while the workers start.

    Raises:
        ConfigError: the address is not one of this machine, or is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        raise ConfigError(f"task.host={host} task.port={port}: cannot listen there: {error.strerror}") from error
    listening.set_inheritable(True)
    return listening
