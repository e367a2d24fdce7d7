"""Signals that ask a training to stop, kept until it has come to a step where it can be left and resumed exactly."""

import os
import signal
import subprocess
import sys
import threading
from types import FrameType

from espalier.errors import EspalierError

JOB = "SLURM_JOB_ID"  # set inside a job of SLURM
NAMES = ("SIGTERM", "SIGUSR1", "SIGINT")  # of schedulers that preempt, and of people
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))  # Windows has no SIGUSR1


class Interrupt:
    """The signal that came last, 0 before one has come. A second SIGINT ends the process at once."""

    def __init__(self) -> None:
        self.number = 0

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name if self.number else "a signal to another process"

    def listen(self) -> None:
        """Take the signals over from Lightning, which gives every one back when the training has ended."""
        self.number = 0
        if threading.current_thread() is threading.main_thread():  # others may not
            for number in SIGNALS:
                signal.signal(number, self._keep)

    def _keep(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.number:
                raise KeyboardInterrupt
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
