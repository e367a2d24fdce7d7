"""The lock of a run folder: one run works there at a time, and no other overwrites its files.

The lock is a record lock of the kernel on `.lock`, which ends with the process, however that one ends. The text in
the file is for people, and for shared file systems on which a lock is not seen by other machines.
"""

import errno
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from espalier.config.conf_dir import TRAINS
from espalier.errors import ConfigError, EspalierError
from espalier.runs.run_folder import RunFolder

LOCK = ".lock"
RESULTS = ("report.json", "checkpoints/*.ckpt", "metrics.csv", "export/bundle.json", "predictions/*")
GOES_ON = {"predict": "predictions/manifest.json"}  # a task that fills up what it left, and checks it by itself
JOB, RESTARTS = "SLURM_JOB_ID", "SLURM_RESTART_COUNT"
IS_LOCKED = (errno.EACCES, errno.EAGAIN)
WRITING_SECONDS = 1.0  # between a lock and the line in its file


@dataclass(frozen=True)
class Holder:
    """The process that holds a folder, as its lock file names it."""

    host: str
    pid: int
    since: str
    clock: int | None = None  # ticks from the start of the machine to that of the process: numbers are used again
    job: str | None = None  # of SLURM, and how often that was started again
    restarts: int = 0

    @classmethod
    def this_process(cls) -> "Holder":
        since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        job, restarts = os.environ.get(JOB), int(os.environ.get(RESTARTS) or 0)
        return cls(socket.gethostname(), os.getpid(), since, _clock(os.getpid()), job, restarts)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"

    @property
    def is_elsewhere(self) -> bool:
        """Return whether the process may be alive on another machine; a requeued SLURM job has ended where it was."""
        job, restarts = os.environ.get(JOB), int(os.environ.get(RESTARTS) or 0)
        was_requeued = self.job is not None and self.job == job and self.restarts < restarts
        return self.host != socket.gethostname() and not was_requeued

    @property
    def is_alive(self) -> bool:
        """Return whether the process still runs on this machine, and is not another one with the same number."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return self.clock == _clock(self.pid)


def require_unused(folder: Path, task: str, *, may_begin_again: bool = False, is_trial: bool = False) -> None:
    """Raise `ConfigError` if a run of this task would overwrite files of another in the folder.

    `may_begin_again`: a run that ended before its first checkpoint is overwritten, as nothing can resume from it.
    `is_trial`: the folder is that of a sweep's trial.
    """
    if task in GOES_ON and (folder / GOES_ON[task]).is_file():
        return
    found = next((path.relative_to(folder) for pattern in RESULTS for path in folder.glob(pattern)), None)
    if found is None:
        return
    if is_trial:
        raise ConfigError(
            f"hydra.sweep.dir={folder.parent}: holds a sweep already ({folder.name}/{found}); choose another folder"
        )
    if not may_begin_again:
        go_on = "go on with it by resume=auto, or " if task in TRAINS else ""
        raise ConfigError(f"hydra.run.dir={folder}: holds a run already ({found}); {go_on}choose another folder")
    if RunFolder(folder).can_go_on:
        raise ConfigError(f"hydra.run.dir={folder}: a run has begun here meanwhile; start the same command again")
    if (folder / RESULTS[0]).is_file():
        raise ConfigError(
            f"hydra.run.dir={folder}: holds a finished run without a checkpoint to go on from; choose another folder"
        )


@contextmanager
def locked(folder: Path, check: Callable[[], None] | None = None) -> Iterator[None]:
    """Keep other runs out of the folder inside the block; `check` is called once that is sure.

    Raises:
        ConfigError: another run works in the folder; says which.
        EspalierError: the lock cannot be written.
    """
    path = folder / LOCK
    try:
        descriptor = _locked(path)
    except OSError as error:
        raise EspalierError(f"{path}: not written, {error.strerror}") from error
    owner = os.getpid()
    try:
        if check:
            check()
        yield
    finally:
        if os.getpid() == owner:  # not in a fork
            with suppress(OSError):
                path.unlink(missing_ok=True)
        os.close(descriptor)


def is_in_use(folder: Path) -> bool:
    """Return whether a run works in the folder now, here or, as far as can be told, on another machine."""
    path = folder / LOCK
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    except OSError:  # of somebody else
        return True
    try:
        _require_free(path, descriptor)
    except ConfigError:
        return True
    finally:
        os.close(descriptor)
    return False


def _locked(path: Path) -> int:
    """Lock the file, write this process into it, and return its descriptor."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _require_free(path, descriptor)
            if _is_still(path, descriptor):  # its last holder has not removed it in between
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(asdict(Holder.this_process())).encode() + b"\n", 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _require_free(path: Path, descriptor: int) -> None:
    """Take the lock.

    Raises:
        ConfigError: another process has it.
    """
    key = f"hydra.run.dir={path.parent}"
    wait = "wait for its end, or choose another folder"
    is_enforced = False
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_enforced = True
        except OSError as error:
            if error.errno in IS_LOCKED:
                holder = _holder(descriptor, WRITING_SECONDS)
                raise ConfigError(f"{key}: in use by {holder or 'another process'}; {wait}") from None
    holder = _holder(descriptor)
    if holder and holder.is_elsewhere:
        raise ConfigError(
            f"{key}: in use by {holder}, another machine; if that has ended, say: rm {shlex.quote(str(path))}"
        )
    if holder and not is_enforced and sys.platform != "win32" and holder.is_alive:  # a file system without locks
        raise ConfigError(f"{key}: in use by {holder}; {wait}")


def _holder(descriptor: int, seconds: float = 0.0) -> Holder | None:
    """Return the process that the lock file names; wait for it to be written, None if it cannot be read."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            found = Holder(**json.loads(os.pread(descriptor, 4096, 0)))
            if isinstance(found.pid, int) and isinstance(found.restarts, int):
                return found
        except (ValueError, TypeError):
            pass
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.05)


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _clock(pid: int) -> int | None:
    """Return the start time of a process: field 22 of proc(5)'s stat, in ticks; None outside of Linux."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
