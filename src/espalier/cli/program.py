"""The command inside of a program: a script, a notebook whose main thread runs an event loop."""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from espalier.cli import entry, job

FULL_ERROR = "HYDRA_FULL_ERROR"  # which the command sets


def run(words: Sequence[str]) -> Path:
    """Run one task and return its folder; signals are left to the caller, but for those during a training.

    Raises:
        EspalierError: it cannot work, failed, diverged or was stopped.
    """
    with _as_command(words):
        entry.compose_and_run()
        return job.last_ended()


@contextmanager
def _as_command(words: Sequence[str]) -> Iterator[None]:
    """Within, this process looks like the command; afterwards all is as it was, the handlers of logging among it."""
    from hydra.core.global_hydra import GlobalHydra

    root = logging.getLogger()
    argv, handlers, level = sys.argv, list(root.handlers), root.level
    full_error = os.environ.get(FULL_ERROR)
    sys.argv = [entry.NAME, *words]  # where ranks and provenance.json find them
    try:
        yield
    finally:
        sys.argv = argv
        for handler in set(root.handlers) - set(handlers):
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
        os.environ.pop(FULL_ERROR, None)
        if full_error is not None:
            os.environ[FULL_ERROR] = full_error
        GlobalHydra.instance().clear()
