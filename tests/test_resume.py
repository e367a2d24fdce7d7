"""A run that was interrupted and resumed is, bit for bit, the run that was never interrupted."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import Command, command, run_in
from espalier.callbacks.monitor import Monitor

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:The number of training batches")

NUM_EPOCHS = 4
NUM_BATCHES = 17  # per epoch: 1,151 training samples in batches of 64
CLOCKS = {"samples_per_second", "data_wait_share"}
OFTEN = "+callbacks.often"
EVERYTHING = (  # that has a state or draws random numbers
    *("model=mlp", "model.hidden=[16]", "model.dropout=0.2", "data/augment=[crop,rotation,mixup]"),
    *("callbacks=[checkpoint,monitor,ema]", "callbacks.ema.decay=0.9", "logger=[csv]"),
    *(f"trainer.max_epochs={NUM_EPOCHS}", "trainer.accumulate_grad_batches=2", "trainer.log_every_n_steps=3"),
    f"{OFTEN}._target_=lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    *(f"{OFTEN}.every_n_train_steps=2", f"{OFTEN}.save_top_k=0", f"{OFTEN}.save_last=true"),
    f"{OFTEN}.enable_version_counter=false",
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

whole, num_saves = os.fsync, 0

def fsync(file):  # a checkpoint is complete, but still under its temporary name
    global num_saves
    num_saves += 1
    if num_saves == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    whole(file)

os.fsync = fsync
cli.main()
"""


def test_resume_after_kill_9_while_a_checkpoint_is_written_is_bit_equal(
    espalier: Command, tmp_path: Path, unbroken: Path
):
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, "train", *EVERYTHING],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = run_in(tmp_path)
    assert list((run / "checkpoints").glob(".*.partial"))
    assert espalier("train", f"resume={run}").code == 0
    assert_same(run, unbroken)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


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
    crashing(tmp_path, 0, 12, *EVERYTHING)
    done = espalier("train", f"resume={run_in(tmp_path)}")
    assert done.code == 2
    assert "holds no checkpoint (checkpoints/last.ckpt)" in done.err.splitlines()[-1]


def test_the_last_checkpoint_is_that_of_the_last_epoch_also_if_none_of_them_got_better(
    espalier: Command, tmp_path: Path
):
    words = ("model=mlp", "model.hidden=[16]", "optimizer.lr=1e-12", "trainer.max_epochs=3")
    assert espalier("train", *words, "callbacks=[checkpoint]", "logger=[csv]").code == 0
    checkpoints = run_in(tmp_path) / "checkpoints"
    steps = {path.stem: torch.load(path, weights_only=True)["global_step"] for path in checkpoints.iterdir()}
    assert steps == {"best": NUM_BATCHES, "last": 3 * NUM_BATCHES}
