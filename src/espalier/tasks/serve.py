"""`espalier serve source=RUN`: check everything, then start a server that has neither torch nor Hydra in memory."""

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

from annotated_types import Ge, Le

from espalier.config.ranges import Count, Positive
from espalier.errors import ConfigError, require
from espalier.run import Run

Port = Annotated[int, Ge(0), Le(65_535)]
PACKAGES = ("uvicorn", "uvloop", "httptools", "orjson", "python_multipart", "prometheus_client", "PIL")


def serve(
    run: Run,
    host: str,
    hosts: Sequence[str],
    port: Port,
    workers: Count,
    threads: Count,
    max_batch: Count,
    queue: Count,
    max_body_mb: Positive,
    time_limit_s: Positive,
) -> NoReturn:
    """Replace this process by `python -m espalier.serving`, which ends with exit code 0 on SIGTERM or SIGINT.

    A server measures nothing, so it leaves no run folder.

    Raises:
        ConfigError: no bundle, a package that is missing, or an address that cannot be listened on.
    """
    if run.bundle is None:
        raise ConfigError(
            "source=null: serve needs an exported RUN; try source=latest after espalier export source=RUN"
        )
    if queue < max_batch:
        raise ConfigError(f"task.queue={queue}: must hold at least one batch; task.max_batch={max_batch}")
    for package in PACKAGES:
        if package != "uvloop" or sys.platform != "win32":
            require(package, "serve")
    from espalier.serving import address
    from espalier.serving.hosts import require_names
    from espalier.serving.predictor import Predictor
    from espalier.serving.settings import Settings

    require_names(hosts)
    Predictor(run.bundle.path, threads, time_limit_s)
    address.listen(host, port).close()
    limits = max_batch, queue, max_body_mb, time_limit_s
    settings = Settings(run.bundle.path, host, list(hosts), port, workers, threads, *limits)
    _leave_no_folder(run.folder)
    sys.stdout.flush()
    # -P: a file named like one of our modules in the current folder is not imported
    os.execv(sys.executable, [sys.executable, "-P", "-m", "espalier.serving", *settings.to_words()])


def _leave_no_folder(folder: Path) -> None:
    """Remove what Hydra made for a run, unless something else lies there."""
    log = folder / "run.log"
    with contextlib.suppress(OSError):
        if log.stat().st_size == 0:
            log.unlink()
        folder.rmdir()
