"""Handling of signals that end a process while it trains nothing.

`processes/stop_signal.py` handles them during a training.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from espalier.config.conf_dir import TRAINS
from espalier.errors import EspalierError, StoppedError
from espalier.processes.stop_signal import SIGNALS, heard, leave_terminal

RETRY_SECONDS = 0.05  # while modules are imported: what is raised there leaves half of one, or is swallowed
IMPORT_SECONDS = 1.0  # for an import to end; that of Lightning takes longer, and nothing is lost with it
PATIENCE_SECONDS = 6.0  # until a process that has not come to an end, as something swallowed the signal, is ended
HANDLES_SIGNALS = ("serve",)

Handler = Callable[[int, FrameType | None], None]


class Signalled(BaseException):
    """A signal that has arrived; no `Exception`, because libraries that catch those would swallow it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name = signal.Signals(number).name
        self.has_trained = False


class InterruptedByUserError(EspalierError):
    """Ctrl-C in a task that has nothing to save; the exit code is 128 + SIGINT, as a shell reports it."""

    exit_code = 130


@contextmanager
def heeded(task: str) -> Iterator[None]:
    """End the task at once and with one line when a signal arrives inside the block.

    Raises:
        StoppedError: SIGTERM, SIGUSR1, SIGHUP or SIGINT has come to a task that trains.
        InterruptedByUserError: SIGINT has come to another task.
    """
    if task in HANDLES_SIGNALS:
        yield
        return
    own = os.getpid()
    timers: list[threading.Timer] = []

    def later(seconds: float, action: Callable[..., None], *arguments: object) -> None:
        timer = threading.Timer(seconds, action, arguments)
        timer.daemon = True
        timer.start()
        timers.append(timer)

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != own:  # a fork, say a worker of a data loader, ends as others do
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        leave_terminal(number)
        if not timers:
            later(IMPORT_SECONDS if _is_importing(frame) else PATIENCE_SECONDS, _end_at_once, task, number)
        if _is_importing(frame):
            later(RETRY_SECONDS, os.kill, own, number)
            return
        raise Signalled(number)

    try:
        with handled(heard() if task in TRAINS else (signal.SIGINT,), end):
            yield
    except Signalled as signalled:
        if task not in TRAINS:
            raise InterruptedByUserError(f"{task} stopped by {signalled.name}") from None
        raise StoppedError(stopped(signalled.name, signalled.has_trained)) from None
    finally:
        for timer in timers:
            timer.cancel()


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _end_at_once(task: str, number: int) -> None:
    error = StoppedError if task in TRAINS else InterruptedByUserError
    os.write(2, f"espalier: ended by {signal.Signals(number).name}; what was saved before is whole\n".encode())
    os._exit(error.exit_code)


def stopped(name: str, has_trained: bool) -> str:
    """Return the line that tells the user by which signal the task was stopped."""
    if has_trained:
        return f"stopped by {name} outside of training; what was saved before is whole"
    return f"stopped by {name} before training began; nothing was lost"


@contextmanager
def handled(numbers: Sequence[int], handler: Handler) -> Iterator[None]:
    """Send these signals to `handler` inside the block, and to the old handlers after it.

    Outside the main thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # `launch.py` starts its processes with them blocked
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


@contextmanager
def held_back() -> Iterator[None]:
    """Delay signals until the block ends; a process started inside delays them until it uses `handled`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
