"""Wherever a training is cut, in whichever folder it goes on, and whatever ends it: it ends as if never stopped."""

import contextlib
import os
import pty
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import Command, command
from espalier.data.loaders import Batch
from espalier.errors import StoppedError
from espalier.learners.learner import Learner
from espalier.processes.signals import heeded
from espalier.processes.stop_signal import HANGUP, Interrupt, heard, leave_terminal
from espalier.runs.checkpoint import CheckpointIO
from test_resume import CrashError, measured, rows, tensors

TINY = (  # 5 batches an epoch, 4 of validation
    *("data=breast_cancer", "data.batch_size=64", "model=mlp", "model.hidden=[4]", "optimizer.lr=0.02"),
    *("callbacks=[checkpoint,monitor]", "logger=[csv]", "trainer.log_every_n_steps=3"),
)
WITHIN = ("trainer.max_epochs=3", "+trainer.val_check_interval=4", "callbacks.checkpoint.every_n_steps=2")
TOP = ("callbacks.checkpoint.save_top_k=2", "callbacks.checkpoint.filename='best-{epoch}-{step}'")
STOPPING = ("callbacks=[checkpoint,monitor,early_stopping]", "callbacks.early_stopping.patience=1")
PLATEAU = ("scheduler=plateau", "scheduler.patience=0", "scheduler.threshold=0.5")
UNEVEN = ("trainer.accumulate_grad_batches=3", "+trainer.val_check_interval=2", "callbacks.checkpoint.every_n_steps=1")
# What decides when validations and checkpoints come, and a save after which a crash used to cost something.
CASES: dict[str, tuple[tuple[str, ...], int]] = {
    "validation within the epoch": (WITHIN, 2),
    "max_steps": (("trainer.max_steps=13",), 2),
    "max_steps, ended by a validation": (("trainer.max_steps=14", *WITHIN[1:], "trainer.max_epochs=-1"), 9),
    "validation between batches of a step": (("trainer.max_epochs=3", *UNEVEN, *TOP), 3),
    "validation every second epoch": (
        ("trainer.max_epochs=3", "trainer.check_val_every_n_epoch=2", *PLATEAU, "callbacks.checkpoint.every_n_steps=4"),
        4,
    ),
    "early stopping": ((*STOPPING, "optimizer.lr=1e-9", "trainer.max_epochs=9"), 3),
}


def crashing_after(num_saves: int, folder: Path, *words: str) -> int:
    """Train until so many checkpoints are written, links to one included; how many were."""
    written: list[str] = []

    def counted(save: Callable[..., None]) -> Callable[..., None]:
        def saved(self: CheckpointIO, *arguments: object, **more: object) -> None:
            save(self, *arguments, **more)
            written.append(str(arguments[-1]))
            if len(written) == num_saves:
                raise CrashError

        return saved

    with pytest.MonkeyPatch.context() as patch:
        for name in ("save_checkpoint", "save_again"):
            patch.setattr(CheckpointIO, name, counted(getattr(CheckpointIO, name)))
        with contextlib.suppress(CrashError):
            assert command(["train", *TINY, *words], folder).code == 0
    return len(written)


def differing(run: Path, other: Path) -> list[str]:
    """Everything in which the files of two runs differ, but for clocks and the checkpoint before the last."""
    files = [{path.name for path in (each / "checkpoints").iterdir()} - {"SHA256SUMS"} for each in (run, other)]
    found = sorted(files[0] ^ files[1])
    for name in sorted(files[0] & files[1] - {"previous.ckpt"}):
        if name == "BEST":
            found += [name] * ((run / "checkpoints" / name).read_text() != (other / "checkpoints" / name).read_text())
            continue
        now, then = (tensors(torch.load(each / "checkpoints" / name, weights_only=True)) for each in (run, other))
        found += [f"{name}{key}" for key in now.keys() ^ then.keys()]
        found += [f"{name}{key}" for key in now.keys() & then.keys() if not torch.equal(now[key], then[key])]
    found += ["metrics.csv"] * (rows(run) != rows(other)) + ["report.json"] * (measured(run) != measured(other))
    return found


def require_resumed_equal(espalier: Command, words: tuple[str, ...], num_saves: int) -> None:
    """Crash, move the folder, resume there."""
    crashing_after(num_saves, Path.cwd(), *words, f"hydra.run.dir=broken{num_saves}")
    run = Path(shutil.move(f"broken{num_saves}", f"moved{num_saves}"))
    done = espalier("train", f"resume={run}")
    assert done.code == 0, done.err
    assert "dirpath" not in done.err
    assert differing(run, Path("unbroken")) == [], num_saves


@pytest.mark.parametrize("case", CASES)
def test_a_crash_right_after_a_save_loses_nothing(espalier: Command, tmp_path: Path, case: str):
    words, num_saves = CASES[case]
    assert espalier("train", *TINY, *words, "hydra.run.dir=unbroken").code == 0
    require_resumed_equal(espalier, words, num_saves)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_crash_right_after_each_save_loses_nothing(espalier: Command, tmp_path: Path, case: str):
    words, _ = CASES[case]
    total = crashing_after(-1, tmp_path, *words, "hydra.run.dir=unbroken")
    assert total > 4
    for num_saves in range(2, total + 1):  # after the first there may be no last yet
        require_resumed_equal(espalier, words, num_saves)


def step(run: Path, name: str = "last.ckpt") -> int:
    return torch.load(run / "checkpoints" / name, weights_only=True)["global_step"]


def test_a_run_that_stopped_early_stays_stopped_and_says_so(espalier: Command, tmp_path: Path):
    words = ("train", *TINY, *CASES["early stopping"][0], "hydra.run.dir=run", "resume=auto")
    assert espalier(*words).code == 0
    run = tmp_path / "run"
    before = step(run), rows(run), measured(run)
    (run / "report.json").unlink()  # as a kill in the test or the figures leaves it
    for more in ((), ("trainer.max_epochs=30",)):
        done = espalier(*words, *more)
        assert done.code == 0
        assert "its training had stopped by itself, so no more is trained" in done.out
        assert (step(run), rows(run), measured(run)) == before
    assert "no longer the run it was: trainer.max_epochs 9 -> 30" in done.out


def test_a_best_that_somebody_took_away_is_said_and_another_one_is_chosen(espalier: Command, tmp_path: Path):
    crashing_after(9, tmp_path, *WITHIN, "hydra.run.dir=run")
    (tmp_path / "run" / "checkpoints" / "best.ckpt").unlink()
    done = espalier("train", "resume=run")
    assert done.code == 0, done.err
    assert "best.ckpt: not there any more; the best is chosen among those to come" in done.out + done.err
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").exists()


@pytest.mark.parametrize(
    ("words", "last"),
    [
        (("trainer.check_val_every_n_epoch=2",), 15),
        (("trainer.check_val_every_n_epoch=10",), 15),
        (("trainer.limit_val_batches=0",), 15),
        (("callbacks.checkpoint.every_n_epochs=2", "callbacks.checkpoint.every_n_steps=4"), 15),
        (("trainer.max_steps=13",), 13),
    ],
)
def test_the_last_checkpoint_of_a_finished_run_is_its_last_step(
    espalier: Command, tmp_path: Path, words: tuple[str, ...], last: int
):
    done = espalier("train", *TINY, "trainer.max_epochs=3", *words, "hydra.run.dir=run")
    assert done.code == 0, done.err
    assert step(tmp_path / "run") == last
    if words[0] == "trainer.limit_val_batches=0":
        assert "measured on last.ckpt, as no validation chose a best" in (tmp_path / "run" / "report.json").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("scheduler=plateau", "trainer.limit_val_batches=0"),
            "plateau: .* trainer.limit_val_batches=0 none",
        ),
        (("scheduler=plateau", "trainer.check_val_every_n_epoch=4"), "epoch=4 and 15 steps in all none takes place"),
        ((*STOPPING, "trainer.limit_val_batches=0"), "callbacks.early_stopping: follows the validation"),
        ((*STOPPING, "trainer.max_steps=3"), "callbacks.early_stopping: follows the validation"),
    ],
)
def test_what_follows_a_validation_that_never_comes_is_refused(
    espalier: Command, tmp_path: Path, words: tuple[str, ...], said: str
):
    done = espalier("train", *TINY, "trainer.max_epochs=3", *words, "hydra.run.dir=run")
    assert done.code == 2
    [line] = [line for line in done.err.splitlines() if line.startswith("espalier:")]
    assert re.search(said, line)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that keeps two best checkpoints, and whose best is not its last."""
    folder = tmp_path_factory.mktemp("top")
    torch.set_num_threads(1)
    words = ("trainer.max_epochs=4", "optimizer.lr=0.3", "scheduler=constant", *TOP)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert command(["train", *TINY, *words, "hydra.run.dir=top"], folder).code == 0
    return folder / "top"


def test_fewer_epochs_or_steps_than_done_are_one_line(espalier: Command, top: Path):
    for word, done in (("trainer.max_epochs=2", "epoch 4"), ("trainer.max_steps=7", "step 20")):
        refused = espalier("train", f"resume={top}", word)
        assert refused.code == 2
        assert refused.err.splitlines()[-1].startswith(f"espalier: {word}: this run is in {done} already; say at least")
        assert (top / "report.json").exists()


def test_a_source_is_the_best_that_was_recorded_whatever_it_is_called(espalier: Command, top: Path, tmp_path: Path):
    best = top / "checkpoints" / (top / "checkpoints" / "BEST").read_text().strip()
    [noted] = [line for line in (top / "report.json").read_text().splitlines() if "measured on" in line]
    assert f"measured on {best.name}, which had val/accuracy" in noted
    moved = Path(shutil.copytree(top, tmp_path / "moved"))
    done = espalier("evaluate", f"source={moved}", "logger=[csv]", "hydra.run.dir=evaluated")
    first = done.out.splitlines()[0]
    assert first.startswith(f"source: {moved}/checkpoints/{best.name}, val/accuracy 0.")
    assert first.rpartition(" ")[2] in noted
    assert measured(tmp_path / "evaluated") == measured(top)


def test_without_a_record_the_last_checkpoint_says_which_is_the_best(espalier: Command, top: Path, tmp_path: Path):
    best = (top / "checkpoints" / "BEST").read_text().strip()
    old = Path(shutil.copytree(top, tmp_path / "old"))
    (old / "checkpoints" / "BEST").unlink()
    done = espalier("evaluate", f"source={old}", "logger=[csv]")
    assert f"/{best}, val/accuracy 0." in done.out.splitlines()[0]
    assert "the best by last.ckpt, as nothing recorded it" in done.out.splitlines()[0]
    for path in (old / "checkpoints").glob("best*"):
        path.unlink()
    done = espalier("evaluate", f"source={old}", "logger=[csv]")
    assert done.out.splitlines()[0].endswith(f", as {best}, which was the best, is not there any more")
    assert "/last.ckpt, val/accuracy 0." in done.out.splitlines()[0]


def test_a_checkpoint_that_names_files_elsewhere_as_replaced_is_refused(espalier: Command, top: Path, tmp_path: Path):
    run = Path(shutil.copytree(top, tmp_path / "run"))
    (run / "checkpoints" / "SHA256SUMS").unlink()
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    [keeper] = [state for name, state in content["callbacks"].items() if name.startswith("BestAndLast")]
    keeper["replaced"] = ["../../precious"]
    torch.save(content, run / "checkpoints" / "last.ckpt")
    (run / "checkpoints" / "previous.ckpt").unlink()
    refused = espalier("train", f"resume={run}", "trainer.max_epochs=5")
    assert refused.code == 2
    assert "it names the file '../../precious', outside of its folder" in refused.err


def test_a_resumed_run_takes_its_own_values_and_says_what_makes_it_another_run(espalier: Command, top: Path):
    done = espalier("train", f"resume={top}", "data.batch_size=64", "trainer.max_steps=20", "trainer.profiler=null")
    assert done.code == 0, done.err
    assert done.out.splitlines()[1].startswith(f"resume: {top}/checkpoints/last.ckpt, val/accuracy 0.")
    assert done.out.splitlines()[2] == "goes on, but is no longer the run it was: trainer.max_steps -1 -> 20"
    for word, differing in (
        ("data.batch_size=32", "data differs"),
        ("experiment=digits_cnn", "data, model, optimizer"),
    ):
        refused = espalier("train", f"resume={top}", word)
        assert refused.code == 2
        assert f"{word}: resume continues the run as it was configured and {differing}" in refused.err


def test_a_closed_terminal_stops_it_like_sigterm_and_it_goes_on(
    espalier: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = Learner.training_step

    def training_step(self: Learner, batch: Batch, batch_idx: int) -> torch.Tensor:
        if self.global_step == 7:
            os.kill(os.getpid(), signal.SIGHUP)
        return whole(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "training_step", training_step)
        done = espalier("train", *TINY, "trainer.max_epochs=2", "hydra.run.dir=run")
    assert done.code == 75
    told = f"espalier: stopped by SIGHUP after step 8; go on with: espalier train resume={tmp_path}/run"
    assert done.err.splitlines()[-1] == told
    assert step(tmp_path / "run") == 8


def test_a_signal_in_the_last_hooks_of_a_training_still_stops_it(
    espalier: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = Learner.on_train_epoch_end

    def on_train_epoch_end(self: Learner) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        whole(self)

    words = ("train", *TINY, "trainer.max_epochs=1", "hydra.run.dir=run", "resume=auto")
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "on_train_epoch_end", on_train_epoch_end)
        done = espalier(*words)
    assert (done.code, step(tmp_path / "run")) == (75, 5)
    assert espalier(*words).code == 0
    assert step(tmp_path / "run") == 5


def test_the_steps_in_all_are_those_that_follow_an_epoch_that_max_steps_has_cut(espalier: Command, tmp_path: Path):
    words = ("train", *TINY, "trainer.max_epochs=3", "trainer.max_steps=7", "hydra.run.dir=run")
    assert espalier(*words).code == 0
    done = espalier("train", "resume=run", "trainer.max_steps=-1")
    assert done.code == 0, done.err
    assert "; 5 steps per epoch, 12 in all" in done.out
    assert step(tmp_path / "run") == 12  # the second epoch counts as done, the third has 5


def test_a_hangup_that_nohup_has_it_ignore_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert HANGUP not in heard()
        with heeded("train"):
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    with pytest.raises(StoppedError, match="stopped by SIGHUP"), heeded("train"):
        os.kill(os.getpid(), signal.SIGHUP)


def test_after_a_closed_terminal_what_is_printed_goes_nowhere_and_fails_nothing():
    process, terminal = pty.fork()
    if not process:
        come: list[int] = []
        signal.signal(signal.SIGHUP, lambda number, frame: come.append(number))
        signal.alarm(60)
        os.write(1, b"ready")
        while not come:
            time.sleep(0.01)
        leave_terminal(come[0])
        try:
            os._exit(len(b"gone") - os.write(1, b"gone"))
        finally:
            os._exit(1)
    assert os.read(terminal, 5) == b"ready"
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def test_after_another_signal_the_first_ctrl_c_does_not_end_it_at_once(capfd: pytest.CaptureFixture[str]):
    interrupt = Interrupt()
    interrupt._keep(signal.SIGTERM, None)
    interrupt._keep(signal.SIGINT, None)
    assert "press Ctrl-C again to end at once" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        interrupt._keep(signal.SIGINT, None)
