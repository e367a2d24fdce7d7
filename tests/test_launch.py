"""A rank that dies, raises or hangs ends the whole run in time, with its cause in the last line and no orphan."""

import re
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import QUICK, Command, launch
from espalier.config.compose import compose
from espalier.errors import EspalierError, StoppedError
from espalier.processes.launch import Rank
from espalier.processes.signals import InterruptedByUserError, heeded
from espalier.run import Run
from espalier.validate import num_processes, prepare

RANKS = """
import os, signal, subprocess, sys, time
from pathlib import Path
from espalier.processes import launch, signals
from espalier.errors import DivergedError, EspalierError, StoppedError

GLOO = "[unbound_buffer.cc:81] "
RAISED = {
    "raise": ValueError("the moon is wrong"),
    "lost": RuntimeError(GLOO + "Connection closed by peer [127.0.0.1]:4017"),
    "waited": RuntimeError(GLOO + "Timed out waiting 8000ms for recv operation to complete"),
    "closed": RuntimeError("Application timeout caused pair closure"),
    "unjoined": RuntimeError("Timed out after 9 seconds waiting for clients. 1/2 clients joined."),
    "diverged": DivergedError("diverged at step 5"),
    "stopped": StoppedError("stopped by SIGTERM after step 5"),
}
launch.GRACE_SECONDS = 2.0

def misbehave(fault):
    if fault != "wait":
        subprocess.Popen(["sleep", "300"])  # as a worker of a data loader, left behind
    if fault in RAISED:
        raise RAISED[fault]
    if fault == "wait":
        with signals.heeded("train"):
            Path(f"waits_{os.environ['LOCAL_RANK']}").touch()
            time.sleep(60)
    if fault == "exit":
        os._exit(7)
    if fault.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, fault))

try:
    if launch.is_rank():
        launch.end_with_parent()
        if (fault := sys.argv[1 + int(os.environ["LOCAL_RANK"])]) != "done":
            misbehave(fault)
    else:
        launch.launch(sys.argv[1:], len(sys.argv) - 1)
except Exception as error:
    if launch.is_rank():
        launch.leave_note(error, with_traceback=not isinstance(error, EspalierError))
    else:
        print(f"espalier: {error}", file=sys.stderr)
    sys.exit(getattr(error, "exit_code", 1))
"""


def processes(folder: Path) -> list[int]:
    """Those that run in the folder: that were started there, or by one that was."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            is_ours = (entry / "cwd").readlink() == folder
        except OSError:  # of another user, or gone
            continue
        if is_ours:
            found.append(int(entry.name))
    return found


def start(folder: Path, *faults: str) -> subprocess.Popen[str]:
    """One small process per fault, watched by one more."""
    (folder / "ranks.py").write_text(RANKS)
    command = [sys.executable, "ranks.py", *faults]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("faults", "line", "code"),
    [
        (["SIGKILL", "lost"], "rank 0: killed by SIGKILL (out of memory?)", 1),
        (["lost", "SIGSEGV"], "rank 1: killed by SIGSEGV", 1),
        (["lost", "raise"], "rank 1: ValueError: the moon is wrong", 1),
        (["raise", "wait"], "rank 0: ValueError: the moon is wrong", 1),
        (["SIGABRT", "raise"], "rank 1: ValueError: the moon is wrong", 1),
        (["exit", "lost"], "rank 0: ended with exit code 7", 7),
        (["waited", "SIGSTOP"], "rank 1 has not answered for 8 s, so rank 0 gave up", 1),
        (["closed", "SIGSTOP"], "rank 1 has not answered, so rank 0 gave up", 1),
        (["SIGSTOP", "unjoined", "wait"], "ranks 0, 2 have not answered for 9 s, so rank 1 gave up", 1),
        (["lost", "diverged"], "rank 1: diverged at step 5", 4),
        (["diverged", "diverged"], "diverged at step 5", 4),
        (["lost", "stopped"], "stopped by SIGTERM after step 5", 75),
    ],
)
def test_the_last_line_names_the_first_cause_and_no_process_is_left(
    tmp_path: Path, faults: list[str], line: str, code: int
):
    watching = start(tmp_path, *faults)
    _, err = watching.communicate(timeout=60)
    assert err.splitlines()[-1] == f"espalier: {line}"
    assert err.count("Traceback") == line.endswith(("moon is wrong", "gave up"))
    assert watching.returncode == code
    assert processes(tmp_path) == []


def test_ranks_that_end_well_leave_nothing_to_say(tmp_path: Path):
    watching = start(tmp_path, "done", "done")
    assert watching.communicate(timeout=60) == (None, "")
    assert watching.returncode == 0


@pytest.fixture
def waiting(tmp_path: Path) -> subprocess.Popen[str]:
    """Two ranks that can be stopped."""
    watching = start(tmp_path, "wait", "wait")
    while not all((tmp_path / f"waits_{rank}").exists() for rank in range(2)):
        assert watching.poll() is None
        time.sleep(0.05)
    return watching


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_reaches_all_ranks(tmp_path: Path, waiting: subprocess.Popen[str], name: str):
    waiting.send_signal(getattr(signal, name))
    _, err = waiting.communicate(timeout=60)
    assert err == f"espalier: stopped by {name} before training began; nothing was lost\n"
    assert waiting.returncode == StoppedError.exit_code


def test_a_signal_before_a_rank_listens_is_not_lost(tmp_path: Path):
    watching = start(tmp_path, "wait", "wait")
    while len(processes(tmp_path)) < 3:
        assert watching.poll() is None
    watching.send_signal(signal.SIGTERM)
    _, err = watching.communicate(timeout=60)
    assert err == "espalier: stopped by SIGTERM before training began; nothing was lost\n"
    assert watching.returncode == StoppedError.exit_code


def test_a_rank_that_is_ended_by_a_timer_after_a_signal_was_stopped_by_that_signal(tmp_path: Path):
    rank = object.__new__(Rank)
    rank.number, rank.note, rank.ended_at, rank.was_ended = 0, tmp_path / "0.json", 1.0, False
    rank.process = SimpleNamespace(returncode=StoppedError.exit_code)  # type: ignore[assignment]
    failures = [rank.failure(received) for received in ([signal.SIGTERM], [])]
    assert [failure and failure.lines for failure in failures] == [
        "stopped by SIGTERM before or after training; what was saved is whole",
        "ended with exit code 75",
    ]


def test_no_rank_outlives_a_launcher_that_is_killed(tmp_path: Path, waiting: subprocess.Popen[str]):
    waiting.kill()
    waiting.communicate(timeout=30)  # until nobody holds its stderr
    assert processes(tmp_path) == []


@pytest.mark.parametrize(
    ("task", "name", "error"),
    [("train", "SIGTERM", StoppedError), ("compress", "SIGUSR1", StoppedError), ("export", "SIGINT", EspalierError)],
)
def test_a_signal_outside_of_training_ends_the_task(task: str, name: str, error: type[EspalierError]):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with pytest.raises(error, match=name), heeded(task):
        signal.raise_signal(getattr(signal, name))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


IMPORTED = """
import signal
try:
    signal.raise_signal(signal.SIGTERM)
except BaseException:
    pass
IS_WHOLE = True
"""


def test_a_signal_while_a_module_is_imported_waits_until_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "imported.py").write_text(IMPORTED)
    monkeypatch.syspath_prepend(str(tmp_path))

    def work() -> None:
        with heeded("train"):
            import_module("imported")
            time.sleep(30)

    with pytest.raises(StoppedError, match="SIGTERM"):
        work()
    assert import_module("imported").IS_WHOLE


SWALLOWING = """
import time
from espalier.processes import signals
signals.PATIENCE_SECONDS = 0.5
with signals.heeded("train"):
    try:
        print("listens", flush=True)
        time.sleep(60)
    except BaseException:
        time.sleep(60)
"""


def test_a_signal_that_something_swallows_ends_the_process_all_the_same(tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, "-c", SWALLOWING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "listens\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert err == "espalier: ended by SIGTERM; what was saved before is whole\n"
    assert process.returncode == StoppedError.exit_code


def test_ctrl_c_in_another_task_has_the_exit_code_of_shells():
    assert InterruptedByUserError.exit_code == 130


def test_a_run_that_is_stopped_before_it_trains_leaves_no_folder(
    espalier: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = Run.fit

    def fit(self: Run) -> Path | None:
        signal.raise_signal(signal.SIGTERM)
        return whole(self)

    monkeypatch.setattr(Run, "fit", fit)
    done = espalier("train", "model=mlp", *QUICK)
    assert done.code == StoppedError.exit_code
    assert done.err == "espalier: stopped by SIGTERM before training began; nothing was lost\n"
    assert not list(tmp_path.glob("logs/*/*"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["strategy=cpu"], 1),
        (["strategy=ddp_cpu"], 2),
        (["strategy=ddp_cpu", "trainer.strategy=ddp"], 2),
        (["strategy=cpu", "trainer.devices=2"], 2),  # Lightning takes its own ddp then
        (["strategy=cpu", "trainer.devices='2'"], 2),
        (["strategy=ddp_cpu", "trainer.num_nodes=2"], 1),
    ],
)
def test_a_run_on_several_devices_takes_a_process_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], expected: int
):
    for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):  # of a launcher that knows the other machine
        monkeypatch.setenv(name, "0")
    assert num_processes(prepare(compose(words), words, tmp_path, "train")) == expected
    assert num_processes(prepare(compose(words), words, tmp_path, "export")) == 1


def test_a_wrong_input_to_several_processes_is_one_line_and_no_folder(tmp_path: Path):
    done = launch(tmp_path, "espalier.cli", "train", "strategy=ddp_cpu", "data.batch_size=0")
    assert done.returncode == 2
    assert done.stderr == "espalier: data.batch_size=0: should be greater than or equal to 1\n"
    assert not list(tmp_path.glob("logs/*/*"))


FAULTY = """
import os, signal
from espalier import cli
from espalier.learners.learner import Learner
whole = Learner.training_step

def training_step(self, data, batch_idx):
    if (self.current_epoch, batch_idx, self.global_rank) == (1, 3, 1):
        if os.environ["FAULT"] == "raise":
            raise ValueError("the moon is wrong")
        os.kill(os.getpid(), signal.SIGSTOP)
    return whole(self, data, batch_idx)

Learner.training_step = training_step
cli.main()
"""


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        pytest.param("raise", "rank 1: ValueError: the moon is wrong", marks=pytest.mark.slow),
        ("stop", "rank 1 has not answered( for 4 s)?, so rank 0 gave up"),  # gloo says how long where it can
    ],
)
def test_a_training_ends_with_the_rank_that_fails(tmp_path: Path, fault: str, line: str):
    (tmp_path / "faulty.py").write_text(FAULTY)
    words = ("model=mlp", "model.hidden=[16]", *QUICK, "strategy=ddp_cpu", "trainer.strategy.timeout_seconds=4")
    done = launch(tmp_path, "faulty", "train", *words, FAULT=fault)
    assert re.fullmatch(f"espalier: {line}", done.stderr.splitlines()[-1])
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert processes(tmp_path) == []
