"""A run goes on with another number of devices: the same steps, or one line that says why not."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Command, command
from espalier.data.loaders import Order
from espalier.errors import ConfigError, StoppedError
from espalier.processes.global_batch import Split, follow
from helpers.ranks import ranks
from test_distributed import assert_close, losses, metrics, weights

WORDS = (
    *("train", "model=mlp", "model.hidden=[16]", "logger=[csv]", "callbacks=[checkpoint,monitor,ema]"),
    *("data/augment=[crop]", "trainer.max_epochs=2", "+trainer.val_check_interval=0.5"),
)
AS_TWO = ("data.batch_size=32", "strategy=ddp_cpu")


STOPPED = """  # saves and stops after a step, as after a signal
from espalier.learners.learner import Learner
whole = Learner.on_train_batch_end

def on_train_batch_end(self, outputs, batch, batch_idx):
    whole(self, outputs, batch, batch_idx)
    if self.trainer.global_step == {step} and (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
        self._stop()

Learner.on_train_batch_end = on_train_batch_end
"""


def steps(run: Path) -> list[str]:
    """Those of the rows of metrics.csv, validations among them."""
    with (run / "metrics.csv").open() as file:
        return [row["step"] for row in csv.DictReader(file) if row["val/loss"] or row["train/loss"]]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process with batches of 64."""
    folder = tmp_path_factory.mktemp("unbroken")
    torch.set_num_threads(1)
    assert command([*WORDS, "data.batch_size=64", f"hydra.run.dir={folder}/run"], folder).code == 0
    return folder / "run"


@pytest.mark.parametrize(
    ("begun", "resumed", "step", "told"),
    [
        (AS_TWO, ["trainer.devices=1"], 22, "1 device x 64 samples, after 2 devices x 32 samples: 64 in a step"),
        pytest.param(
            AS_TWO,
            ["strategy=cpu", "trainer.accumulate_grad_batches=2"],
            20,
            "1 device x 32 samples x 2 batches, after",
            marks=pytest.mark.slow,
        ),
        (["data.batch_size=64"], ["strategy=ddp_cpu"], 22, "2 devices x 32 samples, after 1 device x 64 samples: 64"),
    ],
)
def test_a_run_goes_on_with_other_devices_as_if_nothing_had_happened(
    tmp_path: Path, unbroken: Path, begun: Any, resumed: Any, step: int, told: str
):
    num, stopped = 2 if "strategy=ddp_cpu" in begun else 1, STOPPED.format(step=step)
    first = ranks(tmp_path, *WORDS, *begun, "hydra.run.dir=run", num=num, before=stopped)
    assert {code for code, _ in first} == {StoppedError.exit_code}, first[0][1]
    done = ranks(tmp_path, "train", "resume=run", *resumed, num=2 if "strategy=ddp_cpu" in resumed else 1)
    assert {code for code, _ in done} == {0}, done[0][1]
    assert done[0][1].count(told) == 1
    assert "no longer the run it was" not in done[0][1]
    assert_close(tmp_path / "run", unbroken)
    assert steps(tmp_path / "run") == steps(unbroken)
    assert losses(tmp_path / "run") == pytest.approx(losses(unbroken), rel=1e-4)
    assert metrics(tmp_path / "run") == pytest.approx(metrics(unbroken), rel=1e-4)


def test_devices_that_cannot_take_the_same_steps_are_refused_with_the_numbers(espalier: Command, tmp_path: Path):
    words = (*WORDS, "data.batch_size=50", "hydra.run.dir=run")
    [(code, output)] = ranks(tmp_path, *words, num=1, before=STOPPED.format(step=3))
    assert code == StoppedError.exit_code, output
    before = weights(Path("run"))
    done = espalier("train", "resume=run", "trainer.accumulate_grad_batches=3")
    assert done.code == 2
    assert done.err.startswith(
        "espalier: trainer.devices=1, trainer.accumulate_grad_batches=3: the run was trained by 1 device x 50 samples, "
        "and steps of 50 samples do not divide by 3"
    )
    assert all(torch.equal(value, before[name]) for name, value in weights(Path("run")).items())


def content(split: Split, done: int) -> dict[str, Any]:
    progress = {"current": {"ready": done}}
    return {"global_batch": vars(split), "loops": {"fit_loop": {"epoch_loop.batch_progress": progress}}}


@pytest.mark.parametrize(
    ("before", "num_devices", "accumulate", "after"),
    [
        (Split(2, 32, 1, 16, 16, 3), 1, 1, Split(1, 64, 1, 16, 16, 3)),
        (Split(2, 32, 1, 16, 16, 3), 4, 1, Split(4, 16, 1, 16, 16, 3)),
        (Split(2, 32, 1, 16, 8, 3), 1, 2, Split(1, 32, 2, 32, 16, 6)),
        (Split(1, 3, 4, 8, 8, 2), 2, 4, Split(2, 3, 2, 4, 4, 1)),  # 12 samples of a step: 2 x 1.5 x 4 is none
        (Split(1, 32, 2, 33, 33, 6), 2, 2, Split(2, 16, 2, 33, 33, 6)),  # the last step of an epoch is a half one
    ],
)
def test_the_batch_of_a_device_follows_or_else_the_accumulation(
    before: Split, num_devices: int, accumulate: int, after: Split
):
    assert follow(content(before, 0), num_devices, accumulate, scales_validation=False) == after
    assert after.samples_of_step == before.samples_of_step
    assert after.num_batches * after.samples == before.num_batches * before.samples


@pytest.mark.parametrize(
    ("before", "done", "num_devices", "line"),
    [
        (Split(2, 32, 1, 16, 16, 3), 0, 3, "steps of 64 samples do not divide by 3"),
        (Split(1, 32, 2, 33, 33, 6), 3, 2, "batch 3 of an epoch, within a step of 2 batches"),
        (Split(1, 1, 2, 33, 33, 6), 0, 2, "epochs of 33 samples, or their parts"),
    ],
)
def test_what_cannot_be_split_alike_says_why(before: Split, done: int, num_devices: int, line: str):
    with pytest.raises(ConfigError, match=line):
        follow(content(before, done), num_devices, before.accumulate, scales_validation=False)


def test_a_checkpoint_of_before_this_was_recorded_goes_on_as_it_is():
    assert follow({}, 7, 3, scales_validation=False) is None


def test_a_split_of_other_devices_sees_the_same_samples_in_each_step():
    """What `follow` builds on: a global batch is a piece of one order, however it is dealt out."""
    steps = []
    for num_devices, batch_size in ((2, 32), (1, 64), (1, 16), (4, 8)):
        orders = [Order(300, batch_size, 0, rank, num_devices) for rank in range(num_devices)]
        batches = zip(*(order.batches(torch.device("cpu")) for order in orders), strict=True)
        together = torch.stack([torch.cat(parts) for parts in batches])
        steps.append(together.flatten()[:256].view(4, 64).sort(1).values)
    assert all(torch.equal(step, steps[0]) for step in steps)
