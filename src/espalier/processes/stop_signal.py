"""Handling of signals that stop a training: kept until a step is done at which it can be left and resumed exactly."""

import os
import signal
import subprocess
import sys
import threading
from types import FrameType

from espalier.errors import EspalierError

JOB = "SLURM_JOB_ID"  # set inside a job of SLURM
NAMES = ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT")  # of schedulers that preempt, of a closed terminal, of people
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))  # Windows has two of them
HANGUP = getattr(signal, "SIGHUP", None)


def heard() -> tuple[int, ...]:
    """Return the signals to listen to: all, but no SIGHUP if `nohup` has this process ignore it."""
    return tuple(number for number in SIGNALS if number != HANGUP or signal.getsignal(number) is not signal.SIG_IGN)


def leave_terminal(number: int) -> None:
    """Discard output after a SIGHUP if the terminal is closed; each write to it would fail."""
    if number != HANGUP:
        return
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


class Interrupt:
    """Remembers the last signal, 0 before the first; a second SIGINT ends the process at once."""

    def __init__(self) -> None:
        self.number = 0
        self.was_pressed = False  # Ctrl-C

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name if self.number else "a signal to another process"

    def listen(self) -> None:
        """Take over the signals from Lightning, which restores them when the training has ended."""
        self.number, self.was_pressed = 0, False
        if threading.current_thread() is threading.main_thread():  # others may not
            for number in heard():
                signal.signal(number, self._keep)

    def _keep(self, number: int, frame: FrameType | None) -> None:
        leave_terminal(number)
        if number == signal.SIGINT:
            if self.was_pressed:
                raise KeyboardInterrupt
            self.was_pressed = True
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print("stopping after this step; press Ctrl-C again to end at once", file=sys.stderr)
        self.number = number


def requeue() -> None:
    """Ask SLURM to start this job again when there is room; `resume=auto` then goes on.

    Raises:
        EspalierError: SLURM refuses.
    """
    words = ["scontrol", "requeue", os.environ[JOB]]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        said = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        reason = said if done.returncode else ""
    except OSError as error:
        reason = str(error.strerror)
    if reason:
        raise EspalierError(f"{' '.join(words)}: {reason}; what was trained is saved, start the job again yourself")
