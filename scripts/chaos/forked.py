"""Runs of the command line as forks of a process that has imported everything; they end where they are told to.

A run costs a second so, and can be ended at the seventh rename of a file or in the second batch of the test. What a
fork cannot show is an end in the imports; `kills.py` and `signals.py` try it with processes of their own. Linux only.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import torch
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from lightning.fabric.utilities.rank_zero import rank_zero_only

from espalier import run
from espalier.cli import entry
from espalier.composition import results
from espalier.export import deployed
from espalier.learners.learner import Learner
from espalier.loggers.csv_log import CsvLog
from espalier.processes import launch
from espalier.reporting import figures
from espalier.runs import files, storage
from espalier.runs.checkpoint import CheckpointIO

PLACES: dict[str, tuple[Any, str, bool]] = {  # what is passed, and whether it is done by then
    "start": (run.Run, "record", False),
    "batch": (Learner, "training_step", False),
    "step": (Learner, "on_train_batch_end", True),
    "end of an epoch": (Learner, "on_train_epoch_end", True),
    "validation": (Learner, "validation_step", False),
    "end of a validation": (Learner, "on_validation_epoch_end", True),
    "save": (CheckpointIO, "_store_after", True),
    "within a file": (storage._Hashed, "write", False),
    "rename": (Path, "replace", False),
    "rows": (CsvLog, "save", True),
    "test": (Learner, "test_step", False),
    "export": (deployed, "export", False),
    "figures": (results, "draw", False),
    "figure": (figures, "save", False),
    "report": (files, "write_text", False),
}
IMPORTED = (
    "torch._dynamo",
    "torch.onnx",
    "onnxscript",
    "onnxruntime",
    "torchao",
    "datasets",
    "PIL.Image",
    "torch_pruning",
)
OF_ALL_RANKS = ("start", "batch", "step", "end of an epoch", "validation", "end of a validation", "test")
POLL_SECONDS = 0.005
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
TIMED_OUT = 124
STOPPED = "stopped"  # among the places that were passed


@dataclass(frozen=True)
class Stop:
    """The process of this rank sends itself a signal when it passes a place for the `count`-th time."""

    place: str
    count: int
    signal: str
    rank: int = 0
    is_whole: bool = False  # whether the signal goes to the process that has started the ranks

    def __str__(self) -> str:
        who = "" if self.rank == 0 and not self.is_whole else " of all" if self.is_whole else f" of rank {self.rank}"
        return f"{self.signal}{who} at {self.place} {self.count}"


_passed: Counter[str] = Counter()
_stop: Stop | None = None
_counts: Path | None = None
_draws = True  # figures: a third of the time of a run


def warm(folder: Path, modules: Sequence[str]) -> None:
    """Import these, and what a training needs: some imports wait for the first step, fonts for the first figure."""
    torch.set_num_threads(1)  # before any operation: a fork waits for the threads that OpenMP had here, for ever
    for name in modules:
        importlib.import_module(name)
    before = sys.stdout, sys.stderr
    words = ["train", "model=mlp", "model.hidden=[8]", "data=breast_cancer", "trainer.max_epochs=1", "logger=[csv]"]
    with (folder / "warm.out").open("w") as output, contextlib.chdir(folder):
        sys.stdout = sys.stderr = output
        code = _called([*words, "strategy=cpu", "hydra.run.dir=warm"])
    sys.stdout, sys.stderr = before
    if code:
        sys.exit((folder / "warm.out").read_text())
    for place, (owner, name, is_after) in PLACES.items():
        setattr(owner, name, _counted(place, getattr(owner, name), is_after=is_after))
    Hydra.get_mode = lambda *_, **__: RunMode.RUN  # type: ignore[method-assign]  # it composes all of it to find that out
    launch.subprocess = SimpleNamespace(Popen=Rank, TimeoutExpired=subprocess.TimeoutExpired)  # type: ignore[attr-defined]
    launch._program = list
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a thread of this process would be missing in its forks"
    gc.collect()
    gc.freeze()


def started(words: Sequence[str], output: Path, stop: Stop | None, seconds: float, *, draws: bool = True) -> int:
    """Return the exit code of `espalier WORDS` in a fork once nothing of it is left; 124 if it hung.

    How often it passed which place lies beside the output, with the suffix `.json`.
    """
    global _draws
    _draws = draws
    output.with_suffix(".json").unlink(missing_ok=True)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # what its processes leave behind becomes ours
    number = os.fork()
    if not number:
        _child(words, {}, output, stop)
    code = _waited(number, time.monotonic() + seconds)
    if code is None:
        code = TIMED_OUT
    while left := _children():
        for orphan in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(orphan, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, 0)
    return code


def end_with_parent() -> None:
    """See to it that this process does not outlive the one that forked it."""
    ctypes.CDLL(None).prctl(launch.PR_SET_PDEATHSIG, signal.SIGKILL)


def passed(output: Path) -> Counter[str]:
    """How often a run passed each place."""
    file = output.with_suffix(".json")
    return Counter(json.loads(file.read_text())) if file.exists() else Counter()


class Rank:
    """What `launch.py` needs of `subprocess.Popen`, as a fork of the process that starts the ranks."""

    def __init__(self, words: Sequence[str], env: Mapping[str, str], start_new_session: bool) -> None:
        assert start_new_session
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            _child(words, env, None, _stop)

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        if self.returncode is None:
            self.returncode = _waited(self.pid, 0)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Return the exit code.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        self.returncode = _waited(self.pid, time.monotonic() + timeout) if self.returncode is None else self.returncode
        if self.returncode is None:
            raise subprocess.TimeoutExpired("rank", timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it."""
        os.kill(self.pid, number)


def _waited(number: int, until: float) -> int | None:
    """Return the exit code of a child, None if it still runs then."""
    while True:
        found, status = os.waitpid(number, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(POLL_SECONDS)


def _children() -> list[int]:
    return [int(word) for word in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def _child(words: Sequence[str], environment: Mapping[str, str], output: Path | None, stop: Stop | None) -> NoReturn:
    """Be a new process of the command line."""
    global _stop, _counts
    code = 1
    try:
        os.setsid()
        end_with_parent()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.environ.update(environment)
        if output:
            _counts = output.with_suffix(".json")
            descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False, buffering=1) for number in (1, 2))  # noqa: SIM115
        random.seed()  # as no two processes have the same
        np.random.seed()
        rank_zero_only.rank = int(os.environ.get("LOCAL_RANK", "0"))
        _stop = stop
        _passed.clear()
        code = _called(words)
        if _passed["start"] and not rank_zero_only.rank and (_passed[STOPPED] or not _counts.exists()):
            _tell()  # unless a rank that was stopped has; and not of the process that starts the ranks
        threading._shutdown()  # what is written in the background
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _called(words: Sequence[str]) -> int:
    sys.argv = ["espalier", *words]
    sys.orig_argv = list(sys.argv)
    GlobalHydra.instance().clear()
    try:
        entry.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _counted(place: str, whole: Callable[..., Any], *, is_after: bool) -> Callable[..., Any]:
    """Return the function, which is passed once more with every call."""

    @wraps(whole)
    def counted(*args: Any, **kwargs: Any) -> Any:
        if not is_after:
            _pass(place)
        result = whole(*args, **kwargs) if _draws or place != "figures" else None
        if is_after:
            _pass(place)
        return result

    return counted


def _pass(place: str) -> None:
    _passed[place] += 1
    if _stop and (_stop.place, _stop.count, _stop.rank) == (place, _passed[place], rank_zero_only.rank):
        _passed[STOPPED] = 1
        _tell()
        number = getattr(signal, _stop.signal)
        if _stop.is_whole and launch.is_rank():
            os.kill(int(os.environ[launch.PARENT]), number)
        if number == signal.SIGKILL or not (_stop.is_whole and launch.is_rank()):
            os.kill(os.getpid(), number)


def _tell() -> None:
    assert _counts
    _counts.write_text(json.dumps(_passed))
