"""Checkpoints reach the disk whole, damaged ones are recognised, and the one before the last steps in."""

import errno
import logging
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from espalier.callbacks.best_and_last import BestAndLast
from espalier.errors import ConfigError, EspalierError
from espalier.runs import checkpoint, storage
from espalier.runs.checkpoint import CheckpointIO
from espalier.spec import DataSpec

SPEC = DataSpec.single("toy", (4,), 1.0, (0.0,) * 4, (1.0,) * 4, ("no", "yes"), (3, 5))
NAMES = ("last.ckpt", "previous.ckpt")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def writer() -> CheckpointIO:
    """That of a process of its own."""
    return CheckpointIO({"seed": 0}, SPEC, [])


def save(run: Path, step: int, io: CheckpointIO | None = None, name: str = "last.ckpt") -> None:
    content = {"state_dict": {"model.w": torch.full((3,), float(step))}, "global_step": step}
    (io or writer()).save_checkpoint(content, run / "checkpoints" / name)


def step(run: Path) -> int:
    return checkpoint.load_run("resume", str(run), NAMES).content["global_step"]


def spoil(path: Path) -> None:
    """Change one byte of a tensor, where no reader of archives looks."""
    whole = bytearray(path.read_bytes())
    place = whole.index(torch.load(path, weights_only=True)["state_dict"]["model.w"].numpy().tobytes())
    whole[place] ^= 1
    path.write_bytes(whole)


def full(file: int) -> None:
    """Takes the place of `os.fsync` on a disk without room."""
    raise OSError(errno.ENOSPC, "No space left on device")


class KilledError(BaseException):
    """Stands for a kill -9: nothing that catches errors catches it, and what `finally` mends is put back."""


def verdicts(run: Path) -> list[str]:
    """Of the standard tool."""
    done = subprocess.run(
        ["sha256sum", "-c", "SHA256SUMS"], cwd=run / "checkpoints", capture_output=True, text=True, check=False
    )
    return done.stdout.split()


def test_the_hashes_are_those_of_the_standard_tool(run: Path):
    io = writer()
    for number in range(3):
        save(run, number, io)
    save(run, 2, io, "best.ckpt")
    assert verdicts(run) == ["best.ckpt:", "OK", "last.ckpt:", "OK", "previous.ckpt:", "OK"]


def test_the_last_two_are_kept(run: Path):
    io = writer()
    for number in range(4):
        save(run, number, io)
    kept = {path.name: torch.load(path, weights_only=True)["global_step"] for path in run.glob("checkpoints/*.ckpt")}
    assert kept == {"last.ckpt": 3, "previous.ckpt": 2}


@pytest.mark.parametrize("harm", ["a byte", "cut off", "empty", "gone"])
def test_for_a_damaged_last_one_that_before_it_steps_in_with_one_warning(
    run: Path, harm: str, caplog: pytest.LogCaptureFixture
):
    io = writer()
    save(run, 1, io)
    save(run, 2, io)
    last = run / "checkpoints" / "last.ckpt"
    if harm == "a byte":
        spoil(last)
    elif harm == "gone":
        last.unlink()
    else:
        last.write_bytes(last.read_bytes()[: 900 if harm == "cut off" else 0])
    with caplog.at_level(logging.WARNING):
        assert step(run) == 1
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == (harm != "gone")
    assert all("last.ckpt: damaged" in line and "going on from previous.ckpt, step 1" in line for line in warnings)


def test_a_damaged_last_one_does_not_replace_the_whole_one_before_it(run: Path):
    io = writer()
    save(run, 1, io)
    save(run, 2, io)
    spoil(run / "checkpoints" / "last.ckpt")
    save(run, 2)  # by the run that went on from step 1
    spoil(run / "checkpoints" / "last.ckpt")
    assert step(run) == 1


def test_two_damaged_ones_are_an_error(run: Path):
    io = writer()
    save(run, 1, io)
    save(run, 2, io)
    for name in NAMES:
        spoil(run / "checkpoints" / name)
    with pytest.raises(ConfigError, match=r"previous\.ckpt: damaged, its sha256 is not the one in SHA256SUMS"):
        step(run)


def test_the_best_one_is_never_replaced_by_another(run: Path):
    save(run, 1)
    save(run, 1, name="best.ckpt")
    spoil(run / "checkpoints" / "best.ckpt")
    with pytest.raises(ConfigError, match=r"best\.ckpt: damaged"):
        checkpoint.load_run("source", str(run), ("best.ckpt", *NAMES))


def test_a_file_that_was_moved_away_from_its_hashes_is_read(run: Path, tmp_path: Path):
    save(run, 3)
    shutil.copy(run / "checkpoints" / "last.ckpt", tmp_path / "alone.ckpt")
    assert checkpoint.load("source", tmp_path / "alone.ckpt").content["global_step"] == 3


def test_a_second_name_is_as_good_as_a_second_writing(run: Path):
    io = writer()
    for number in (1, 2):
        save(run, number, io)
    save(run, 3, io, "best.ckpt")
    for _ in range(2):  # a second time, too, when both names belong to one file already
        io.save_again(run / "checkpoints" / "best.ckpt", run / "checkpoints" / "last.ckpt")
        assert step(run) == 3
        assert verdicts(run) == ["best.ckpt:", "OK", "last.ckpt:", "OK", "previous.ckpt:", "OK"]
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == sorted(
            [*NAMES, "best.ckpt", "SHA256SUMS"]
        )
    save(run, 4, io, "best.ckpt")
    assert step(run) == 3


@pytest.mark.parametrize(
    "way",
    [
        lambda run, io: save(run, 3, io),
        lambda run, io: io.save_again(run / "checkpoints" / "best.ckpt", run / "checkpoints" / "last.ckpt"),
    ],
    ids=["write", "link"],
)
@pytest.mark.parametrize("call", range(12))
def test_a_kill_between_any_two_operations_leaves_a_last_one_that_reads_and_no_work_to_do(
    run: Path, call: int, way: Callable[[Path, CheckpointIO], None], monkeypatch: pytest.MonkeyPatch
):
    """Each operation that changes the folder is the last one in turn: open, sync, link, rename."""
    io, count = writer(), 0
    for number in (1, 2):
        save(run, number, io)
    save(run, 3, io, "best.ckpt")

    def dying(whole):
        def operation(*args, **kwargs):
            nonlocal count
            count += 1
            if count > call:
                raise KilledError
            return whole(*args, **kwargs)

        return operation

    with monkeypatch.context() as patch:
        for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "hardlink_to"), (Path, "open"), (Path, "unlink")):
            patch.setattr(owner, name, dying(getattr(owner, name)))
        with pytest.raises(KilledError):
            way(run, io)
    last = checkpoint.load("resume", run / "checkpoints" / "last.ckpt")
    assert last.content["global_step"] in (2, 3)
    assert checkpoint.load("source", run / "checkpoints" / "best.ckpt").content["global_step"] == 3
    for number in (4, 5):
        save(run, number)  # by the next process
    assert step(run) == 5
    spoil(run / "checkpoints" / "last.ckpt")
    assert step(run) == 4


def test_too_little_room_is_said_before_anything_is_written(run: Path, monkeypatch: pytest.MonkeyPatch):
    save(run, 1)
    usage = shutil.disk_usage(run)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=11))
    before = {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir()}
    with pytest.raises(EspalierError, match=r"0\.0 MB are needed and 0\.0 MB are free.*Make room, then go on with"):
        save(run, 2)
    assert {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir()} == before


def test_another_reason_is_not_a_lack_of_room(run: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(file: int) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(EspalierError, match=r"not written, Permission denied; .* Mend that, then go on with"):
        save(run, 1)


def test_a_checkpoint_in_the_background_holds_what_was_there_when_it_was_asked_for(
    run: Path, monkeypatch: pytest.MonkeyPatch
):
    weight, may_go_on, whole = torch.ones(3), threading.Event(), os.fsync

    def slow(file: int) -> None:
        assert may_go_on.wait(10)
        whole(file)

    monkeypatch.setattr(os, "fsync", slow)
    io = writer()
    io.is_asynchronous = True
    settings = {"lr": 0.1}
    io.save_checkpoint({"state_dict": {"model.w": weight}, "settings": settings}, run / "checkpoints" / "last.ckpt")
    weight.zero_()  # training goes on
    settings["lr"] = 0.2
    assert not (run / "checkpoints" / "last.ckpt").exists()
    may_go_on.set()
    io.teardown()
    content = checkpoint.load("source", run / "checkpoints" / "last.ckpt").content
    assert content["state_dict"]["model.w"].tolist() == [1, 1, 1]
    assert content["settings"] == {"lr": 0.1}


def test_an_error_in_the_background_ends_the_run_at_the_next_save(run: Path, monkeypatch: pytest.MonkeyPatch):
    io = writer()
    io.is_asynchronous = True
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        save(run, 1, io)
        with pytest.raises(EspalierError, match="No space left on device"):
            save(run, 2, io)


def test_what_was_not_written_in_the_background_gets_no_second_name(run: Path, monkeypatch: pytest.MonkeyPatch):
    io, best = writer(), run / "checkpoints" / "best.ckpt"
    save(run, 1, io, "best.ckpt")
    save(run, 2, io)
    io.is_asynchronous = True
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        save(run, 3, io, "best.ckpt")
        io.save_again(best, run / "checkpoints" / "last.ckpt")
        with pytest.raises(EspalierError, match=r"best\.ckpt: not written, No space left on device"):
            io.teardown()
    assert step(run) == 2


@pytest.mark.parametrize("address", ["memory://bucket/run", "file://{folder}/bucket/run"])
def test_a_mirror_holds_the_same_files(run: Path, tmp_path: Path, address: str):
    io, there = writer(), address.format(folder=tmp_path)
    io.mirror = storage.Mirror(there)
    for number in (1, 2, 3):
        save(run, number, io)
    files, root = fsspec.core.url_to_fs(there)
    assert {name.rpartition("/")[2] for name in files.ls(root, detail=False)} == {*NAMES, "SHA256SUMS"}
    files.get(root, str(tmp_path / "back" / "checkpoints"), recursive=True)
    assert step(tmp_path / "back") == 3
    spoil(tmp_path / "back" / "checkpoints" / "last.ckpt")
    assert step(tmp_path / "back") == 2


class CutOff:
    """A file system that is gone after so many operations."""

    def __init__(self, files: Any, left: int) -> None:
        self.files, self.left = files, left

    def __getattr__(self, name: str) -> Any:
        def operation(*args: Any, **kwargs: Any) -> Any:
            if not self.left:
                raise ConnectionError("gone")
            self.left -= 1
            return getattr(self.files, name)(*args, **kwargs)

        return operation


def test_a_mirror_that_is_cut_off_anywhere_holds_only_what_loads(run: Path, tmp_path: Path):
    """Without the hidden files, as `cp mirror/*` and `source=ADDRESS` leave them behind."""
    for left in count():
        io, there = writer(), f"memory://bucket/cut{left}"
        io.mirror = mirror = storage.Mirror(there)
        whole = mirror.files
        for number in (1, 2):
            save(run, number, io)
            io.save_again(run / "checkpoints" / "last.ckpt", run / "checkpoints" / "best.ckpt")
        mirror.files = CutOff(whole, left)
        save(run, 3, io)
        io.save_again(run / "checkpoints" / "last.ckpt", run / "checkpoints" / "best.ckpt")
        was_cut, mirror.files = mirror.files.left == 0, whole
        for is_later in (False, True):  # and after the next one, which arrived
            if is_later:
                save(run, 4, io)
            back = tmp_path / f"back{left}{is_later}"
            back.mkdir()
            for name in whole.ls(mirror.root, detail=False):
                if not name.rpartition("/")[2].startswith("."):
                    whole.get_file(name, str(back / name.rpartition("/")[2]))
            files = sorted(back.glob("*.ckpt"))
            assert [file.name for file in files] == ["best.ckpt", "last.ckpt", "previous.ckpt"]
            assert [file.name for file in files if storage.is_damaged(file)] == [], left
        if not was_cut:
            break
    assert left > 10


def test_a_mirror_loses_what_was_replaced_as_the_folder_does(run: Path, tmp_path: Path):
    io = writer()
    io.mirror = storage.Mirror(f"file://{tmp_path}/away/checkpoints")
    for name in ("best-1.ckpt", "best-2.ckpt", "last.ckpt"):
        save(run, 1, io, name)
    io.remove_checkpoint(run / "checkpoints" / "best-1.ckpt")
    assert not (tmp_path / "away" / "checkpoints" / "best-1.ckpt").exists()
    assert verdicts(tmp_path / "away") == ["best-2.ckpt:", "OK", "last.ckpt:", "OK"]


def test_a_mirror_that_is_out_of_reach_costs_a_warning_and_no_checkpoint(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "in_the_way").touch()
    io = writer()
    io.mirror = storage.Mirror(f"file://{tmp_path}/in_the_way/run")
    save(run, 1, io)
    assert step(run) == 1
    [line] = [record.getMessage() for record in caplog.records]
    assert "last.ckpt: not copied to" in line
    assert "training goes on" in line


@pytest.mark.parametrize(("address", "reason"), [("gopher://x/y", "Protocol not known: gopher"), ("s3://x/y", "s3fs")])
def test_a_mirror_that_nothing_reaches_is_refused_at_the_start(address: str, reason: str):
    with pytest.raises(ConfigError, match=rf"^callbacks\.checkpoint\.mirror={address}: .*{reason}"):
        storage.Mirror(address)


def test_saving_within_an_epoch_needs_a_last_checkpoint(tmp_path: Path):
    words = {"filename": "best", "save_top_k": 1, "save_last": False, "every_n_epochs": 1, "every_n_minutes": None}
    words |= {"asynchronous": False, "mirror": None, "auto_insert_metric_name": False, "enable_version_counter": False}
    with pytest.raises(ValueError, match="save_last=true"):
        BestAndLast(tmp_path, "val/accuracy", "max", every_n_steps=5, **words)
