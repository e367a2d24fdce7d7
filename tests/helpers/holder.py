"""A process that works in a run folder, for tests of what others may do there."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from espalier.runs.ownership import locked


@contextmanager
def another_process_holds(folder: Path) -> Iterator[int]:
    """A fork that has locked the folder; its number."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with locked(folder):
                os.write(told, b"x")
                signal.pause()
        finally:
            os._exit(1)
    os.read(ready, 1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
