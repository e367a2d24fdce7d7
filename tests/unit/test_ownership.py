"""Who may use a run folder: the kernel's lock, the line in its file, and what counts as results."""

import errno
import fcntl
import json
import os
import shlex
import signal
import socket
from pathlib import Path

import pytest

from espalier.errors import ConfigError
from espalier.runs import ownership
from espalier.runs.ownership import LOCK, locked, require_unused
from helpers.holder import another_process_holds


def left_by(folder: Path, **changes: object) -> None:
    """The file of a process that ended without removing it."""
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": "2026-01-01 00:00:00+00:00", "clock": 1}
    (folder / LOCK).write_text(json.dumps(holder | changes))


def test_a_second_process_is_told_who_has_the_folder(tmp_path: Path):
    with another_process_holds(tmp_path) as pid:
        with pytest.raises(ConfigError) as refused, locked(tmp_path):
            pass
        assert f"in use by process {pid} on {socket.gethostname()} since 20" in str(refused.value)
        assert (tmp_path / LOCK).exists(), "the refused one has removed the lock of the other"


def test_a_process_that_was_killed_is_no_obstacle(tmp_path: Path):
    with another_process_holds(tmp_path):
        pass
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_fork_of_the_holder_does_not_keep_the_folder(tmp_path: Path):
    """As a worker of a data loader, which may outlive a killed trainer by seconds."""
    ready, told = os.pipe()
    if (holder := os.fork()) == 0:
        try:
            with locked(tmp_path):
                if (worker := os.fork()) == 0:
                    signal.pause()
                os.write(told, str(worker).encode())
                signal.pause()
        finally:
            os._exit(1)
    worker = int(os.read(ready, 20))
    try:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        with locked(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_of_many_processes_one_has_the_folder_at_a_time(tmp_path: Path):
    def work() -> None:
        for _ in range(40):
            try:
                with locked(tmp_path):
                    (tmp_path / "inside").touch(exist_ok=False)  # raises if another is in there
                    (tmp_path / "inside").unlink()
            except ConfigError:
                pass

    children = []
    for _ in range(4):
        if (child := os.fork()) == 0:
            try:
                work()
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_another_machine_is_named_with_what_removes_it(tmp_path: Path):
    folder = tmp_path / "o'brien & co"
    folder.mkdir()
    left_by(folder, host="elsewhere", pid=7)
    with pytest.raises(ConfigError) as refused, locked(folder):
        pass
    line = str(refused.value)
    assert "in use by process 7 on elsewhere since 2026-01-01 00:00:00+00:00, another machine" in line
    assert shlex.split(line.partition("say: ")[2]) == ["rm", str(folder / LOCK)]


def test_a_job_that_slurm_has_started_again_elsewhere_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    left_by(tmp_path, host="elsewhere", job="123", restarts=1)
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(ConfigError), locked(tmp_path):  # another step of the same job
        pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with locked(tmp_path):
        pass


@pytest.mark.parametrize(
    ("changes", "is_refused"),
    [
        ({"clock": ownership._clock(os.getpid())}, True),
        ({"clock": 1}, False),  # the number was given to a process that began later
        ({"pid": 2**22 + 1}, False),  # above the largest that Linux gives
        ({"pid": "7"}, False),
    ],
)
def test_without_locks_of_the_file_system_a_living_process_is_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], is_refused: bool
):
    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    left_by(tmp_path, **changes)
    if is_refused:
        with pytest.raises(ConfigError, match=f"process {os.getpid()}"), locked(tmp_path):
            pass
    else:
        with locked(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"{}", b'{"pid": 1}', b'"' + b"x" * 5000])
def test_a_lock_file_that_says_nothing_is_taken_over(tmp_path: Path, content: bytes):
    (tmp_path / LOCK).write_bytes(content)
    with locked(tmp_path):
        pass


def test_an_error_within_leaves_no_lock(tmp_path: Path):
    with pytest.raises(KeyError), locked(tmp_path / "new"):
        raise KeyError
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    "file", ["report.json", "metrics.csv", "checkpoints/best.ckpt", "export/bundle.json", "predictions/manifest.json"]
)
def test_what_a_run_has_left_is_not_overwritten(tmp_path: Path, file: str):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(ConfigError, match=f"holds a run already .*{file}.*resume=auto"):
        require_unused(tmp_path, "train")
    with pytest.raises(ConfigError, match=r"already \([^)]*\); choose another folder"):
        require_unused(tmp_path, "evaluate")


def test_a_run_that_never_trained_has_left_nothing(tmp_path: Path):
    for name in ("run.log", "config.yaml", "overrides.yaml", "provenance.json", LOCK):
        (tmp_path / name).touch()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".best.ckpt.partial").touch()
    require_unused(tmp_path, "train")


def test_predict_goes_on_in_its_own_folder_alone(tmp_path: Path):
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "part-00000.parquet").touch()
    with pytest.raises(ConfigError):
        require_unused(tmp_path, "predict")
    (tmp_path / "predictions" / "manifest.json").touch()
    require_unused(tmp_path, "predict")


def test_a_start_that_may_repeat_itself_spares_what_is_finished_or_can_go_on(tmp_path: Path):
    (tmp_path / "metrics.csv").touch()
    require_unused(tmp_path, "train", may_begin_again=True)
    (tmp_path / "report.json").touch()
    with pytest.raises(ConfigError, match="a finished run without a checkpoint"):
        require_unused(tmp_path, "train", may_begin_again=True)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(ConfigError, match="has begun here meanwhile; start the same command again"):
        require_unused(tmp_path, "train", may_begin_again=True)
