"""Signals that ask a training to stop, kept until it has come to a step where it can be left and resumed exactly."""

import signal
import sys
import threading
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # of schedulers that preempt, and of people


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
            print("stopping after this step; press Ctrl-C again to end at once", file=sys.stderr)
        self.number = number
