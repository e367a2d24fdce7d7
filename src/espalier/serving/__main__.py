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

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from espalier.errors import CONTROL, ConfigError
from espalier.serving.address import listen
from espalier.serving.app import App, leave_soon
from espalier.serving.hosts import require_names
from espalier.serving.metrics import SHARED
from espalier.serving.predictor import Predictor
from espalier.serving.settings import Settings


def main() -> int:
    """Serve until a signal comes; return the exit code."""
    settings = Settings.from_words(sys.argv[1:])
    try:
        require_names(settings.hosts)
        # before any worker starts, so that a damaged bundle costs one line
        name = Predictor(settings.bundle, settings.threads, settings.time_limit_s).spec.name
        listening = listen(settings.host, settings.port)
    except ConfigError as error:
        print(*(f"espalier: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        return error.exit_code
    return run(settings, name, listening)


def run(settings: Settings, name: str, listening: socket.socket) -> int:
    """Serve on the socket until a signal comes; return the exit code."""
    host, port = listening.getsockname()[:2]
    ready = f"serving {CONTROL.sub('?', name)} on http://{f'[{host}]' if ':' in host else host}:{port}"
    config = uvicorn.Config(
        partial(App, settings, ready, leave_soon),
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
        os.environ[SHARED] = folder  # prometheus_client reads it when a worker imports it
        workers = Multiprocess(config, [listening])
        workers.run()
        return int(any(process.exitcode == STARTUP_FAILURE for process in workers.processes))


if __name__ == "__main__":
    sys.exit(main())
