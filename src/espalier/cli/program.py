"""The command called from a program: a script, or a notebook whose main thread runs an event loop."""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from espalier.cli import entry, job

FULL_ERROR = "HYDRA_FULL_ERROR"  # which the command sets


def run(words: Sequence[str]) -> Path:
    """Run one task and return its folder; signals are handled here only during a training.

    Raises:
        EspalierError: the task cannot run, failed, diverged or was stopped.
    """
    with _as_command(words):
        entry.compose_and_run()
        return job.last_ended()


@contextmanager
def _as_command(words: Sequence[str]) -> Iterator[None]:
    """Make this process look like the command inside the block; afterwards restore everything, logging too."""
    from hydra.core.global_hydra import GlobalHydra

    argv, full_error = sys.argv, os.environ.get(FULL_ERROR)
    sys.argv = [entry.NAME, *words]  # where ranks and provenance.json find them
    try:
        with kept_logging():
            yield
    finally:
        sys.argv = argv
        os.environ.pop(FULL_ERROR, None)
        if full_error is not None:
            os.environ[FULL_ERROR] = full_error
        GlobalHydra.instance().clear()


@contextmanager
def kept_logging() -> Iterator[None]:
    """Restore the handlers and the level of the root logger after the block; close the handlers added inside.

    Hydra configures logging anew, which closes every handler there is. A closed one opens its file once more, or, if
    its file was opened to be written anew, drops each line without a word. The program's handlers are spared that.
    """
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    loggers = [one for one in root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    own = {handler for logger in (root, *loggers) for handler in logger.handlers}
    for handler in own:
        handler.close = lambda: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        for handler in set(root.handlers) - own:
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
        for handler in own:
            del handler.close
