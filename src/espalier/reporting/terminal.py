"""Print text unchanged, on a terminal, into a file, or into a pipe that nobody reads any more.

Names of folders, classes and options come from users or strangers. So brackets are not read as markup, words between
colons not as emoji, and no byte as a command to the terminal.
"""

import errno
import io
import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

from espalier.errors import CONTROL

if TYPE_CHECKING:
    from rich.console import Console

NOT_FOR_USERS = (  # warnings of Lightning
    "torch.distributed.nn.functional.all_gather is deprecated",  # which it calls itself
    ".*isinstance.treespec, LeafSpec",  # Lightning 2.6 under torch 2.13
    ".*does not have many workers",  # tensors in memory need none
    "The number of training batches",  # epochs shorter than log_every_n_steps are logged at their end
    "It is recommended to use `self.log",  # torchmetrics has summed over ranks already
    "The `srun` command is available",  # and `launchers.py` knows whether it was used
    "Checkpoint directory .* exists and is not empty",  # a resumed run continues in its own folder
)
IS_GONE = (errno.EPIPE, errno.EIO)  # the reader of a pipe; the terminal
FORGIVING = {"stdout": "replace", "stderr": "backslashreplace"}  # letters that the encoding lacks
STANDARD = {"stdout": 1, "stderr": 2}  # file descriptors

_farewell = ""


def console(*, soft_wrap: bool = False) -> "Console":
    """Return a console that shows every text as it is; with `soft_wrap` it does not break lines."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False, soft_wrap=soft_wrap)


def say(line: str) -> None:
    """Print one line for the user, without wrapping it."""
    console(soft_wrap=True).print(printable(line))


def printable(text: str) -> str:
    """Return the text with `?` for every character that could control the terminal."""
    return CONTROL.sub("?", text)


def hush_lightning() -> None:
    """Silence the messages of Lightning that no user can act on; called once it is imported."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in NOT_FOR_USERS:
        warnings.filterwarnings("ignore", message)


def keep_open() -> None:
    """Keep printing from ever ending this process, by a letter that is missing or a reader that has gone."""
    for name, descriptor in STANDARD.items():
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        if stream is getattr(sys, f"__{name}__"):  # not what a test has put in its place
            stream.flush()
            setattr(sys, name, _patient(stream, descriptor))
        getattr(sys, name).reconfigure(errors=FORGIVING[name])


def say_when_closed(line: str) -> None:
    """Set the line to print on stderr if the reader of stdout goes away."""
    global _farewell
    _farewell = line


def _patient(stream: io.TextIOWrapper, descriptor: int) -> io.TextIOWrapper:
    """Return the same stream over a `_Patient` file, whose reader may go away."""
    return io.TextIOWrapper(
        io.BufferedWriter(_Patient(descriptor, "w", closefd=False)),
        encoding=stream.encoding,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Patient(io.FileIO):
    """A standard stream that ignores writes once nobody can read it any more."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in IS_GONE:
                raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())  # for C libraries and child processes as well
        os.close(nowhere)
        if self.fileno() == STANDARD["stdout"] and _farewell:
            print(_farewell, file=sys.stderr, flush=True)
        return memoryview(data).nbytes
