"""`python -m espalier.serving BUNDLE`: the server process, one or several workers, until a signal ends it.

`espalier serve` replaces itself by this command; a container starts with it. Exit code 0 after SIGTERM or SIGINT, once
what was accepted is answered.
"""

import os
import signal
import socket
import sys
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from espalier.errors import ConfigError
from espalier.serving.metrics import SHARED
from espalier.serving.predictor import Predictor
from espalier.serving.settings import Settings

BACKLOG = 2048  # connections that the kernel holds until they are accepted


def main() -> int:
    """Serve; the exit code."""
    settings = Settings.from_words(sys.argv[1:])
    try:
        name = Predictor(
            settings.bundle, settings.threads
        ).spec.name  # before any worker starts: damaged ones cost one line
        listening = listen(settings.host, settings.port)
    except ConfigError as error:
        print(*(f"espalier: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        return error.exit_code
    return run(settings, name, listening)


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections already, so that nobody is turned away while the workers start.

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


def run(settings: Settings, name: str, listening: socket.socket) -> int:
    """Serve on the socket until a signal comes; the exit code."""
    host, port = listening.getsockname()[:2]
    ready = f"serving {name} on http://{f'[{host}]' if ':' in host else host}:{port}"
    config = uvicorn.Config(
        partial(create, settings, ready),
        factory=True,
        workers=settings.workers,
        http="espalier.serving.protocol:Protocol",
        ws="none",
        loop="auto",
        log_level="error",  # a warning per damaged request would let a client fill the disk
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=int(settings.time_limit_s) + 1,
    )
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises the signal again after it has stopped
        signal.signal(number, lambda number, frame: None)
    if settings.workers == 1:
        uvicorn.Server(config).run([listening])
        return 0
    with TemporaryDirectory(prefix="espalier_metrics_") as folder:
        os.environ[SHARED] = folder
        workers = Multiprocess(config, [listening])
        workers.run()
        return int(any(process.exitcode == STARTUP_FAILURE for process in workers.processes))


def create(settings: Settings, ready: str) -> Any:  # uvicorn's own type of an application is private
    """The application of one worker, imported there: prometheus_client looks at the environment when it is imported."""
    from espalier.serving.app import App

    return App(settings, ready)


if __name__ == "__main__":
    sys.exit(main())
