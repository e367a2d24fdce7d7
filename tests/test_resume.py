"""A run that was interrupted and resumed is, bit for bit, the run that was never interrupted."""

import csv
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import QUICK, Command, command, run_in
from espalier.callbacks.monitor import Monitor
from espalier.learners.classifier import Classifier
from espalier.runs.checkpoint import CheckpointIO
from helpers import forked

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:The number of training batches")

NUM_EPOCHS = 4
NUM_BATCHES = 17  # per epoch: 1,151 training samples in batches of 64
CLOCKS = {"samples_per_second", "data_wait_share"}
EVERYTHING = (  # that has a state or draws random numbers
    *("model=mlp", "model.hidden=[16]", "model.dropout=0.2", "data/augment=[crop,rotation,mixup]"),
    *("callbacks=[checkpoint,monitor,ema]", "callbacks.ema.decay=0.9", "logger=[csv]"),
    *(f"trainer.max_epochs={NUM_EPOCHS}", "trainer.accumulate_grad_batches=2", "trainer.log_every_n_steps=3"),
    "callbacks.checkpoint.every_n_steps=1",
)


class CrashError(Exception):
    """Stands for whatever ends a process."""


def crash_at(patch: pytest.MonkeyPatch, epoch: int, batch: int) -> None:
    """Raise at the end of this batch, after its optimizer step, before its checkpoint."""
    whole = Monitor.on_train_batch_end

    def on_train_batch_end(self, trainer, pl_module, outputs, data, batch_idx):
        if (trainer.current_epoch, batch_idx) == (epoch, batch):
            raise CrashError
        whole(self, trainer, pl_module, outputs, data, batch_idx)

    patch.setattr(Monitor, "on_train_batch_end", on_train_batch_end)


def crashing(folder: Path, epoch: int, batch: int, *words: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, epoch, batch)
        with pytest.raises(CrashError):
            command(["train", *words], folder)


def tensors(node: object, where: str = "") -> dict[str, Tensor]:
    """Every tensor and number of a nested checkpoint by its path, but for the clocks of the monitor."""
    if isinstance(node, Tensor):
        return {where: node}
    if isinstance(node, int | float) and "seconds" not in where:
        return {where: torch.tensor(node)}
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()
    return {path: value for key, child in pairs for path, value in tensors(child, f"{where}/{key}").items()}


def state(run: Path) -> dict[str, Tensor]:
    """Weights, raw and averaged, optimizer and scheduler of the last checkpoint."""
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    kept = {key: content[key] for key in ("state_dict", "ema", "optimizer_states", "lr_schedulers", "global_step")}
    return tensors(kept)


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return [{name: text for name, text in row.items() if name not in CLOCKS} for row in csv.DictReader(file)]


def measured(run: Path) -> dict[str, float]:
    return json.loads((run / "report.json").read_text())["rows"][0]["metrics"]


def assert_same(run: Path, unbroken: Path) -> None:
    now, then = state(run), state(unbroken)
    assert now.keys() == then.keys()
    assert [name for name in then if not torch.equal(now[name], then[name])] == []
    assert rows(run) == rows(unbroken)
    assert measured(run) == measured(unbroken)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert command(["train", *EVERYTHING], folder).code == 0
    return run_in(folder)


@pytest.mark.parametrize(
    ("epoch", "batch"),
    [
        (1, 0),  # the first batch of an epoch
        (2, 6),  # between two batches of an optimizer step
        (2, NUM_BATCHES - 1),  # the last batch of an epoch
        (3, 11),  # after an optimizer step
    ],
)
def test_resume_after_a_crash_is_bit_equal(espalier: Command, tmp_path: Path, unbroken: Path, epoch: int, batch: int):
    crashing(tmp_path, epoch, batch, *EVERYTHING)
    run = run_in(tmp_path)
    assert not (run / "report.json").exists()
    done = espalier("train", f"resume={run}")
    assert done.code == 0, done.err
    assert_same(run, unbroken)


@pytest.mark.parametrize(
    "words",
    [
        ("scheduler=plateau", "scheduler.patience=0", "scheduler.threshold=0.5"),
        ("trainer.precision=bf16-mixed",),
        ("data=diabetes", "data.batch_size=32"),
        ("optimizer=muon", "scheduler=one_cycle", "+trainer.val_check_interval=0.5"),
        tuple(
            f"callbacks.checkpoint.{word}"
            for word in ("asynchronous=true", "every_n_steps=null", "every_n_minutes=1e-9")
        ),
    ],
    ids=["plateau", "bfloat16", "regression", "validation within the epoch", "saves in the background"],
)
def test_resume_is_bit_equal_with(espalier: Command, tmp_path: Path, words: tuple[str, ...]):
    settings = [word for word in EVERYTHING if words[0] != "data=diabetes" or not word.startswith("data/augment")]
    assert espalier("train", *settings, *words, "hydra.run.dir=unbroken").code == 0
    crashing(tmp_path, 2, 0, *settings, *words, "hydra.run.dir=broken")
    done = espalier("train", "resume=broken")
    assert done.code == 0, done.err
    assert_same(tmp_path / "broken", tmp_path / "unbroken")


@pytest.mark.parametrize("num_saves", [12, 19, 20])  # within an epoch; the best and the last one of its end
def test_a_crash_right_after_a_checkpoint_loses_no_row(
    espalier: Command, tmp_path: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch, num_saves: int
):
    whole, done = CheckpointIO.save_checkpoint, []

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        whole(self, checkpoint, path, storage_options)
        done.append(path)
        if len(done) == num_saves:
            raise CrashError

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointIO, "save_checkpoint", save_checkpoint)
        with pytest.raises(CrashError):
            command(["train", *EVERYTHING], tmp_path)
    run = run_in(tmp_path)
    assert espalier("train", f"resume={run}").code == 0
    assert_same(run, unbroken)


def test_a_damaged_checkpoint_costs_one_interval_and_one_warning(espalier: Command, tmp_path: Path, unbroken: Path):
    crashing(tmp_path, 2, 5, *EVERYTHING)
    run = run_in(tmp_path)
    last = run / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-100] + bytes(100))
    done = espalier("train", f"resume={run}")
    assert done.code == 0, done.err
    warnings = [line for line in (done.out + done.err).splitlines() if "last.ckpt: damaged" in line]
    assert len(warnings) == 1
    assert "its sha256 is not the one in SHA256SUMS; going on from previous.ckpt" in warnings[0]
    assert_same(run, unbroken)


def test_a_run_that_crashes_again_and_again_ends_the_same(espalier: Command, tmp_path: Path, unbroken: Path):
    crashing(tmp_path, 1, 5, *EVERYTHING)
    run = run_in(tmp_path)
    for epoch, batch in ((1, 6), (1, 7), (2, 0), (3, 9), (3, 10)):
        crashing(tmp_path, epoch, batch, f"resume={run}")
    assert espalier("train", f"resume={run}").code == 0
    assert_same(run, unbroken)


KILLED_WHILE_SAVING = """
import os, signal, sys
from espalier import cli

whole, num_syncs = os.fsync, 0

def fsync(file):  # of a checkpoint under its temporary name, of the list of hashes, of the folder with both
    global num_syncs
    num_syncs += 1
    if num_syncs == int(os.environ["KILLED_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    whole(file)

os.fsync = fsync
cli.main()
"""


@pytest.mark.parametrize(
    ("sync", "num_drafts"),
    [
        pytest.param(28, 1, marks=pytest.mark.slow),  # the best checkpoint of the first epoch is about to be recorded
        (29, 2),  # and about to become the last one
        pytest.param(31, 1, marks=pytest.mark.slow),  # the next file is written
        pytest.param(32, 2, marks=pytest.mark.slow),  # and its hash
        pytest.param(33, 0, marks=pytest.mark.slow),  # and both have their names
    ],
)
def test_resume_after_kill_9_while_a_checkpoint_is_written_is_bit_equal(
    espalier: Command, tmp_path: Path, unbroken: Path, sync: int, num_drafts: int
):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KILLED_AT": str(sync)}
    killed = forked.run(["-c", KILLED_WHILE_SAVING, "train", *EVERYTHING], cwd=tmp_path, env=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = run_in(tmp_path)
    assert len(list((run / "checkpoints").glob(".*.partial"))) == num_drafts
    assert espalier("train", f"resume={run}").code == 0
    assert_same(run, unbroken)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "best.ckpt",
        "last.ckpt",
        "previous.ckpt",
        "BEST",
        "SHA256SUMS",
    }


def test_a_finished_run_can_be_trained_longer_in_its_own_folder(espalier: Command, tmp_path: Path):
    short = ("model=mlp", "model.hidden=[16]", "trainer.max_epochs=1", "callbacks=[checkpoint]", "logger=[csv]")
    assert espalier("train", *short).code == 0
    run = run_in(tmp_path)
    assert espalier("train", "resume=latest", "trainer.max_epochs=3").code == 0
    assert run_in(tmp_path) == run
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == 3 * NUM_BATCHES
    assert [row["epoch"] for row in rows(run) if row["train/loss"]] == ["0", "1", "2"]


def test_a_run_that_crashed_before_its_first_checkpoint_says_so(espalier: Command, tmp_path: Path):
    crashing(tmp_path, 0, 0, *EVERYTHING)
    done = espalier("train", f"resume={run_in(tmp_path)}")
    assert done.code == 2
    assert "holds no checkpoint (checkpoints/last.ckpt or checkpoints/previous.ckpt)" in done.err.splitlines()[-1]


def test_the_last_checkpoint_is_that_of_the_last_epoch_also_if_none_of_them_got_better(
    espalier: Command, tmp_path: Path
):
    words = ("model=mlp", "model.hidden=[16]", "optimizer.lr=1e-12", "trainer.max_epochs=3")
    assert espalier("train", *words, "callbacks=[checkpoint]", "logger=[csv]").code == 0
    checkpoints = run_in(tmp_path) / "checkpoints"
    steps = {path.stem: torch.load(path, weights_only=True)["global_step"] for path in checkpoints.glob("*.ckpt")}
    assert steps == {"best": NUM_BATCHES, "previous": 2 * NUM_BATCHES, "last": 3 * NUM_BATCHES}


def test_a_finished_run_that_goes_on_is_no_finished_one_until_it_ends_again(
    espalier: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    words = ("model=mlp", "trainer.max_epochs=1", *QUICK, "hydra.run.dir=run")
    assert espalier("train", *words).code == 0
    first = (tmp_path / "run" / "report.json").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "loss", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            espalier("train", "resume=run", "trainer.max_epochs=2")
    assert not (tmp_path / "run" / "report.json").exists(), "its numbers are those of another network"
    assert espalier("train", "resume=run", "trainer.max_epochs=2").code == 0
    assert (tmp_path / "run" / "report.json").read_text() != first
