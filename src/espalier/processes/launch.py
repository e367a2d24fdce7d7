"""The ranks of a run on one machine: started together, watched, and ended together.

Lightning would start the others from the first rank. If the first rank hangs, nobody ends it; if it dies, nobody ends
the others, and what is printed last is a closed connection, not its cause. Here a process that does nothing else starts
them all; each rank leaves a note about why it failed, and one line names the first cause.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import FrameType

from espalier.config import redaction
from espalier.errors import ConfigError, DivergedError, EspalierError, StoppedError
from espalier.processes.signals import InterruptedByUserError, handled, held_back, stopped
from espalier.processes.stop_signal import heard, leave_terminal
from espalier.runs import files

NOTES = "ESPALIER_NOTES"  # the folder where a rank leaves its note
PARENT = "ESPALIER_PARENT"  # the process that started it
GRACE_SECONDS = 10.0  # for the others to end by themselves after the first has failed
SHORT_GRACE_SECONDS = 2.0  # after one that has waited in vain: who is still there does not answer
POLL_SECONDS = 0.05
PR_SET_PDEATHSIG = 1  # linux/prctl.h
# What torch.distributed raises in a rank whose peer is gone, over gloo, NCCL and its key-value store.
PEER_IS_GONE = re.compile(
    r"connection (was likely )?(closed|reset|refused|aborted)|broken pipe|socket closed|failed to recv|sendBytes failed"
    r"|recvValue failed|remote process exited|communicator was aborted",
    re.IGNORECASE,
)
PEER_IS_STUCK = re.compile(
    r"timed out (waiting|after)|wait timeout|socket has timed out|timeout\(ms\)|application timeout", re.IGNORECASE
)
ERRORS = {error.exit_code: error for error in (ConfigError, DivergedError, StoppedError)}
HINTS: dict[int, str] = {signal.SIGKILL: " (out of memory?)", signal.SIGABRT: " (torch says why above)"}


class RankError(EspalierError):
    """The failure of a rank, where no other error class has its exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def is_rank() -> bool:
    """Return whether `launch` started this process."""
    return NOTES in os.environ


def end_with_parent() -> None:
    """Make this rank end when the process that started it ends, however that happens (Linux).

    Raises:
        EspalierError: that process is gone already.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[PARENT]):
        raise EspalierError("the process that started this rank is gone")


def leave_note(error: Exception, *, with_traceback: bool) -> None:
    """Write down why this rank fails, for the process that watches it."""
    lines = str(error)
    if not isinstance(error, EspalierError):
        lines = ": ".join(filter(None, (type(error).__name__, next(iter(lines.splitlines()), ""))))
    note = {
        "lines": redaction.scrub(lines),
        "exit_code": getattr(error, "exit_code", 1),
        "is_expected": isinstance(error, EspalierError),
        "traceback": redaction.scrub("".join(traceback.format_exception(error))) if with_traceback else "",
    }
    path = _note(Path(os.environ[NOTES]), int(os.environ["LOCAL_RANK"]))
    files.write_text(path, json.dumps(note))


def _note(folder: Path, number: int) -> Path:
    return folder / f"{number}.json"


class Kind(IntEnum):
    """The way in which a rank failed; of several failures, the lowest kind is the cause of the others."""

    KILLED = 0
    RAISED = 1
    ABORTED = 2  # NCCL ends its process so, after a timeout
    WAITED = 3  # in vain, for another rank
    LOST_PEER = 4


@dataclass(frozen=True)
class Failure:
    """The reason why a rank ended, in one line or more; `seconds` since the epoch."""

    kind: Kind
    seconds: float
    number: int
    lines: str
    exit_code: int
    traceback: str = ""


class Rank:
    """One of several processes; it leads a process group to which its data loader workers belong."""

    def __init__(self, number: int, command: Sequence[str], environment: dict[str, str], folder: Path) -> None:
        self.number = number
        self.note = _note(folder, number)
        own = {**environment, "LOCAL_RANK": str(number)}
        # A session of its own: the Ctrl-C of a terminal reaches it through `launch` alone, and once.
        self.process = subprocess.Popen(command, env=own, start_new_session=True)
        self.ended_at: float | None = None
        self.was_ended = False  # by us

    def has_ended(self) -> bool:
        if self.ended_at is None and self.process.poll() is not None:
            self.ended_at = time.time()
            if self.process.returncode:
                self._kill_group()  # its workers hold its connections open
        return self.ended_at is not None

    def send(self, number: int) -> None:
        if not self.has_ended():
            self.process.send_signal(number)

    def kill(self) -> None:
        if not self.has_ended():
            self.was_ended = True
            self._kill_group()
            with suppress(subprocess.TimeoutExpired):  # not even SIGKILL ends one that waits for a dead disk
                self.process.wait(GRACE_SECONDS)

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError, PermissionError):  # there is none left; macOS says it the second way
            os.killpg(self.process.pid, signal.SIGKILL)

    def failure(self, received: Sequence[int]) -> Failure | None:
        """Return why the rank failed, or None; `received` are the signals that were passed on to it."""
        if self.note.exists():
            note = json.loads(self.note.read_text())
            kind = Kind.RAISED if note["is_expected"] else _kind(note["lines"])
            seconds = self.note.stat().st_mtime
            return Failure(kind, seconds, self.number, note["lines"], note["exit_code"], note["traceback"])
        if self.ended_at is None or self.was_ended or not self.process.returncode:
            return None
        code, seconds = self.process.returncode, self.ended_at
        if code == StoppedError.exit_code and received:  # by a timer, as in `signals.py`, which leaves no note
            line = f"stopped by {signal.Signals(received[0]).name} before or after training; what was saved is whole"
            return Failure(Kind.RAISED, seconds, self.number, line, code)
        if code > 0:
            return Failure(Kind.RAISED, seconds, self.number, f"ended with exit code {code}", code)
        if -code in received:
            return Failure(Kind.RAISED, seconds, self.number, stopped(signal.Signals(-code).name, False), 75)
        kind = Kind.ABORTED if -code == signal.SIGABRT else Kind.KILLED
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return Failure(kind, seconds, self.number, f"killed by {name}{HINTS.get(-code, '')}", 1)


def _kind(lines: str) -> Kind:
    if PEER_IS_STUCK.search(lines):
        return Kind.WAITED
    return Kind.LOST_PEER if PEER_IS_GONE.search(lines) else Kind.RAISED


def launch(words: Sequence[str], num_ranks: int) -> None:
    """Run this program with these words in `num_ranks` processes, and wait until all have ended.

    Signals are passed on. When one rank fails, the others have ten seconds to end by themselves.

    Raises:
        EspalierError: a rank failed; names the first cause, and has its exit code.
        InterruptedByUserError: Ctrl-C was pressed a second time.
    """
    ranks: list[Rank] = []
    received: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        leave_terminal(number)
        received.append(number)
        for rank in ranks:
            rank.send(signal.SIGKILL if received.count(signal.SIGINT) > 1 else number)

    with tempfile.TemporaryDirectory(prefix="espalier_ranks_") as name, handled(heard(), hand_on):
        command, environment = [*_program(), *words], _environment(num_ranks, name)
        try:
            with held_back():
                for number in range(num_ranks):
                    ranks.append(Rank(number, command, environment, Path(name)))
            _wait(ranks)
        finally:
            for rank in ranks:
                rank.kill()
        if received.count(signal.SIGINT) > 1:
            raise InterruptedByUserError("ended at once by a second SIGINT; what was saved before is whole")
        failures = [failure for rank in ranks if (failure := rank.failure(received))]
    if failures:
        raise _first_cause(failures, num_ranks)


def _program() -> list[str]:
    """Return how this process was started: by a console command, as a module, or from a program that imports us."""
    main = sys.modules["__main__"]
    if not Path(sys.argv[0]).is_file():
        return [sys.executable, "-m", "espalier.cli"]
    if main.__spec__ is not None:
        return [sys.executable, "-m", str(main.__spec__.name)]
    return [sys.executable, sys.argv[0]]


def _environment(num_ranks: int, notes: str) -> dict[str, str]:
    """Return the environment of the ranks, by which Lightning numbers them.

    RANK is left out: a value from outside would be that of each of them.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    numbered = {"WORLD_SIZE": num_ranks, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    own = {NOTES: notes, PARENT: os.getpid()}
    inherited = {name: value for name, value in os.environ.items() if name != "RANK"}
    return {**inherited, **{name: str(value) for name, value in {**numbered, **own}.items()}}


def _wait(ranks: Sequence[Rank]) -> None:
    """Wait for all ranks; once one has failed, give the others a few seconds to end."""
    deadline = float("inf")
    while time.monotonic() < deadline and [rank for rank in ranks if not rank.has_ended()]:
        failures = [failure for rank in ranks if (failure := rank.failure(()))]
        if failures and deadline == float("inf"):
            has_waited = min(failures, key=lambda failure: failure.kind).kind == Kind.WAITED
            deadline = time.monotonic() + (SHORT_GRACE_SECONDS if has_waited else GRACE_SECONDS)
        time.sleep(POLL_SECONDS)


def _first_cause(failures: Sequence[Failure], num_ranks: int) -> EspalierError:
    """Return the failure that led to the others; print its traceback."""
    first = min(failures, key=lambda failure: (failure.kind, failure.seconds))
    if all(failure.kind == Kind.RAISED for failure in failures) and len(failures) == num_ranks:
        first, lines = failures[0], failures[0].lines  # it is no matter of one rank
    elif first.exit_code == StoppedError.exit_code:
        lines = first.lines
    elif first.kind == Kind.WAITED and len(failures) < num_ranks:
        lines = _unanswered(first, sorted(set(range(num_ranks)) - {failure.number for failure in failures}))
    else:
        lines = "\n".join(f"rank {first.number}: {line}" for line in first.lines.splitlines())
    print(redaction.scrub(first.traceback), end="", file=sys.stderr)
    known = ERRORS.get(first.exit_code)
    return known(lines) if known else RankError(lines, first.exit_code)


def _unanswered(waited: Failure, silent: Sequence[int]) -> str:
    found = re.search(r"(\d+) ?(ms|seconds)", waited.lines)
    seconds = f" for {int(found[1]) / (1000 if found[2] == 'ms' else 1):g} s" if found else ""
    has = f"rank {silent[0]} has" if len(silent) == 1 else f"ranks {', '.join(map(str, silent))} have"
    return f"{has} not answered{seconds}, so rank {waited.number} gave up"
